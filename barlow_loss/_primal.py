"""The primal: the D×D cross-correlation itself, as the paper writes it. 6 N D² FLOPs forward and backward, O(D²) memory.

With u = ẑ/√N and C̃ = u1ᵀ u2 with its diagonal set to zero (the diagonal is summed elementwise, more precisely):

    Σ_{i≠j} C_ij² = ‖C̃‖²
"""

from __future__ import annotations

from torch import Tensor

from barlow_loss._backends import Primitives

__all__ = ["coefficients", "factors", "value"]


def value(ops: Primitives, u1: Tensor, u2: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Σ_{i≠j} C_ij², and the matrix that the gradient needs: C̃."""
    correlation = ops.correlate(u1, u2)
    correlation.diagonal().zero_()
    return ops.frobenius(correlation, correlation), (correlation,)


def factors(view: int, u1: Tensor, u2: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of u2 C̃ᵀ for the first view, of u1 C̃ for the second."""
    return (u2, correlation.T) if view == 0 else (u1, correlation)


def coefficients(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The diagonal d of M = 2b C̃ + diag(d)."""
    return 2 * a * (c - 1)
