"""What the loss is timed against.

Every contender is a function of the two views that returns the scalar loss; all minimise the same function, with
λ = 0.0051 and ε = 1e-5:

* ``barlow_loss``: this package, ``algorithm="auto"``.
* ``textbook``: the D×D formula as the paper's authors published it, over an affine-free ``BatchNorm1d``.
* ``compiled``: ``torch.compile`` of it, static shapes, inductor.
* ``lightly``: ``lightly.loss.BarlowTwinsLoss`` as published on PyPI, left out where it is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
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
        n, d = z1.shape
        c: Tensor = self.bn(z1).T @ self.bn(z2)
        c.div_(n)
        on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
        off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow_(2).sum()
        return on_diagonal + LAMBD * off_diagonal


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
