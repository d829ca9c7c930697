"""The loss from the sums of C, and what the gradients of the loss and of its terms mean for those sums.

on = Σ_i (C_ii − 1)²,    off = Σ_{i≠j} C_ij²,    L = on + λ off

a = ∂/∂on,  b = ∂/∂off  of whatever the caller differentiates:  a = g_L + g_on,  b = λ g_L + g_off
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Arriving", "penalties", "slopes"]


class Arriving(NamedTuple):
    """The gradients that arrive for L, on and off, 0-d, None where a term is not used, but not all; and λ."""

    loss: Tensor | None
    on_diagonal: Tensor | None
    off_diagonal: Tensor | None
    lambd: float | Tensor


def penalties(
    c: Tensor, squares: Tensor, lambd: float | Tensor, holds_diagonal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """L, on and off, 0-d in ``dtype``, from C_ii, (D,), and parts of Σ C_ij², of any shape.

    Where the parts hold the diagonal it is taken off: below 0 only by rounding, where nothing is left. The gradient
    knows nothing of that clamp.
    """
    on_diagonal, off_diagonal = (c - 1).square().sum(), squares.sum()
    if holds_diagonal:
        off_diagonal = (off_diagonal - c.square().sum()).clamp_min(0)
    # Copies: compiled by torch 2.11, an output of a .to() without effect loses its gradient without a word.
    on_diagonal, off_diagonal = (total.to(dtype, copy=True) for total in (on_diagonal, off_diagonal))
    return on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal


def slopes(arriving: Arriving) -> tuple[Tensor, Tensor]:
    """a and b."""
    nothing = torch.zeros_like(next(gradient for gradient in arriving[:3] if gradient is not None))
    of_loss, of_on, of_off = (nothing if gradient is None else gradient for gradient in arriving[:3])
    return of_loss + of_on, arriving.lambd * of_loss + of_off
