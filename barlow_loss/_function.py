r"""The two sums of the loss as one differentiable operation, with the gradient written by hand.

Notation: z1, z2 the views, (N, D); ẑ = (z − μ)·r, r = 1/√(v + ε); u = ẑ/√N, so that C = u1ᵀ u2.

    on = Σ_i (C_ii − 1)²,    off = Σ_{i≠j} C_ij²,    a, b = the gradients arriving for on and off

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
from barlow_loss._plan import Plan, autocast_disabled
from barlow_loss._statistics import combine, moments_from_sums, pivot_of, reciprocal_std, sample_index

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["correlation_sums"]

_SECOND_DERIVATIVE = (
    "barlow_twins_loss: second derivatives are not implemented. Take them from the plain autograd version, "
    "barlow_loss.reference.barlow_twins_loss, or detach the first gradient before it is differentiated again."
)


def correlation_sums(z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards) -> tuple[Tensor, Tensor]:
    """Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² of the global batch, 0-d, in ``plan.compute_dtype``."""
    needed = tuple(torch.is_grad_enabled() and z.requires_grad for z in (z1, z2))
    on_diagonal, off_diagonal, *_ = _CorrelationSums.apply(z1, z2, eps, plan, shards, needed)
    return on_diagonal, off_diagonal


def _algorithm(plan: Plan, shards: Shards) -> ModuleType:
    if plan.algorithm == "primal":
        return _primal
    return _dual if shards.group.size == 1 else _dual_sharded


def _forward(
    z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards, needed: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    ops = resolve(plan.backend)
    n, compute = z1.shape[0], plan.compute_dtype
    rows = sample_index(n, z1.device)
    pivot = pivot_of(torch.stack([z.index_select(0, rows) for z in (z1, z2)]), compute)
    x, s1, s2 = ops.centre(z1, z2, pivot)
    shard = moments_from_sums(n, pivot, s1, s2)
    moments = combine(shard, shards.group)
    rho = reciprocal_std(moments, eps) * shards.total**-0.5
    shift = -moments.offset_from(shard.pivot) * rho
    u, diagonal = ops.standardize(x, rho.to(compute), shift.to(compute), plan.matmul_dtype)
    algorithm = _algorithm(plan, shards)
    c, off_diagonal, matrices = algorithm.value(ops, shards, u, diagonal.to(rho.dtype), needed)
    on_diagonal = (c - 1).square().sum()
    # Copies: compiled by torch 2.11, an output of a .to() without effect loses its gradient without a word.
    sums = (total.to(compute, copy=True) for total in (on_diagonal, off_diagonal))
    return *sums, c, rho, u, *matrices


def _gradients(
    a: Tensor, b: Tensor, plan: Plan, shards: Shards, dtype: torch.dtype, needed: tuple[bool, bool], *saved: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    c, rho, u, *matrices = saved
    u1, u2 = u[0], u[1]
    ops, algorithm = resolve(plan.backend), _algorithm(plan, shards)
    with autocast_disabled(c.device.type):
        a, b = all_sum(shards.group, a, b)
        if plan.grad_reduction == "sum":
            a, b = a / shards.group.size, b / shards.group.size
        beta = algorithm.coefficients(a, b, c) * rho
        alpha, beta, gamma = (vector.to(plan.compute_dtype) for vector in (2 * b * rho, beta, beta * c))

        def gradient(view: int, own: Tensor, other: Tensor) -> Tensor | None:
            if not needed[view]:
                return None
            factors, q = algorithm.product(view, u1, u2, *matrices)
            return ops.backproject(factors, q, own, other, alpha[view], beta[view], gamma[view], dtype)

        return gradient(0, u1, u2), gradient(1, u2, u1)


class _CorrelationSums(torch.autograd.Function):
    @staticmethod
    def forward(
        z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards, needed: tuple[bool, bool]
    ) -> tuple[Tensor, ...]:
        # torch.export traces this with gradients on, which the backends, writing into buffers, do not support.
        with torch.no_grad(), autocast_disabled(z1.device.type):
            return _forward(z1, z2, eps, plan, shards, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z1, _, _, plan, shards, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:])
        ctx.plan, ctx.shards, ctx.dtype = plan, shards, z1.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # Of a term that is not used no gradient arrives; on another rank it may, and they are summed.
        nothing = saved[0].new_zeros((), dtype=ctx.plan.compute_dtype)
        a, b = (nothing if grad is None else grad for grad in grads[:2])
        # A compiled graph refuses second derivatives by itself.
        gradients = _gradients if torch.compiler.is_compiling() else _Gradients.apply
        settings = ctx.plan, ctx.shards, ctx.dtype, ctx.needs_input_grad[:2]
        return *gradients(a, b, *settings, *saved), None, None, None, None


class _Gradients(torch.autograd.Function):
    """The backward as an operation of its own, so that differentiating it raises."""

    forward = staticmethod(_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_SECOND_DERIVATIVE)
