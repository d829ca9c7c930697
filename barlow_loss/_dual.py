"""The dual: N×N Gram matrices in place of the D×D cross-correlation. 8 N² D FLOPs forward and backward, O(N²) memory.

With u = ẑ/√N, C = u1ᵀ u2 and K = u uᵀ:

    ‖C‖² = ⟨K1, K2⟩,    Σ_{i≠j} C_ij² = ⟨K1, K2⟩ − Σ_i C_ii²,    u2 Cᵀ = K2 u1,    u1 C = K1 u2

The Frobenius identity is old (Tsai et al., arXiv 2104.13712, equation 4, for HSIC with linear kernels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from barlow_loss._backends import Primitives

__all__ = ["coefficients", "product", "value"]


def value(ops: Primitives, u1: Tensor, u2: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Σ_{i≠j} C_ij², and the matrices that the gradient needs: K1, K2.

    The subtraction can end below 0 by rounding where nothing is left off the diagonal. The reported sum is clamped;
    the gradient is not.
    """
    k1, k2 = ops.gram(u1), ops.gram(u2)
    off_diagonal = ops.frobenius(k1, k2) - c.square().sum()
    return off_diagonal.clamp_min(0), (k1, k2)


def product(view: int, u1: Tensor, u2: Tensor, k1: Tensor, k2: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The factors of P, where C̃ = C: K2 u1 for the first view, K1 u2 for the second; q comes out of P."""
    return ((k2, u1) if view == 0 else (k1, u2)), None


def coefficients(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The diagonal d of M = 2b C̃ + diag(d): C̃ = C holds the diagonal, so its part 2b C_ii is taken out again."""
    return 2 * a * (c - 1) - 2 * b * c
