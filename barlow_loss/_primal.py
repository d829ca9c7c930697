"""The primal: the D×D cross-correlation itself, as in the paper. 6 N D² FLOPs forward and backward, O(D²) memory.

With u = ẑ/√N and C̃ = u1ᵀ u2 with its diagonal set to zero (the diagonal is summed elementwise, more precisely):

    Σ_{i≠j} C_ij² = ‖C̃‖²,    q = Σ_j C̃_ij² for the first view, Σ_i C̃_ij² for the second

Over several processes C is the sum of what the shards contribute: one all-reduce of D² numbers, 6 n D² FLOPs on a rank
of n rows, and no communication in backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from barlow_loss._collectives import Shards, all_sum, all_sum_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._backends import Primitives, Product

__all__ = ["HOLDS_DIAGONAL", "product", "value"]

HOLDS_DIAGONAL = False  # C̃ is C without it


def value(
    ops: Primitives, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, parts of Σ_{i≠j} C_ij², and what the gradient needs: C̃ and its row and column sums of squares."""
    (c,) = all_sum(shards.group, diagonal)
    correlation = all_sum_matrix(shards.group, ops.correlate(u[0], u[1]))
    correlation.diagonal().zero_()
    rows, columns = ops.squared_sums(correlation)
    return c, rows, (correlation, rows, columns)


def product(view: int, u1: Tensor, u2: Tensor, correlation: Tensor, rows: Tensor, columns: Tensor) -> Product:
    """The factors of P, which is u2 C̃ᵀ for the first view and u1 C̃ for the second; and q."""
    return ((u2, correlation.T), rows) if view == 0 else ((u1, correlation), columns)
