"""A backend is a module that offers the primitives below: the stretches of work between two global sums.

Column sums | standardise and diagonal | Gram matrix or cross-correlation | penalty | back-projection. The algorithms
in ``_primal.py`` and ``_dual.py`` are written once over these functions and import no backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from barlow_loss._backends import eager

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Primitives", "resolve"]


class Primitives(Protocol):
    """u stands for the scaled standardised features ẑ/√N of both views, (2, N, D): C = u1ᵀ u2 and K = u uᵀ."""

    def centre(self, z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x = z − pivot of both views, (2, N, D), Σₙ x and Σₙ x², (2, D), in the dtype of the pivot, (2, D)."""
        ...

    def standardize(self, x: Tensor, scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """u = x·scale + shift in ``matmul_dtype``, over x if it can, and diag(u1ᵀ u2) before the rounding."""
        ...

    def gram(self, u: Tensor) -> Tensor:
        """K = u uᵀ of one view: (N, D) to (N, N)."""
        ...

    def gram_rows(self, u: Tensor, every: Tensor) -> Tensor:
        """This rank's rows of K = U Uᵀ: (n, D), (N, D) to (n, N)."""
        ...

    def project(self, k: Tensor, every: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """P = K U from this rank's rows of K, and Σₙ u_own ∘ P: (n, N), (N, D), (n, D) to (n, D), (D,)."""
        ...

    def correlate(self, u1: Tensor, u2: Tensor) -> Tensor:
        """C = u1ᵀ u2: (N, D), (N, D) to (D, D)."""
        ...

    def frobenius(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨A, B⟩ = Σ A_ij B_ij, 0-d."""
        ...

    def squared_sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Row sums and column sums of C∘C: (D, D) to (D,), (D,)."""
        ...

    def backproject(
        self,
        factors: tuple[Tensor, ...],
        q: Tensor | None,
        own: Tensor,
        other: Tensor,
        alpha: Tensor,
        beta: Tensor,
        gamma: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """α P + β u_other − (α q + γ) u_own in ``dtype``, P the product of the factors; q None: Σₙ u_own ∘ P."""
        ...


def resolve(backend: str) -> Primitives:
    """The module behind a resolved backend name."""
    assert backend == "eager", backend
    return eager
