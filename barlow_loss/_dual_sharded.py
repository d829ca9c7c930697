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
from barlow_loss._dual import coefficients, off_diagonal

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._backends import Primitives

__all__ = ["coefficients", "product", "value"]


def value(
    ops: Primitives, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, Σ_{i≠j} C_ij², and what the gradient needs: P and q of either view."""
    every = [gather_rows(shards, own) for own in u]
    grams = [ops.gram_rows(own, all_rows) for own, all_rows in zip(u, every, strict=True)]
    squared_norm = ops.frobenius(grams[0], grams[1])
    nothing = diagonal.new_zeros(diagonal.shape)
    projections: list[Tensor] = []
    q: list[Tensor] = []
    for view in (0, 1):
        p, column_dots = (
            ops.project(grams[1 - view], every[view], u[view]) if needed[view] else (u.new_empty(0), nothing)
        )
        projections.append(p)
        q.append(column_dots.to(diagonal.dtype))
    c, squared_norm, *q = all_sum(shards.group, diagonal, squared_norm.to(diagonal.dtype), *(q if any(needed) else ()))
    return c, off_diagonal(squared_norm, c), (*projections, *q)


def product(view: int, u1: Tensor, u2: Tensor, *kept: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """P itself, and q."""
    projections, q = kept[:2], kept[2:]
    return (projections[view],), q[view]
