"""The loss from the sums of C, and what the gradients of the loss and of its terms mean for those sums.

on = Σ_i (C_ii − τ)²,    off = Σ_{i≠j} C_ij²,    L = on + λ off,    τ = 1 unless ``correction`` is 1

a = ∂/∂on,  b = ∂/∂off  of whatever the caller differentiates:  a = g_L + g_on,  b = λ g_L + g_off
"""

from __future__ import annotations

import functools
from ctypes import c_float
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from barlow_loss._pairs import weights_of_pairs
from barlow_loss._plan import vector_dtype

if TYPE_CHECKING:
    from barlow_loss._plan import Plan

__all__ = ["GradOutputs", "Number", "gradients_of_sums", "loss_terms", "number"]

Number = float | Tensor


class GradOutputs(NamedTuple):
    """The incoming gradients of L, on and off, 0-d; None where a term is not used, but not all three. And λ."""

    loss: Tensor | None
    on_diagonal: Tensor | None
    off_diagonal: Tensor | None
    lambd: float | Tensor


def number(t: Tensor, on_host: bool) -> Number:
    """A 0-d tensor's value where reading it does not synchronise, else the tensor.

    Arithmetic with floats costs nothing, where an operation on a 0-d tensor costs some µs.
    """
    return t.item() if on_host else t


def loss_terms(
    c: Tensor, squares: Tensor, lambd: float | Tensor, includes_diagonal: bool, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """L, on and off, 0-d in ``plan.compute_dtype``, from C_ii, (D,) or (P, D), and parts of Σ C_ij², of any shape.

    Of P pairs of views on and off are the weighted means, and the parts are weighted already.

    Where the parts include the diagonal it is subtracted. What is left is below 0 by rounding only, and clamped; the
    clamp has no gradient.
    """
    if not plan.on_host or c.numel() > 4096:  # in float32 a million squares lose two digits
        c = c.to(vector_dtype(c.device))
    e = c - plan.diagonal_target
    on, total = _sum_of_squares(e, plan), squares.sum()
    off: Number = total.item() if plan.on_host else total
    if includes_diagonal:
        off = off - _sum_of_squares(c, plan)
        off = off.clamp_min(0) if isinstance(off, Tensor) else max(off, 0.0)  # in this order: NaN stays
    dtype = plan.compute_dtype
    scalar = functools.partial(torch.scalar_tensor, dtype=dtype, device=c.device)
    if isinstance(lambd, Tensor) or isinstance(on, Tensor) or isinstance(off, Tensor):
        # Copies: compiled by torch 2.11, an output of a .to() without effect silently loses its gradient.
        on_diagonal, off_diagonal = (
            total.to(dtype, copy=True) if isinstance(total, Tensor) else scalar(total) for total in (on, off)
        )
        return on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal
    if dtype == torch.float32:
        # The bits that tensors would have: in double precision there is room to round a product or a sum once more.
        on, off, lambd = c_float(on).value, c_float(off).value, c_float(lambd).value
        weighted = c_float(lambd * off).value
    else:
        weighted = lambd * off
    return scalar(on + weighted), scalar(on), scalar(off)


def _sum_of_squares(c: Tensor, plan: Plan) -> Number:
    """Σ c² of a vector, or its weighted mean over the pairs of views."""
    if c.ndim == 1:
        total = torch.dot(c, c)
        return total.item() if plan.on_host else total
    of_pairs = c.square().sum(1)
    sums = [number(total, plan.on_host) for total in of_pairs.unbind()]
    return sum(weight * total for weight, total in zip(weights_of_pairs(plan.weights), sums, strict=True))


def gradients_of_sums(grad_outputs: GradOutputs, plan: Plan) -> tuple[Number, Number]:
    """a and b."""
    grad_loss, grad_on, grad_off, lambd = (
        number(given, plan.on_host) if isinstance(given, Tensor) else 0.0 if given is None else given
        for given in grad_outputs
    )
    return grad_loss + grad_on, lambd * grad_loss + grad_off
