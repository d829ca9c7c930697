"""A backend is a module that offers the primitives below: the stretches of work between two global sums.

Column sums | standardise and diagonal | Gram matrices or cross-correlation | penalty | back-projection. The algorithms
in ``_primal.py``, ``_dual.py`` and ``_dual_sharded.py`` are written once over these functions and import no backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from barlow_loss._backends import eager

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from barlow_loss._penalty import Arriving

    Product = tuple[tuple[Tensor, ...], Tensor | None]

__all__ = ["Primitives", "Product", "resolve"]


class Primitives(Protocol):
    """u stands for the scaled standardised features ẑ/√N of both views, (2, N, D): C = u1ᵀ u2 and K = u uᵀ.

    A backend may fill up N and D of u, and of the matrices made from it, with zeros; vectors of D numbers it does not.
    """

    @property
    def whiten(self) -> Callable[[Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor, Tensor]] | None:
        """For one process: u in the dtype given, diag(u1ᵀ u2) before the rounding and ρ = r/√N from z1, z2 and ε.

        None where that is ``centre``, the moments and ``standardize`` in turn.
        """
        ...

    def centre(self, z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[Any, Tensor, Tensor]:
        """What ``standardize`` takes for x = z − pivot; Σₙ x and Σₙ x² of both views, (2, D)."""
        ...

    def standardize(self, x: Any, scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """u = x·scale + shift in ``matmul_dtype``, over x if it can, and diag(u1ᵀ u2) before the rounding."""
        ...

    def grams(self, u: Tensor, every: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """This process's rows of K1 and K2, and ⟨K1, K2⟩ over them in parts, of any shape.

        every: the rows of all processes, (N, D) of each view, in which K has (n, N); None: u has them all.
        """
        ...

    def project(self, k: Tensor, every: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """P = K U from this process's rows of K, and Σₙ u_own ∘ P: (n, N), (N, D), (n, D) to (n, D), (D,)."""
        ...

    def correlate(self, u1: Tensor, u2: Tensor) -> Tensor:
        """C = u1ᵀ u2: (N, D), (N, D) to (D, D)."""
        ...

    def squared_sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Row sums and column sums of C∘C: (D, D) to (D,), (D,)."""
        ...

    def penalties(
        self, c: Tensor, squares: Tensor, lambd: float | Tensor, holds_diagonal: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L, on and off: see ``_penalty.penalties``."""
        ...

    def backproject(
        self,
        products: tuple[Product | None, Product | None],
        u: Tensor,
        c: Tensor,
        rho: Tensor,
        arriving: Arriving,
        holds_diagonal: bool,
        n: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:
        """α P + β u_other − (α q + γ) u_own of either view, (n, D) in ``dtype``; None where its product is None.

        α = 2b ρ, β = d ρ, γ = β C_ii, d = 2a (C_ii − 1), or 2a (C_ii − 1) − 2b C_ii where C̃ holds the diagonal. P is
        the product of the factors; where q is None it is Σₙ u_own ∘ P.
        """
        ...


def resolve(backend: str) -> Primitives:
    """The module behind a resolved backend name. Only the choice of Triton imports triton."""
    if backend == "triton":
        from barlow_loss._backends import triton

        return triton
    assert backend == "eager", backend
    return eager
