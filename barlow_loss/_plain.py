"""The loss in differentiable torch operations: exact and slower, where the one operation of ``_function`` cannot go.

These are the transforms of torch.func, forward-mode derivatives, torch.jit.trace, and second derivatives. The notation
is that of ``_function``; the dual stays linear in D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._pairs import pairs_of
from barlow_loss._plan import autocast_disabled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from barlow_loss._plan import Plan

__all__ = ["gradients", "loss_and_sums", "second_derivative"]


def loss_and_sums(
    views: Sequence[Tensor], lambd: float | Tensor, eps: float, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """L, Σ_i (C_ii − τ)² and Σ_{i≠j} (C_ij − t)² of one process, 0-d, in ``plan.compute_dtype``; means over pairs."""
    with autocast_disabled(views[0].device.type):
        u = [_scaled(z.to(plan.compute_dtype), eps) for z in views]
        squares = _squares_dual(u, plan) if plan.algorithm == "dual" else _squares_primal(u, plan)
        on = off = u[0].new_zeros(())
        for (i, j), (diagonal, square) in squares.items():
            on = on + plan.weights[i][j] * (diagonal - plan.diagonal_target).square().sum()
            off = off + plan.weights[i][j] * square
        off = off + (off.clamp_min(0) - off).detach()  # below 0 by rounding only; no gradient
        return on + lambd * off, on, off


def _scaled(z: Tensor, eps: float) -> Tensor:
    """u = x/√(Σ x² + N ε), x centred twice; NaN where the sum is not finite. N may be a tensor of torch.jit.trace."""
    x = z - z.mean(0)
    x = x - x.mean(0)
    t = x.square().sum(0) + z.shape[0] * eps
    return x * (t.rsqrt() + 0.0 * t)


def _squares_dual(u: list[Tensor], plan: Plan) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """C_ii and Σ_{i≠j} (C_ij − t)² of every pair of views, from the Gram matrices and row sums of each."""
    t, d = plan.off_diagonal_target, u[0].shape[1]
    k, s = [torch.mm(view, view.t()) for view in u], [view.sum(1) for view in u]
    squares: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i, j in pairs_of(len(u)):
        c = (u[i] * u[j]).sum(0)
        square = (k[i] * k[j]).sum() - c.square().sum()
        squares[i, j] = c, square - 2 * t * ((s[i] * s[j]).sum() - c.sum()) + t * t * d * (d - 1) if t else square
    return squares


def _squares_primal(u: list[Tensor], plan: Plan) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    squares: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i, j in pairs_of(len(u)):
        c = torch.mm(u[i].t(), u[j])
        diagonal = torch.eye(len(c), dtype=torch.bool, device=c.device)
        squares[i, j] = c.diagonal(), (c - plan.off_diagonal_target).masked_fill(diagonal, 0).square().sum()
    return squares


def gradients(
    grad_outputs: Sequence[Tensor | None],
    lambd: float | Tensor,
    views: Sequence[Tensor],
    needs_grad: Sequence[bool],
    eps: float,
    plan: Plan,
    *,
    recorded: bool = False,
) -> tuple[Tensor | None, ...]:
    """∂L/∂z of the views that need it, from the incoming gradients of L, on and off, in one process."""
    with torch.enable_grad(), autocast_disabled(views[0].device.type):
        leaves = [_alias(z, wanted, recorded) for z, wanted in zip(views, needs_grad, strict=True)]
        terms = loss_and_sums(leaves, lambd, eps, plan)
        given = [(term, gradient) for term, gradient in zip(terms, grad_outputs, strict=True) if gradient is not None]
        outputs, seeds = zip(*given, strict=True)
        asked = [z for z, wanted in zip(leaves, needs_grad, strict=True) if wanted]
        found = iter(torch.autograd.grad(outputs, asked, seeds, create_graph=recorded))
    return tuple(next(found) if wanted else None for wanted in needs_grad)


def second_derivative(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    needs_grad: Sequence[bool],
    eps: float,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """The derivatives of Σ grads · ∂L/∂z by those of the inputs that are wanted.

    inputs: the incoming gradients of L, on and off, then λ, then the views.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_disabled(inputs[4].device.type):
        used = [_alias(x, w, recorded) if isinstance(x, Tensor) else x for x, w in zip(inputs, wanted, strict=True)]
        first = gradients(used[:3], used[3], used[4:], needs_grad, eps, plan, recorded=True)
        outputs = [
            (g, arrived) for g, arrived in zip(first, grads, strict=True) if g is not None and arrived is not None
        ]
        found = iter(
            torch.autograd.grad(
                [g for g, _ in outputs],
                [x for x, w in zip(used, wanted, strict=True) if w],
                [arrived for _, arrived in outputs],
                create_graph=recorded,
                materialize_grads=True,
            )
        )
    return tuple(next(found) if w else None for w in wanted)


def _alias(x: Tensor, wanted: bool, recorded: bool) -> Tensor:
    """A tensor to differentiate by: by x itself autograd would go on to what x was made of, another view perhaps."""
    return x.view_as(x) if recorded and x.requires_grad else x.detach().requires_grad_(wanted)
