"""What the loss is timed against. Each is a function of the two views that returns the scalar loss.

λ = 0.0051 and ε = 1e-5. Those of the package and of PyPI run as they are published there. The others cannot be
installed beside torch 2.14, so their published formula stands here in our own words, with its source, times a constant
of 1. Under torch.distributed each does what its own code does. Not all compute the paper's function (``definition``):

* ``PAPER``: C from features standardised by the biased variance of each view, ε inside the root.
* ``UNBIASED``: by the unbiased standard deviation, ε outside the root.
* ``JOINT``: by mean and variance of both views together.
* ``RELAXED``: the off-diagonal sum replaced by one over D − 1 sums of C's elements. Its authors weight it with a
  smaller λ, 0.00049 at D = 8192.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss

Contender = Callable[[Tensor, Tensor], Tensor]

LAMBD = 0.0051
EPS = 1e-5

OURS, OURS_COMPILED = "barlow_loss", "barlow_loss, torch.compile"
PRIMAL, DUAL = "barlow_loss, primal", "barlow_loss, dual"
TEXTBOOK, COMPILED = "textbook", "textbook, torch.compile"
LIGHTLY, LIGHTLY_GATHERING = "lightly", "lightly, gathering"
STABLE, SOLO, VISSL, FFT = "stable-pretraining", "solo-learn", "VISSL", "FFT relaxation"

PAPER, UNBIASED, JOINT, RELAXED = "paper", "unbiased", "joint", "relaxed"


class Textbook(nn.Module):
    """The published formula, line by line: C = bn(z1)ᵀ bn(z2) / N, then its two sums of squares.

    Source: Zbontar et al. 2021, ``main.py`` of github.com/facebookresearch/barlowtwins.

    FLOPs, forward + backward: 6·N·D². Bytes: a D×D matrix is read or written 39 times, 4·D² bytes each; a form that
    views the off-diagonal elements in place of copying them would need 24.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(features, eps=EPS, affine=False)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        c: Tensor = self.bn(z1).T @ self.bn(z2)
        c.div_(z1.shape[0])
        return _loss_from(c)


def distributed_textbook(z1: Tensor, z2: Tensor) -> Tensor:
    """The published program over several processes: synchronised batch norm, and C summed over the ranks.

    The sum is not differentiated there, so each rank's gradient is its own part, and DDP's mean over W ranks makes that
    1/W of the gradient of the loss. FLOPs and passes over D×D matrices are those of ``Textbook``, for the rank's rows.
    """
    n = _SumOverRanks.apply(torch.tensor(float(z1.shape[0]), dtype=z1.dtype))
    c = _synchronized_norm(z1, n).T @ _synchronized_norm(z2, n)
    c.div_(n)
    dist.all_reduce(c.detach())  # in place as there, but past autograd, which warns of it
    return _loss_from(c)


def solo_learn(z1: Tensor, z2: Tensor) -> Tensor:
    """solo-learn: batch norm over the rank's own rows, C averaged over the ranks without its gradient.

    Source: ``solo/losses/barlow.py`` of github.com/vturrisi/solo-learn. The off-diagonal elements are picked by a
    boolean mask of D×D elements.
    """
    d = z1.shape[1]
    c = _averaged(torch.einsum("ni,nj->ij", _norm(z1), _norm(z2)) / z1.shape[0])
    identity = torch.eye(d, device=c.device)
    squares = (c - identity).pow(2)
    squares[~identity.bool()] *= LAMBD
    return squares.sum()


def vissl(z1: Tensor, z2: Tensor) -> Tensor:
    """VISSL: one mean and one variance per feature for both views, as E[x²] − E[x]², over the rows of all ranks.

    Source: ``vissl/losses/barlow_twins_loss.py`` and ``vissl/utils/apex_helpers.py`` of
    github.com/facebookresearch/vissl at fc30b8b. C is averaged over the ranks without its gradient. There the views
    come as one tensor; here their concatenation is a part of the step.
    """
    u1, u2 = _JointNorm.apply(torch.cat([z1, z2])).chunk(2)
    c = _averaged(u1.T @ u2 / z1.shape[0])
    on_diagonal = (torch.diagonal(c) - 1).square().sum()
    return on_diagonal + LAMBD * off_diagonal_of(c).square().sum()


def fft_relaxation(z1: Tensor, z2: Tensor) -> Tensor:
    """Shigeto et al. 2023: off-diagonal elements penalised through D − 1 sums s_k = Σ_i C_{i, i+k mod D}.

    Source: arXiv 2301.01569 with q = 2 and one block of D features, and ``src/main/losses/sbarlow.py`` of
    github.com/yutaro-s/scalable-decorrelation-ssl. The s_k are a circular correlation, which costs N·D·log D by FFT;
    opposite signs within a sum hide each other, hence a permutation anew in every step. Statistics and sums are of the
    rank's own rows.
    """
    n, d = z1.shape
    u1, u2 = _norm(z1), _norm(z2)
    on_diagonal = ((u1 * u2).sum(dim=0) / n - 1).square().sum()
    order = torch.randperm(d, device=z1.device)
    spectrum = (torch.fft.rfft(u1[:, order]).conj() * torch.fft.rfft(u2[:, order])).sum(dim=0)
    sums = torch.fft.irfft(spectrum, n=d) / n
    loss: Tensor = on_diagonal + LAMBD * sums[1:].square().sum()
    return loss


def _loss_from(c: Tensor) -> Tensor:
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    return on_diagonal + LAMBD * off_diagonal_of(c).pow_(2).sum()


def off_diagonal_of(c: Tensor) -> Tensor:
    """A copy of the elements off the diagonal: past the first, every row of d + 1 begins with one on it."""
    d = c.shape[0]
    return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()


def _norm(z: Tensor) -> Tensor:
    return nn.functional.batch_norm(z, None, None, training=True, eps=EPS)


def _synchronized_norm(z: Tensor, n: Tensor) -> Tensor:
    """What ``SyncBatchNorm`` without parameters computes, which takes no CPU tensors; ``n`` rows on all ranks."""
    x: Tensor = z - _SumOverRanks.apply(z.sum(dim=0)) / n
    return x * torch.rsqrt(_SumOverRanks.apply(x.square().sum(dim=0)) / n + EPS)


class _SumOverRanks(torch.autograd.Function):
    """y = Σ_r x_r on every rank; what arrives for x is the sum over the ranks of what arrives for y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _SumOverRanks.apply(grads[0])


class _JointNorm(torch.autograd.Function):
    """VISSL's normalisation, with a backward of its own that needs the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean = _averaged(x.mean(dim=0))
        variance = _averaged(x.square().mean(dim=0)) - mean.square()
        ctx.save_for_backward(x, mean, variance)
        return (x - mean) / torch.sqrt(variance + EPS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean, variance = ctx.saved_tensors
        (g,) = grads
        mean_g, mean_gx = _averaged(g.mean(dim=0)), _averaged((g * (x - mean)).mean(dim=0))
        gradient: Tensor = (g - mean_g - (x - mean) / (variance + EPS) * mean_gx) / torch.sqrt(variance + EPS)
        return gradient


def _averaged(c: Tensor) -> Tensor:
    """The mean over the ranks, in place and past autograd."""
    if not (dist.is_available() and dist.is_initialized()):
        return c
    dist.all_reduce(c.detach())
    return c / dist.get_world_size()


_ours = partial(BarlowTwinsLoss, LAMBD, eps=EPS)
_compiled: Any = partial(torch.compile, fullgraph=True, dynamic=False)


def _published(module: str, **settings: Any) -> Contender:
    """A package's own loss; the import is a heavy one, and stable-pretraining's brings its own tracebacks."""
    hook = sys.excepthook
    loss: Contender = import_module(module).BarlowTwinsLoss(**settings)
    sys.excepthook = hook
    return loss


class Entry(NamedTuple):
    """A contender: how it is built for so many features, what it computes, the package it needs, what else is known."""

    build: Callable[[int], Contender]
    definition: str = PAPER
    package: str | None = None
    ours: bool = False
    linear: bool = False  # in D
    compiled: bool = False


_lightly = partial(_published, "lightly.loss", lambda_param=LAMBD)
_ENTRIES = {
    OURS: Entry(lambda d: _ours(), ours=True, linear=True),
    PRIMAL: Entry(lambda d: _ours(algorithm="primal"), ours=True),
    DUAL: Entry(lambda d: _ours(algorithm="dual"), ours=True, linear=True),
    OURS_COMPILED: Entry(lambda d: _compiled(_ours()), ours=True, linear=True, compiled=True),
    TEXTBOOK: Entry(Textbook),
    COMPILED: Entry(lambda d: _compiled(Textbook(d)), compiled=True),
    LIGHTLY: Entry(lambda d: _lightly(), package="lightly"),
    LIGHTLY_GATHERING: Entry(lambda d: _lightly(gather_distributed=True), package="lightly"),
    STABLE: Entry(lambda d: _published("stable_pretraining.losses", lambd=LAMBD), UNBIASED, "stable_pretraining"),
    SOLO: Entry(lambda d: solo_learn),
    VISSL: Entry(lambda d: vissl, JOINT),
    FFT: Entry(lambda d: fft_relaxation, RELAXED, linear=True),
}


def contenders(processes: int = 1) -> tuple[str, ...]:
    """The contenders that this environment has, ours first; several processes are left without their variants."""
    variants = (LIGHTLY_GATHERING,) if processes == 1 else (PRIMAL, DUAL, OURS_COMPILED, COMPILED)
    return tuple(name for name in _ENTRIES if name not in variants and installed(name))


def installed(name: str) -> bool:
    package = entry(name).package
    return package is None or find_spec(package) is not None


def entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise ValueError(f"name: expected one of {tuple(_ENTRIES)}, got {name!r}")
    return _ENTRIES[name]


def build(name: str, features: int) -> Contender:
    return entry(name).build(features)
