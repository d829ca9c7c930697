r"""The loss and its two sums as one differentiable operation, with the gradient written by hand.

Notation: z1, z2 the views, (N, D); ẑ = (z − μ)·r, r = 1/√(v + ε); u = ẑ/√N, so that C = u1ᵀ u2.

    on = Σ_i (C_ii − 1)²,    off = Σ_{i≠j} C_ij²,    a, b = ∂/∂on, ∂/∂off of what is differentiated (``_penalty``)

Derivation. M = ∂L/∂C is M_ij = 2b C_ij off the diagonal and M_ii = 2a (C_ii − 1) on it. Both algorithms write it as
M = 2b C̃ + diag(d), with C̃ = C (dual) or C without its diagonal (primal). Then ∂L/∂u1 = u2 Mᵀ = 2b P + d·u2 with
P = u2 C̃ᵀ, and through the standardisation, whose mean term vanishes because the columns of u2 are centred,

    ∂L/∂z1 = ρ ⊙ (2b P + d·u2 − (2b q + d·C_ii)·u1),    ρ = r/√N,    q_i = Σ_n u1_ni P_ni = Σ_j C̃_ij C_ij
           = α P + β u2 − (α q + γ) u1,                   α = 2b ρ,    β = d ρ,    γ = β C_ii

and the same with the views exchanged and C̃ transposed. Each view costs one matrix product, P, and none is D×D in the
dual. The gradient of a view that needs none is not computed.

Over several processes z1, z2 are this rank's rows, everything above is about the rows of all ranks, and the sums over n
are completed in the forward, by collectives that stand in the algorithms' files and in ``_statistics.combine``; then
every rank has what the gradient of its rows needs. On each rank L is a function of all rows, so the adjoint of a row
sums what arrives on all ranks: a = Σ_ranks a_r, b = Σ_ranks b_r, two numbers, the only collective of the backward. It
is W times the gradient of one process where all a_r are alike, and DDP's mean over the ranks makes that the gradient.

Saved: u of both views, the matrices of the algorithm, diag C and ρ. They are outputs of the operation, so that the
intermediate values stay connected: a second derivative reaches them and raises, instead of being silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss import _dual, _dual_sharded, _primal
from barlow_loss._backends import resolve
from barlow_loss._collectives import Shards, all_sum
from barlow_loss._penalty import Arriving, slopes
from barlow_loss._plan import Plan, autocast_disabled
from barlow_loss._statistics import combine, moments_from_sums, pivot_of, reciprocal_std, sample_index

if TYPE_CHECKING:
    from types import ModuleType

    from barlow_loss._backends import Primitives

__all__ = ["loss_and_sums"]

_SECOND_DERIVATIVE = (
    "barlow_twins_loss: second derivatives are not implemented. Take them from the plain autograd version, "
    "barlow_loss.reference.barlow_twins_loss, or detach the first gradient before it is differentiated again."
)


def loss_and_sums(
    z1: Tensor, z2: Tensor, lambd: float | Tensor, eps: float, plan: Plan, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """L, Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² of the global batch, 0-d, in ``plan.compute_dtype``."""
    needed = tuple(torch.is_grad_enabled() and z.requires_grad for z in (z1, z2))
    if isinstance(lambd, Tensor):
        lambd = lambd.to(z1.device, plan.compute_dtype)
    loss, on_diagonal, off_diagonal, *_ = _Loss.apply(z1, z2, lambd, eps, plan, shards, needed)
    return loss, on_diagonal, off_diagonal


def _algorithm(plan: Plan, shards: Shards) -> ModuleType:
    if plan.algorithm == "primal":
        return _primal
    return _dual if shards.group.size == 1 else _dual_sharded


def _standardized(
    ops: Primitives, z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """u, this process's part of C_ii, and ρ."""
    if shards.group.size == 1 and ops.whiten is not None:
        return ops.whiten(z1, z2, eps, plan.matmul_dtype)
    n, compute = z1.shape[0], plan.compute_dtype
    rows = sample_index(n, z1.device)
    pivot = pivot_of(torch.stack([z.index_select(0, rows) for z in (z1, z2)]), compute)
    x, s1, s2 = ops.centre(z1, z2, pivot)
    shard = moments_from_sums(n, pivot, s1, s2)
    moments = combine(shard, shards.group)
    rho = reciprocal_std(moments, eps) * shards.total**-0.5
    shift = -moments.offset_from(shard.pivot) * rho
    u, diagonal = ops.standardize(x, rho.to(compute), shift.to(compute), plan.matmul_dtype)
    return u, diagonal.to(rho.dtype), rho


def _gradients(
    of_loss: Tensor | None,
    of_on: Tensor | None,
    of_off: Tensor | None,
    lambd: float | Tensor,
    plan: Plan,
    shards: Shards,
    n: int,
    dtype: torch.dtype,
    needed: tuple[bool, bool],
    *saved: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    c, rho, u, *matrices = saved
    ops, algorithm = resolve(plan.backend), _algorithm(plan, shards)
    products = [algorithm.product(view, u[0], u[1], *matrices) if needed[view] else None for view in (0, 1)]
    with autocast_disabled(c.device.type):
        arriving = _summed(Arriving(of_loss, of_on, of_off, lambd), plan, shards)
        settings = arriving, algorithm.HOLDS_DIAGONAL, n, dtype
        return ops.backproject((products[0], products[1]), u, c, rho, *settings)


def _summed(arriving: Arriving, plan: Plan, shards: Shards) -> Arriving:
    """What arrives on all ranks, as gradients of the two sums."""
    if shards.group.size == 1:
        return arriving
    a, b = all_sum(shards.group, *slopes(arriving))
    if plan.grad_reduction == "sum":
        a, b = a / shards.group.size, b / shards.group.size
    return Arriving(None, a, b, arriving.lambd)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        z1: Tensor,
        z2: Tensor,
        lambd: float | Tensor,
        eps: float,
        plan: Plan,
        shards: Shards,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        # torch.export traces this with gradients on, which the backends, writing into buffers, do not support.
        with torch.no_grad(), autocast_disabled(z1.device.type):
            ops, algorithm = resolve(plan.backend), _algorithm(plan, shards)
            u, diagonal, rho = _standardized(ops, z1, z2, eps, plan, shards)
            c, squares, matrices = algorithm.value(ops, shards, u, diagonal, needed)
            terms = ops.penalties(c, squares, lambd, algorithm.HOLDS_DIAGONAL, plan.compute_dtype)
            return *terms, c, rho, u, *matrices

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z1, _, lambd, _, plan, shards, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.lambd = None if isinstance(lambd, Tensor) else lambd
        weight = (lambd,) if isinstance(lambd, Tensor) else ()
        ctx.save_for_backward(*output[2:], *weight)
        ctx.plan, ctx.shards, ctx.n, ctx.dtype = plan, shards, z1.shape[0], z1.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        off_diagonal, *saved = ctx.saved_tensors
        of_loss, of_on, of_off = grads[:3]
        if of_loss is of_on is of_off is None:  # on another rank there may be one, and they are summed
            of_loss = torch.zeros_like(off_diagonal)
        lambd = saved.pop() if ctx.lambd is None else ctx.lambd
        # A compiled graph refuses second derivatives by itself.
        gradients = _gradients if torch.compiler.is_compiling() else _Gradients.apply
        settings = lambd, ctx.plan, ctx.shards, ctx.n, ctx.dtype, ctx.needs_input_grad[:2]
        of_lambd = of_loss * off_diagonal if ctx.needs_input_grad[2] and of_loss is not None else None
        return *gradients(of_loss, of_on, of_off, *settings, *saved), of_lambd, None, None, None, None


class _Gradients(torch.autograd.Function):
    """The backward as an operation of its own, so that differentiating it raises."""

    forward = staticmethod(_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_SECOND_DERIVATIVE)
