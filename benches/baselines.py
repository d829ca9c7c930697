"""What the loss is timed against.

Every contender is a function of the two views that returns the scalar loss; all minimise the same function, with
λ = 0.0051 and ε = 1e-5:

* ``barlow_loss``: this package, ``algorithm="auto"``.
* ``textbook``: the D×D formula as the paper's authors published it, over an affine-free ``BatchNorm1d``.
* ``compiled``: ``torch.compile`` of it, static shapes, inductor.
* ``lightly``: ``lightly.loss.BarlowTwinsLoss`` as published on PyPI, left out where it is not installed.

Over several processes, ``distributed_textbook`` stands for ``textbook``: the same formula as the authors' program runs
it, statistics and C over the batch of all ranks.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss

if TYPE_CHECKING:
    from collections.abc import Callable

    Contender = Callable[[Tensor, Tensor], Tensor]

LAMBD = 0.0051
EPS = 1e-5

OURS = "barlow_loss"
TEXTBOOK = "textbook"
COMPILED = "compiled"
LIGHTLY = "lightly"


class Textbook(nn.Module):
    """The published formula, line by line: C = bn(z1)ᵀ bn(z2) / N, then its two sums of squares.

    FLOPs, forward + backward: 6·N·D². Bytes: a D×D matrix is read or written 39 times, 4·D² bytes each; a form that
    views the off-diagonal elements in place of copying them would need 24.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(features, eps=EPS, affine=False)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        c: Tensor = self.bn(z1).T @ self.bn(z2)
        c.div_(z1.shape[0])
        return _penalty(c)


def distributed_textbook(z1: Tensor, z2: Tensor) -> Tensor:
    """The published program over several processes: synchronised batch norm, and C summed over the ranks.

    The sum is not differentiated there, so each rank's gradient is its own part, and DDP's mean over W ranks makes that
    1/W of the gradient of the loss. FLOPs and passes over D×D matrices are those of ``Textbook``, for the rank's rows.
    """
    c = _synchronized_norm(z1).T @ _synchronized_norm(z2)
    c.div_(z1.shape[0] * dist.get_world_size())
    dist.all_reduce(c.detach())  # in place as there, but past autograd, which warns of it
    return _penalty(c)


def _penalty(c: Tensor) -> Tensor:
    """The two sums of squares, over ``c``."""
    d = c.shape[0]
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow_(2).sum()
    return on_diagonal + LAMBD * off_diagonal


def _synchronized_norm(z: Tensor) -> Tensor:
    """What ``SyncBatchNorm`` without parameters computes, which takes no CPU tensors; as many rows on every rank."""
    n = z.shape[0] * dist.get_world_size()
    x = z - _sum_over_ranks(z.sum(dim=0)) / n
    return x * torch.rsqrt(_sum_over_ranks(x.square().sum(dim=0)) / n + EPS)


def _sum_over_ranks(x: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(x)
    return total


class _SumOverRanks(torch.autograd.Function):
    """y = Σ_r x_r on every rank; what arrives for x is the sum over the ranks of what arrives for y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum_over_ranks(grads[0])


def contenders() -> tuple[str, ...]:
    """The names of the contenders that this environment has, ours first."""
    return (OURS, TEXTBOOK, COMPILED, *([LIGHTLY] if find_spec("lightly") else []))


def build(name: str, features: int) -> Contender:
    """The contender ``name`` for embeddings of ``features`` features."""
    contender: Contender
    if name == OURS:
        contender = BarlowTwinsLoss(LAMBD, eps=EPS)
    elif name == TEXTBOOK:
        contender = Textbook(features)
    elif name == COMPILED:
        contender = torch.compile(Textbook(features), fullgraph=True, dynamic=False)
    elif name == LIGHTLY:
        from lightly.loss import BarlowTwinsLoss as Lightly  # a heavy import

        contender = Lightly(lambda_param=LAMBD)
    else:
        raise ValueError(f"name: expected one of {contenders()}, got {name!r}")
    return contender
