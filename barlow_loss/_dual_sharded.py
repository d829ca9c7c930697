"""The dual over several processes: each computes its own n rows of K1 and K2, in 8 n N D FLOPs, and keeps O(n D).

While it works it also holds U, the rows of all ranks, 2 N D numbers: the price of one gather in place of D².

With U the rows of all ranks, u this rank's own, K = u Uᵀ its n rows of the Gram matrix and P1 = K2 U1, P2 = K1 U2,

    ‖C‖² = Σ_ranks ⟨K1, K2⟩,    q = Σ_ranks Σ_n u_n ∘ P_n    for either view

The collectives, all in the forward: U is gathered, in the dtype of the matrix products, and one sum follows, over C_ii,
‖C‖² and both q. The q need P, so P is computed here and kept, where one process leaves it to the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barlow_loss._collectives import Shards, all_sum, gather_rows, once_even
from barlow_loss._dual import HOLDS_DIAGONAL
from barlow_loss._header import UNEVEN
from barlow_loss._plan import Plan, vector_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HOLDS_DIAGONAL", "products", "value"]


def value(
    ops: Any, plan: Plan, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, ‖C‖², and what the gradient needs: P and q of either view."""
    if shards.sums is not None:
        u = once_even(u, shards.sums, shards.group.size, f"barlow_twins_loss: {UNEVEN}")
    u1, u2 = u.unbind()
    every = gather_rows(shards, u1), gather_rows(shards, u2)
    k1, k2, squares = ops.grams(u, every, plan)
    nothing = u.new_empty(0), diagonal.new_zeros(0)
    p1, q1 = ops.project(k2, every[0], u1, plan) if needed[0] else nothing
    p2, q2 = ops.project(k1, every[1], u2, plan) if needed[1] else nothing
    dtype = vector_dtype(u.device)
    sums = (diagonal.to(dtype), squares.sum(dtype=dtype), q1.to(dtype), q2.to(dtype))
    c, squared_norm, q1, q2 = all_sum(shards.group, *sums)
    return c, squared_norm, (p1, p2, q1, q2)


def products(needed: tuple[bool, bool], u: Tensor, p1: Tensor, p2: Tensor, q1: Tensor, q2: Tensor) -> tuple[Any, Any]:
    """P and q of either view, as they were kept."""
    return (p1, None, q1) if needed[0] else None, (p2, None, q2) if needed[1] else None
