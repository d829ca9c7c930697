"""The dual: N×N Gram matrices in place of the D×D cross-correlation. 4 V N² D FLOPs for V views, O(V N²) memory.

With u = ẑ/√N, C = u1ᵀ u2 and K = u uᵀ:

    ‖C‖² = ⟨K1, K2⟩,    Σ_{i≠j} C_ij² = ⟨K1, K2⟩ − Σ_i C_ii²,    u2 Cᵀ = K2 u1,    u1 C = K1 u2

With more than two views the matrix products stay linear in V, for any weights w of the pairs, because the sums over
pairs go into the Gram matrices (of two views M1 = K2 and M2 = K1):

    M_i = Σ_j w_ij K_j,    Σ_{i<j} w_ij ‖C_ij‖² = ½ Σ_i ⟨K_i, M_i⟩,    Σ_j w_ij u_j C_ijᵀ = M_i u_i

The Frobenius identity is old (Tsai et al., arXiv 2104.13712, equation 4, for HSIC with linear kernels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barlow_loss._pairs import each
from barlow_loss._target import moved_product, moved_squares, shift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from barlow_loss._collectives import Shards
    from barlow_loss._pairs import Stack
    from barlow_loss._plan import Plan

__all__ = ["INCLUDES_DIAGONAL", "products", "value"]

INCLUDES_DIAGONAL = True  # ‖C‖² does, and so does C̃ = C


def value(
    ops: Any, plan: Plan, shards: Shards, u: Stack, diagonal: Tensor, needs_grad: tuple[bool, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, parts of ‖C‖², and the matrices that the gradient needs: M of every view."""
    m, squares = ops.grams(u, None, plan)
    return diagonal, moved_squares(squares, u, diagonal, plan) if plan.off_diagonal_target else squares, m


def products(needs_grad: tuple[bool, ...], plan: Plan, u: Stack, *m: Tensor) -> Iterator[Any]:
    """P = M u of every view by its factors, and q, which comes out of P; None where no gradient is needed."""
    if plan.off_diagonal_target:
        return (_moved_product(view, m, u, plan) if wanted else None for view, wanted in enumerate(needs_grad))
    return ((m_i, u_i, None) if wanted else None for wanted, m_i, u_i in zip(needs_grad, m, each(u), strict=True))


def _moved_product(view: int, m: tuple[Tensor, ...], u: Stack, plan: Plan) -> tuple[Tensor, None, None]:
    return moved_product(m[view], each(u)[view], shift(view, u, plan)), None, None
