"""The dual: N×N Gram matrices in place of the D×D cross-correlation. 8 N² D FLOPs forward and backward, O(N²) memory.

With u = ẑ/√N, C = u1ᵀ u2 and K = u uᵀ:

    ‖C‖² = ⟨K1, K2⟩,    Σ_{i≠j} C_ij² = ⟨K1, K2⟩ − Σ_i C_ii²,    u2 Cᵀ = K2 u1,    u1 C = K1 u2

The Frobenius identity is old (Tsai et al., arXiv 2104.13712, equation 4, for HSIC with linear kernels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._collectives import Shards
    from barlow_loss._plan import Plan

__all__ = ["HOLDS_DIAGONAL", "products", "value"]

HOLDS_DIAGONAL = True  # ‖C‖² does, and so does C̃ = C


def value(
    ops: Any, plan: Plan, shards: Shards, u: Tensor, diagonal: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """C_ii, parts of ‖C‖², and the matrices that the gradient needs: K1, K2."""
    k1, k2, squares = ops.grams(u, None, plan)
    return diagonal, squares, (k1, k2)


def products(needed: tuple[bool, bool], u: Tensor, k1: Tensor, k2: Tensor) -> tuple[Any, Any]:
    """The factors of P, K2 u1 and K1 u2, and q, which comes out of P; None where no gradient is needed."""
    u1, u2 = u.unbind()
    return (k2, u1, None) if needed[0] else None, (k1, u2, None) if needed[1] else None
