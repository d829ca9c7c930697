"""The dual over several processes: each computes its own n rows of K1 and K2, in 8 n N D FLOPs, and keeps O(n D).

While it works it also holds U, the rows of all ranks, 2 N D numbers: the price of one gather in place of D².

With U the rows of all ranks, u this rank's own, K = u Uᵀ its n rows of the Gram matrix and P1 = K2 U1, P2 = K1 U2,

    ‖C‖² = Σ_ranks ⟨K1, K2⟩,    q = Σ_ranks Σ_n u_n ∘ P_n    for either view

The collectives, all in the forward: U is gathered, in the dtype of the matrix products, and one sum follows, over C_ii,
‖C‖² and both q. The q need P, so P is computed here and kept, where one process leaves it to the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from barlow_loss._collectives import Shards, all_sum, gather_rows
from barlow_loss._dual import HOLDS_DIAGONAL

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._backends import Primitives, Product

__all__ = ["HOLDS_DIAGONAL", "product", "value"]


def value(
    ops: Primitives, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, ‖C‖², and what the gradient needs: P and q of either view."""
    every = gather_rows(shards, u[0]), gather_rows(shards, u[1])
    k1, k2, squares = ops.grams(u, every)
    p1, q1 = ops.project(k2, every[0], u[0]) if needed[0] else (u.new_empty(0), None)
    p2, q2 = ops.project(k1, every[1], u[1]) if needed[1] else (u.new_empty(0), None)
    nothing = diagonal.new_zeros(0)
    q = (nothing if own is None else own.to(diagonal.dtype) for own in (q1, q2))
    c, squared_norm, q1, q2 = all_sum(shards.group, diagonal, squares.sum(dtype=diagonal.dtype), *q)
    return c, squared_norm, (p1, p2, q1, q2)


def product(view: int, u1: Tensor, u2: Tensor, *kept: Tensor) -> Product:
    """P itself, and q."""
    return (kept[view],), kept[2 + view]
