"""The primal: the D×D cross-correlation itself, as in the paper. 6 N D² FLOPs for a pair of views, O(D²) memory.

With u = ẑ/√N and C̃ = u1ᵀ u2 − t with its diagonal set to zero (the diagonal is summed elementwise, more precisely):

    Σ_{i≠j} (C_ij − t)² = ‖C̃‖²,    q = Σ_j C̃_ij C_ij for the first view, Σ_i C̃_ij C_ij for the second

With more than two views there is a C̃ for every pair, and P and q are the sums Σ_j w_ij of theirs.

Over several processes C is the sum of what the shards contribute: one all-reduce of D² numbers, 6 n D² FLOPs on a rank
of n rows, and no communication in backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from barlow_loss._collectives import Shards, all_reduce_matrix, all_reduce_sum
from barlow_loss._pairs import each, pairs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from barlow_loss._pairs import Stack
    from barlow_loss._plan import Plan

__all__ = ["INCLUDES_DIAGONAL", "products", "value"]

INCLUDES_DIAGONAL = False  # C̃ is C without it


def value(
    ops: Any, plan: Plan, shards: Shards, u: Stack, diagonal: Tensor, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, parts of Σ_{i≠j} (C_ij − t)², and what the gradient needs: C̃ and q of either view, for every pair."""
    (c,) = all_reduce_sum(shards.group, diagonal)
    views = each(u)
    if len(views) == 2:
        return c, *_of_pair(*views, plan, shards, c.shape[-1])
    kept: list[Tensor] = []
    parts: list[Tensor] = []
    for i, j, weight in _weighted_pairs(plan):
        squares, of_pair = _of_pair(views[i], views[j], plan, shards, c.shape[-1])
        parts.append(squares * weight)
        kept += of_pair
    return c, torch.stack(parts), tuple(kept)


def _of_pair(
    u1: Tensor, u2: Tensor, plan: Plan, shards: Shards, d: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Parts of Σ C̃_ij² of D features; C̃ and q of either view."""
    correlation = all_reduce_matrix(shards.group, torch.mm(u1.t(), u2))
    correlation.diagonal().zero_()
    wide = correlation.to(plan.compute_dtype)
    if not plan.off_diagonal_target:
        products = wide.square()
        rows = products.sum(1)
        return rows, (correlation, rows, products.sum(0))
    moved = wide - plan.off_diagonal_target
    moved.diagonal().zero_()
    moved[d:], moved[:, d:] = 0, 0
    products = moved * wide
    return moved.square().sum(1), (moved.to(correlation.dtype), products.sum(1), products.sum(0))


def _weighted_pairs(plan: Plan) -> list[tuple[int, int, float]]:
    """Those that weigh anything; at least one does."""
    weights = plan.weights
    return [(i, j, weights[i][j]) for i, j in pairs_of(len(weights)) if weights[i][j]]


def products(needs_grad: tuple[bool, ...], plan: Plan, u: Stack, *kept: Tensor) -> Iterator[Any]:
    """The factors of P, u2 C̃ᵀ for the first view and u1 C̃ for the second, and q; of more views P itself, one by one."""
    views = each(u)
    if len(views) == 2:
        (u1, u2), (c, rows, columns) = views, kept
        return iter(((u2, c.t(), rows) if needs_grad[0] else None, (u1, c, columns) if needs_grad[1] else None))
    return (_product(view, plan, views, kept) if wanted else None for view, wanted in enumerate(needs_grad))


def _product(view: int, plan: Plan, u: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> tuple[Tensor, None, Tensor]:
    """Σ_j w_ij u_j C̃_ijᵀ and Σ_j w_ij Σ_d C̃_ij², in the dtype that sums have."""
    p = u[0].new_zeros(u[0].shape, dtype=plan.compute_dtype)
    q = kept[1].new_zeros(kept[1].shape)
    for (i, j, weight), number in zip(_weighted_pairs(plan), range(0, len(kept), 3), strict=True):
        c, rows, columns = kept[number : number + 3]
        if view in (i, j):
            product = torch.mm(u[j], c.t()) if view == i else torch.mm(u[i], c)
            # Not add_ with alpha, which inductor drops beside a product: findings/inductor_drops_alpha_of_a_product.sh.
            p.add_(product.to(p.dtype).mul_(weight))
            q.add_(rows if view == i else columns, alpha=weight)
    return p, None, q
