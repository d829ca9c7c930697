"""The three terms of VICReg as one differentiable operation, with the gradient written by hand.

Notation: z_1 … z_V the views, (N, D); x = z − μ of each view; var = Σ_n x²/(N − 1); σ = √(var + ε);
Cov = xᵀx/(N − 1); e_i = z_i − (z_1 + … + z_V)/V, a view's deviation from the mean of the views.

    s = mean over pairs of ‖z_i − z_j‖²/(N D) = 2/((V − 1) N D) Σ_i ‖e_i‖²
    v = mean over views of 1/D Σ_d max(0, 1 − σ_d)
    c = 2 · mean over views of 1/D Σ_{i≠j} Cov_ij²

Derivation. With a, b, γ = ∂/∂s, ∂/∂v, ∂/∂c of what is differentiated,

    ∂s/∂z_i = 4/((V − 1) N D) e_i,    since the e_i sum to 0
    ∂v/∂x = −1/(V D (N − 1)) [σ < 1]/σ ⊙ x
    ∂c/∂x = 2/(V D) · 4/(N − 1) x C̃,    C̃ = Cov without its diagonal

and ∂/∂z of the last two is ∂/∂x itself: its mean over the batch is 0, because the columns of x are centred. In the dual
x Cov = K x with K = xxᵀ/(N − 1), and x C̃ = K x − var ⊙ x. So each view costs one Gram matrix and one product.

Over several processes z_i are this rank's rows and everything above is about the rows of all ranks. The sums over n are
completed in the forward. Three numbers are summed in the backward, the incoming gradients of s, v and c.

Saved: the views, x, var and the matrices of ``_gram_norm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._collectives import all_reduce_sum
from barlow_loss._gram_norm import differentiated_once, own_norm, own_product, sum_grad_outputs
from barlow_loss._plan import applied, autocast_disabled, vector_dtype
from barlow_loss._statistics import Moments, at_least_one, combine, pivot_of, sample_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barlow_loss._gram_norm import Batch

__all__ = ["invariance_variance_covariance"]

_BLOCK_ELEMENTS = 2**17


def invariance_variance_covariance(batch: Batch, eps: float, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, v and c of the global batch, 0-d: float64 for float64 views, else float32."""
    recorded = torch.is_grad_enabled()
    needs_grad = tuple(recorded and z.requires_grad for z in views)
    s, v, c, *_ = applied(_Terms, True in needs_grad, batch, eps, needs_grad, *views)
    return s, v, c


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(batch: Batch, eps: float, needs_grad: tuple[bool, ...], *views: Tensor) -> tuple[Tensor, ...]:
        """The three terms, var of every view, x of every view, and what the gradient of c needs of each."""
        # torch.export traces this with gradients on, which writing into buffers does not support.
        with torch.no_grad(), autocast_disabled(views[0].device.type):
            dtype = torch.promote_types(views[0].dtype, torch.float32)
            n, d, count = batch.shards.total, views[0].shape[1], len(views)
            x, variances = _centered(batch, dtype, views)
            off_diagonals, kept = _covariances(batch, needs_grad, x, variances)
            s = _invariance(batch, dtype, views) * (2 / ((count - 1) * n * d))
            v = (1 - (variances + eps).sqrt()).clamp_min(0).mean()
            c = torch.stack(off_diagonals).mean() * (2 / d)
            # Copies: compiled by torch 2.11, an output of a .to() without effect silently loses its gradient.
            return *(term.to(dtype, copy=True) for term in (s, v, c)), variances, *x, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.batch, ctx.eps, ctx.needs_grad, *views = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:], *views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        c, variances, *saved = ctx.saved_tensors
        count = len(ctx.needs_grad)
        x, kept, views = saved[:count], saved[count:-count], saved[-count:]

        def compute() -> tuple[Tensor | None, ...]:
            gradients_of_sums = sum_grad_outputs(ctx.batch, c, *grads[:3])
            with autocast_disabled(c.device.type):
                return _gradients(ctx.batch, ctx.eps, ctx.needs_grad, gradients_of_sums, variances, x, kept, views)

        return None, None, None, *differentiated_once(ctx.batch.caller, c, compute)


def _centered(batch: Batch, dtype: torch.dtype, views: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    """x = z − μ of every view, (n, D), and its variance over the rows of all processes, (V, D), unbiased.

    A value near the mean goes first, so that a large mean costs no digits, and the mean of what is left after it. What
    is summed is contiguous, so that the order of a sum, and with it the bits, does not depend on the strides given.
    """
    n = views[0].shape[0]
    sampled = sample_index(n, views[0].device)
    pivots = [pivot_of(z.index_select(0, sampled), dtype) for z in views]
    x = [(z - pivot).contiguous() for z, pivot in zip(views, pivots, strict=True)]
    offsets = [rows.sum(0) / at_least_one(n) for rows in x]
    for rows, offset in zip(x, offsets, strict=True):
        rows.sub_(offset)
    m2 = torch.stack([_column_squares(batch, rows) for rows in x])
    wide = [vector.to(vector_dtype(m2.device)) for vector in (torch.stack(pivots), torch.stack(offsets), m2)]
    if not batch.alone:
        shard = Moments(n, *wide)
        moments = combine(shard, batch.shards.group)
        shifts = (shard.offset - moments.offset_from(shard.pivot)).to(dtype)
        for rows, shift in zip(x, shifts, strict=True):
            rows.add_(shift)
        wide[2] = moments.m2
    return x, wide[2] / (batch.shards.total - 1)


def _column_squares(batch: Batch, x: Tensor) -> Tensor:
    """Σ_n x², (D,); on CPU by blocks of rows, whose squares stay in the cache."""
    n, d = x.shape
    if not batch.on_host or n * d <= _BLOCK_ELEMENTS:
        return x.square().sum(0)
    height = _BLOCK_ELEMENTS // d + 1
    squares = x.new_empty((height, d))
    total = x.new_zeros(d)
    for start in range(0, n, height):
        rows = x[start : start + height]
        total += torch.mul(rows, rows, out=squares[: rows.shape[0]]).sum(0)
    return total


def _covariances(
    batch: Batch, needs_grad: tuple[bool, ...], x: list[Tensor], variances: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Σ_{i≠j} Cov_ij² of every view, and what its gradient needs."""
    scale = 1 / (batch.shards.total - 1)
    found = [
        own_norm(batch, wanted, rows, variance, scale)
        for wanted, rows, variance in zip(needs_grad, x, variances, strict=True)
    ]
    return [norm for norm, _ in found], [kept for _, kept in found]


def _invariance(batch: Batch, dtype: torch.dtype, views: tuple[Tensor, ...]) -> Tensor:
    """Σ_i ‖e_i‖² over the rows of all processes."""
    wide = vector_dtype(views[0].device)
    if len(views) == 2:
        own = (views[0].to(dtype) - views[1]).contiguous().square_().sum().to(wide) / 2
    else:
        own = torch.stack([e.contiguous().square_().sum().to(wide) for e, _ in _deviations(dtype, views)]).sum()
    return all_reduce_sum(batch.shards.group, own)[0]


def _deviations(dtype: torch.dtype, views: list[Tensor] | tuple[Tensor, ...]) -> Iterator[tuple[Tensor, float]]:
    """Every e_i as a tensor and a factor; relative to the first view: what all have in common costs no digits."""
    first = views[0].to(dtype)
    if len(views) == 2:
        difference = first - views[1]
        yield from ((difference, 0.5), (difference, -0.5))
        return
    mean = torch.zeros_like(first)
    for z in views[1:]:
        mean.add_(z - first)
    mean.div_(len(views))
    for z in views:
        yield (z - first).sub_(mean), 1.0


def _gradients(
    batch: Batch,
    eps: float,
    needs_grad: tuple[bool, ...],
    gradients_of_sums: tuple[Tensor, ...],
    variances: Tensor,
    x: list[Tensor],
    kept: list[Tensor],
    views: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """∂/∂z of every view, (n, D), in its dtype; None where it needs none."""
    n, d, count = batch.shards.total, views[0].shape[1], len(views)
    a, b, gamma = gradients_of_sums
    of_deviation = a * (4 / ((count - 1) * n * d))
    of_product = gamma * (8 / (count * d * (n - 1)))
    sigma = (variances + eps).sqrt()
    hinges = b * (-1 / (count * d * (n - 1))) * (sigma < 1) / sigma
    gradients: list[Tensor | None] = []
    deviations = _deviations(x[0].dtype, views)
    for view, (deviation, factor) in enumerate(deviations):
        if not needs_grad[view]:
            gradients.append(None)
            continue
        product, of_x = own_product(batch, of_product, x[view], variances[view], kept[view])
        product.addcmul_(x[view], (of_x + hinges[view]).to(product.dtype))
        product.addcmul_(deviation, of_deviation * factor)
        gradients.append(product.to(views[view].dtype))
    return tuple(gradients)
