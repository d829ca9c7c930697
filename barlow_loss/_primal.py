"""The primal: the D×D cross-correlation itself, as in the paper. 6 N D² FLOPs forward and backward, O(D²) memory.

With u = ẑ/√N and C̃ = u1ᵀ u2 with its diagonal set to zero (the diagonal is summed elementwise, more precisely):

    Σ_{i≠j} C_ij² = ‖C̃‖²,    q = Σ_j C̃_ij² for the first view, Σ_i C̃_ij² for the second

Over several processes C is the sum of what the shards contribute: one all-reduce of D² numbers, 6 n D² FLOPs on a rank
of n rows, and no communication in backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from barlow_loss._collectives import Shards, all_sum, all_sum_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._plan import Plan

__all__ = ["HOLDS_DIAGONAL", "products", "value"]

HOLDS_DIAGONAL = False  # C̃ is C without it


def value(
    ops: Any, plan: Plan, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, parts of Σ_{i≠j} C_ij², and what the gradient needs: C̃ and its row and column sums of squares."""
    (c,) = all_sum(shards.group, diagonal)
    u1, u2 = u.unbind()
    correlation = all_sum_matrix(shards.group, torch.mm(u1.t(), u2))
    correlation.diagonal().zero_()
    squares = correlation.to(plan.compute_dtype).square()
    rows = squares.sum(1)
    return c, rows, (correlation, rows, squares.sum(0))


def products(needed: tuple[bool, bool], u: Tensor, c: Tensor, rows: Tensor, columns: Tensor) -> tuple[Any, Any]:
    """The factors of P, u2 C̃ᵀ for the first view and u1 C̃ for the second, and q."""
    u1, u2 = u.unbind()
    return (u2, c.t(), rows) if needed[0] else None, (u1, c, columns) if needed[1] else None
