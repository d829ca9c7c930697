r"""The loss and its two sums as one differentiable operation, with the gradient written by hand.

Notation, of two views: z1, z2, (N, D); ẑ = (z − μ)·r, r = 1/√(v + ε); u = ẑ/√N, so that C = u1ᵀ u2.

    on = Σ_i (C_ii − 1)²,    off = Σ_{i≠j} C_ij²,    a, b = ∂/∂on, ∂/∂off of what is differentiated (``_loss_terms``)

Derivation. M = ∂L/∂C is M_ij = 2b C_ij off the diagonal and M_ii = 2a (C_ii − 1) on it. Both algorithms write it as
M = 2b C̃ + diag(d), with C̃ = C (dual) or C without its diagonal (primal). Then ∂L/∂u1 = u2 Mᵀ = 2b P + d·u2 with
P = u2 C̃ᵀ, and through the standardisation, whose mean term vanishes because the columns of u2 are centred,

    ∂L/∂z1 = ρ ⊙ (2b P + d·u2 − (2b q + d·C_ii)·u1),    ρ = r/√N,    q_i = Σ_n u1_ni P_ni = Σ_j C̃_ij C_ij
           = α P + β u2 − (α q + γ) u1,                   α = 2b ρ,    β = d ρ,    γ = β C_ii

and the same with the views exchanged and C̃ transposed. Each view costs one matrix product, P, and none is D×D in the
dual. The gradient of a view that needs none is not computed.

An off-diagonal target t, off = Σ_{i≠j} (C_ij − t)², moves C̃ by −t off its diagonal; all else stays (``_target``).

Of more than two views L is the mean over pairs with weights w_ij, Σ_{i<j} w_ij = 1. With c_ij = diag C_ij and
d_ij = w_ij d of the pair, and P and q the sums over the pairs of view i that the algorithms make,

    ∂L/∂z_i = ρ_i ⊙ (2b P_i + Σ_j d_ij·u_j − (2b q_i + Σ_j d_ij·c_ij)·u_i)

Over several processes z1, z2 are this rank's rows, everything above is about the rows of all ranks, and the sums over n
are completed in the forward, by the collectives in the algorithms' files and in ``_statistics.combine``; then every
rank has what the gradient of its rows needs. On each rank L is a function of all rows, so the adjoint of a row sums the
incoming gradients of all ranks: a = Σ_ranks a_r, b = Σ_ranks b_r, two numbers, the only collective of the backward. It
is W times the gradient of one process where all a_r are alike, and DDP's mean over the ranks makes that the gradient.

Saved: u of all views, the matrices of the algorithm, diag C and ρ; and, for a second derivative, the views that need a
gradient. It is that of the plain formula in ``_plain``. Over several processes it raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from barlow_loss import _dual, _dual_sharded, _plain, _primal
from barlow_loss._backends import resolve
from barlow_loss._collectives import TRANSFORMS, Shards, all_reduce_sum, only_alone
from barlow_loss._loss_terms import GradOutputs, gradients_of_sums
from barlow_loss._pairs import each
from barlow_loss._plan import Plan, applied, autocast_disabled, is_batched, is_traced, is_transformed

__all__ = ["loss_and_sums"]


def loss_and_sums(
    views: tuple[Tensor, ...], lambd: float | Tensor, eps: float, plan: Plan, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """L, Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² of the global batch, 0-d, in ``plan.compute_dtype``; means over pairs."""
    recorded = torch.is_grad_enabled()
    needs_grad: tuple[bool, ...] = ()
    for z in views:
        needs_grad += (recorded and z.requires_grad,)
    if isinstance(lambd, Tensor):
        lambd = lambd.to(views[0].device, plan.compute_dtype)
    if is_traced(*views):
        if is_transformed(*views, *((lambd,) if isinstance(lambd, Tensor) else ())):
            only_alone("barlow_twins_loss", shards.group, TRANSFORMS)
            return _plain.loss_and_sums(views, lambd, eps, plan)
        of_lambd = recorded and isinstance(lambd, Tensor) and lambd.requires_grad
        differentiated = of_lambd or True in needs_grad
        outputs = applied(_TracedLoss, differentiated, lambd, eps, plan, shards, needs_grad, *views)
    else:
        operation: Any = _Loss
        outputs = operation.apply(lambd, eps, plan, shards, needs_grad, *views)
    loss, on_diagonal, off_diagonal, *_ = outputs
    return loss, on_diagonal, off_diagonal


def _algorithm(plan: Plan, shards: Shards) -> Any:
    if plan.algorithm == "primal":
        return _primal
    return _dual if shards.group.size == 1 else _dual_sharded


def _value(
    lambd: float | Tensor, eps: float, plan: Plan, shards: Shards, needs_grad: tuple[bool, ...], *views: Tensor
) -> tuple[Tensor, ...]:
    """The three terms, then what is saved."""
    with autocast_disabled(views[0].device.type):
        ops, algorithm = resolve(plan.backend), _algorithm(plan, shards)
        u, diagonal, rho = ops.standardize(views, eps, plan, shards)
        c, squares, matrices = algorithm.value(ops, plan, shards, u, diagonal, needs_grad)
        terms = ops.loss_terms(c, squares, lambd, algorithm.INCLUDES_DIAGONAL, plan)
        return *terms, c, rho, *((u,) if isinstance(u, Tensor) else u), *matrices


def _gradients(
    grad_loss: Tensor | None,
    grad_on: Tensor | None,
    grad_off: Tensor | None,
    lambd: float | Tensor,
    needs_grad: tuple[bool, ...],
    plan: Plan,
    shards: Shards,
    n: int,
    dtype: torch.dtype,
    c: Tensor,
    rho: Tensor,
    *kept: Tensor,
) -> tuple[Tensor | None, ...]:
    views = len(needs_grad)
    u, matrices = (kept[0], kept[1:]) if views == 2 else (kept[:views], kept[views:])
    with autocast_disabled(c.device.type):
        if plan.on_host and is_traced(*(given for given in (grad_loss, grad_on, grad_off) if given is not None)):
            plan = plan._replace(on_host=False)  # of a forward that was not, as in compiled autograd
        ops, algorithm = resolve(plan.backend), _algorithm(plan, shards)
        products = algorithm.products(needs_grad, plan, u, *matrices)
        grad_outputs = GradOutputs(grad_loss, grad_on, grad_off, lambd)
        if shards.group.size > 1:
            grad_outputs = _summed(grad_outputs, plan, shards)
        holds = algorithm.INCLUDES_DIAGONAL
        gradients: tuple[Tensor | None, ...] = ops.input_gradients(
            products, u, c, rho, grad_outputs, holds, plan, n, dtype
        )
    return gradients


def _summed(grad_outputs: GradOutputs, plan: Plan, shards: Shards) -> GradOutputs:
    """The incoming gradients of all ranks, as gradients of the two sums."""
    given = next(gradient for gradient in grad_outputs[:3] if gradient is not None)
    own = (torch.zeros_like(given) + slope for slope in gradients_of_sums(grad_outputs, plan._replace(on_host=False)))
    a, b = all_reduce_sum(shards.group, *own)
    if plan.grad_reduction == "sum":
        a, b = a / shards.group.size, b / shards.group.size
    return GradOutputs(None, a, b, grad_outputs.lambd)


class _Loss(torch.autograd.Function):
    """The operation in plain eager mode: three outputs, and what is saved beside them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _value(*inputs)
        _save(ctx, inputs, output)
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)  # not by a starred name, of which torch 2.11 traces a tuple, without ``pop``
        off_diagonal = saved.pop(0)
        grad_loss, grad_on, grad_off, *_ = grads
        if grad_loss is grad_on is grad_off is None:  # on another rank there may be one, and they are summed
            grad_loss = torch.zeros_like(off_diagonal)
        given = [saved.pop() for wanted in ctx.kept if wanted]
        lambd = saved.pop() if ctx.lambd is None else ctx.lambd
        needs_grad = ctx.needs_input_grad
        settings = needs_grad[5:], *ctx.settings
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which refuses it by itself
            first = saved, *settings
            views = _views(ctx, given, saved)
            gradients = _Gradients.apply(grad_loss, grad_on, grad_off, lambd, ctx.eps, first, *views)
        elif is_batched(grad_loss, grad_on, grad_off):
            plan, shards, *_ = ctx.settings
            only_alone("barlow_twins_loss", shards.group, "batched gradients")
            views = _views(ctx, given, saved)
            gradients = _plain.gradients((grad_loss, grad_on, grad_off), lambd, views, needs_grad[5:], ctx.eps, plan)
        else:
            gradients = _gradients(grad_loss, grad_on, grad_off, lambd, *settings, *saved)
        of_lambd = grad_loss * off_diagonal if needs_grad[0] and grad_loss is not None else None
        return of_lambd, None, None, None, None, *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    lambd, eps, plan, shards, needs_grad, *views = inputs
    weight = (lambd,) if isinstance(lambd, Tensor) else ()
    ctx.set_materialize_grads(False)
    ctx.lambd = None if weight else lambd
    ctx.eps, ctx.kept = eps, needs_grad
    ctx.settings = plan, shards, views[0].shape[0], views[0].dtype
    kept: tuple[Tensor, ...] = ()  # for a second derivative; the last one first, as ``pop`` takes them
    for z, wanted in zip(views, needs_grad, strict=True):
        if wanted:
            kept = z, *kept
    ctx.save_for_backward(*output[2:], *weight, *kept)


def _views(ctx: Any, given: list[Tensor], saved: list[Tensor]) -> list[Tensor]:
    """The views, of those without a gradient the centred values u/ρ in their place: they may have changed since."""
    _, rho, *kept = saved
    _, _, n, _ = ctx.settings
    u = each(kept[0]) if len(ctx.kept) == 2 else kept[: len(ctx.kept)]
    rows, rest = rho.view(len(u), 1, -1), iter(given)
    centered = [u_i[:n, : rows.shape[2]] / row for u_i, row in zip(u, rows, strict=True)]
    return [next(rest) if wanted else x for wanted, x in zip(ctx.kept, centered, strict=True)]


class _TracedLoss(torch.autograd.Function):
    """The same where it is traced: what is saved must be an output there."""

    @staticmethod
    def forward(lambd: Any, eps: float, plan: Plan, shards: Shards, needs_grad: Any, *views: Tensor) -> Any:
        # torch.export traces this with gradients on, which the backends, writing into buffers, do not support.
        with torch.no_grad():
            return _value(lambd, eps, plan, shards, needs_grad, *views)

    setup_context = staticmethod(_save)
    backward = staticmethod(_Loss.backward)


class _Gradients(torch.autograd.Function):
    """The backward where it is recorded: the same bits, and a derivative of its own."""

    @staticmethod
    def forward(
        grad_loss: Tensor | None,
        grad_on: Tensor | None,
        grad_off: Tensor | None,
        lambd: Any,
        eps: float,
        first: Any,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:
        saved, *settings = first
        return _gradients(grad_loss, grad_on, grad_off, lambd, *settings, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *grad_outputs_and_lambd, ctx.eps, first = inputs[:6]
        _, ctx.needs_grad, ctx.plan, ctx.shards, *_ = first
        ctx.set_materialize_grads(False)
        ctx.numbers = [None if isinstance(given, Tensor) else (given,) for given in grad_outputs_and_lambd]
        ctx.save_for_backward(*[given for given in grad_outputs_and_lambd if isinstance(given, Tensor)], *inputs[6:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        only_alone("barlow_twins_loss", ctx.shards.group, "second derivatives")
        saved = iter(ctx.saved_tensors)
        inputs = (*[next(saved) if number is None else number[0] for number in ctx.numbers], *saved)
        wanted = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[6:])
        found = _plain.second_derivative(grads, inputs, wanted, ctx.needs_grad, ctx.eps, ctx.plan)
        return *found[:4], None, None, *found[4:]
