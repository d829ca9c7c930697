"""The primitives fused by Triton, for CUDA, ROCm and XPU. Matrix products stay torch.mm.

The dual of one process is eight launches: ``whiten`` | K1 | K2 | ``frobenius`` | ``penalties``, and in the backward
P1 | P2 | ``backproject``. No launch waits for the host, none has atomics: the same inputs give the same bits, and a
CUDA graph may hold them. A file for each kernel: the kernel, then the operation that launches it, then its fake.

The operations have no derivative of their own: they are called inside the autograd.Function of ``_function.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from barlow_loss._backends.eager import correlate, squared_sums
from barlow_loss._backends.triton import _backproject, _penalties, _standardize
from barlow_loss._backends.triton._backproject import column_dots
from barlow_loss._backends.triton._frobenius import frobenius
from barlow_loss._backends.triton._standardize import whiten
from barlow_loss._backends.triton._symmetric_gram import symmetric_grams

if TYPE_CHECKING:
    from barlow_loss._backends import Product
    from barlow_loss._penalty import Arriving

__all__ = [
    "backproject",
    "centre",
    "correlate",
    "grams",
    "penalties",
    "project",
    "squared_sums",
    "standardize",
    "whiten",
]

# The least N for which the symmetric kernel makes the Gram matrices. None: never, since it has yet to be measured to
# beat two torch.mm, which compute twice as much.
SYMMETRIC_GRAM_FROM: int | None = None


def centre(z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    return (z1, z2, pivot), *_standardize.column_sums(z1, z2, pivot)


def standardize(
    x: tuple[Tensor, Tensor, Tensor], scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _standardize.standardize(*x, scale, shift, matmul_dtype)


def grams(u: Tensor, every: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    if every is None and SYMMETRIC_GRAM_FROM is not None and u.shape[1] >= SYMMETRIC_GRAM_FROM and u.itemsize == 2:
        k1, k2 = symmetric_grams(u)
    else:
        u1, u2 = (u[0], u[1]) if every is None else every
        k1, k2 = torch.mm(u[0], u1.T), torch.mm(u[1], u2.T)
    return k1, k2, frobenius(k1, k2)


def project(k: Tensor, every: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.mm(k, every)
    return p, column_dots(own, p)


def _weight(lambd: float | Tensor) -> tuple[Tensor | None, float]:
    """λ as a tensor or as a number, for operations whose schema knows either."""
    return (lambd, 0.0) if isinstance(lambd, Tensor) else (None, float(lambd))


def penalties(
    c: Tensor, squares: Tensor, lambd: float | Tensor, holds_diagonal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _penalties.penalties(c, squares, *_weight(lambd), holds_diagonal, dtype)


def backproject(
    products: tuple[Product | None, Product | None],
    u: Tensor,
    c: Tensor,
    rho: Tensor,
    arriving: Arriving,
    holds_diagonal: bool,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    p1, p2 = (product and _product(product[0]) for product in products)
    q1, q2 = (product and product[1] for product in products)
    dz1, dz2 = _backproject.backproject(
        p1, p2, q1, q2, u, c, rho, *arriving[:3], *_weight(arriving.lambd), holds_diagonal, n, dtype
    )
    return (None if p1 is None else dz1), (None if p2 is None else dz2)


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.mm(*factors)
