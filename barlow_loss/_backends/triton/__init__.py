"""The primitives fused by Triton, for CUDA, ROCm and XPU. Matrix products stay torch.mm.

The dual of one process is eight launches: ``fused_standardize`` | K1 | K2 | ``frobenius`` | ``penalties``, and in the
backward P1 | P2 | ``backproject``. No launch waits for the host, none has atomics: the same inputs give the same bits,
and a CUDA graph may hold them. A file for each kernel: the kernel, then the operation that launches it, then its fake.

The operations have no derivative of their own: they are called inside the autograd.Function of ``_function.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from barlow_loss._backends.triton import _backproject, _penalties, _standardize
from barlow_loss._backends.triton._backproject import column_dots
from barlow_loss._backends.triton._frobenius import frobenius
from barlow_loss._statistics import moments_from_sums, pivot_of, sample_index, scale_and_shift

if TYPE_CHECKING:
    from barlow_loss._backends.eager import Product
    from barlow_loss._collectives import Shards
    from barlow_loss._penalty import Arriving
    from barlow_loss._plan import Plan

__all__ = ["backproject", "grams", "penalties", "project", "standardize"]


def standardize(z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    if shards.group.size == 1:
        return _standardize.fused_standardize(z1, z2, eps, plan.matmul_dtype)
    n = z1.shape[0]
    rows = sample_index(n, z1.device)
    pivot = pivot_of(torch.stack([z.index_select(0, rows) for z in (z1, z2)]), plan.compute_dtype)
    shard = moments_from_sums(n, pivot, *_standardize.column_sums(z1, z2, pivot))
    rho, shift = scale_and_shift(shard, eps, shards)
    vectors = pivot, rho.to(pivot.dtype), shift.to(pivot.dtype)
    u, diagonal = _standardize.standardize(z1, z2, *vectors, plan.matmul_dtype)
    return u, diagonal, rho


def grams(u: Tensor, every: tuple[Tensor, Tensor] | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    own1, own2 = u.unbind()
    u1, u2 = every or (own1, own2)
    k1, k2 = torch.mm(own1, u1.t()), torch.mm(own2, u2.t())
    return k1, k2, frobenius(k1, k2)


def project(k: Tensor, every: Tensor, own: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    p = torch.mm(k, every)
    return p, column_dots(own, p)


def _weight(lambd: float | Tensor) -> tuple[Tensor | None, float]:
    """λ as a tensor or as a number, for operations whose schema knows either."""
    return (lambd, 0.0) if isinstance(lambd, Tensor) else (None, float(lambd))


def penalties(
    c: Tensor, squares: Tensor, lambd: float | Tensor, holds_diagonal: bool, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    return _penalties.penalties(c, squares, *_weight(lambd), holds_diagonal, plan.compute_dtype)


def backproject(
    products: tuple[Product | None, Product | None],
    u: Tensor,
    c: Tensor,
    rho: Tensor,
    arriving: Arriving,
    holds_diagonal: bool,
    plan: Plan,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    p1, q1 = _product(products[0])
    p2, q2 = _product(products[1])
    *given, lambd = arriving
    dz1, dz2 = _backproject.backproject(u, p1, p2, q1, q2, c, rho, *given, *_weight(lambd), holds_diagonal, n, dtype)
    return (None if p1 is None else dz1), (None if p2 is None else dz2)


def _product(product: Product | None) -> tuple[Tensor | None, Tensor | None]:
    """P and q."""
    if product is None:
        return None, None
    left, right, q = product
    return left if right is None else torch.mm(left, right), q
