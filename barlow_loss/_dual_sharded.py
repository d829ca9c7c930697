"""The dual over several processes: each computes its own n rows of K1 and K2, in 8 n N D FLOPs, and keeps O(n D).

While it works it also holds U, the rows of all ranks, V N D numbers: the price of one gather in place of D².

With U the rows of all ranks, u this rank's own, K = u Uᵀ its n rows of the Gram matrix, M as in ``_dual`` and P = M U,

    ‖C‖² = Σ_ranks ⟨K1, K2⟩,    q = Σ_ranks Σ_n u_n ∘ P_n    for every view

The collectives, all in the forward: U is gathered, in the dtype of the matrix products, and one sum follows, over C_ii,
‖C‖² and every q. The q need P, so P is computed here and kept, where one process leaves it to the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barlow_loss._collectives import Shards, all_reduce_sum, gather_rows, once_even
from barlow_loss._dual import INCLUDES_DIAGONAL
from barlow_loss._header import UNEVEN
from barlow_loss._pairs import each
from barlow_loss._plan import Plan, vector_dtype
from barlow_loss._target import moved_squares, shift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from barlow_loss._pairs import Stack

__all__ = ["INCLUDES_DIAGONAL", "products", "value"]


def value(
    ops: Any, plan: Plan, shards: Shards, u: Stack, diagonal: Tensor, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, ‖C‖², and what the gradient needs: P and q of every view."""
    local = each(u)
    if shards.sums is not None:
        message = f"barlow_twins_loss: {UNEVEN}"
        local = tuple(once_even(u_i, shards.sums, shards.group.size, message) for u_i in local)
    gathered = tuple(gather_rows(shards, rows) for rows in local)
    m, squares = ops.grams(u, gathered, plan)
    nothing = local[0].new_empty(0), diagonal.new_zeros(0)
    kept = [
        ops.project(m_i, gathered_i, local_i, shift(view, local, plan), plan) if wanted else nothing
        for view, (wanted, m_i, gathered_i, local_i) in enumerate(zip(needs_grad, m, gathered, local, strict=True))
    ]
    p, q = zip(*kept, strict=True)
    dtype = vector_dtype(diagonal.device)
    if plan.off_diagonal_target:
        squares = moved_squares(squares, local, diagonal, plan, shards.group.size)
    sums = diagonal.to(dtype), squares.sum(dtype=dtype), *(sum_i.to(dtype) for sum_i in q)
    c, squared_norm, *whole_q = all_reduce_sum(shards.group, *sums)
    return c, squared_norm, (*p, *whole_q)


def products(needs_grad: tuple[bool, ...], plan: Plan, u: Stack, *kept: Tensor) -> Iterator[Any]:
    """P and q of every view, as they were kept."""
    p, q = kept[: len(needs_grad)], kept[len(needs_grad) :]
    return ((p_i, None, q_i) if wanted else None for wanted, p_i, q_i in zip(needs_grad, p, q, strict=True))
