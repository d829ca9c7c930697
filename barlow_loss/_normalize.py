"""Batch normalisation of (N, C) and (N, C, *) as a differentiable operation, with the gradient written by hand.

Per channel, over its n values, with v the biased variance:

    ẑ = (z − μ)·r,   r = 1/√(v + ε),   y = w·ẑ + b

With g = ∂L/∂y, L summed over the processes that share the batch, and means over the n values of all of them,

    ∂L/∂b = Σ g,   ∂L/∂w = Σ g·ẑ,   ∂L/∂z = w·r·(g − mean(g) − ẑ·mean(g·ẑ))

ẑ is not saved: x = z − pivot loses nothing, so ẑ = (x − offset)·r, offset = μ − pivot, comes back from z, which the
layer before keeps anyhow, and vectors. y and ∂L/∂z are then affine maps with one coefficient per channel for each term.
Over several processes Σ g and Σ g·ẑ for ∂L/∂z are sums over the ranks, while ∂L/∂w and ∂L/∂b stay this rank's part,
which the training wrapper adds up as it does with every parameter's gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from barlow_loss._collectives import TRANSFORMS, Group, all_reduce_sum, only_alone
from barlow_loss._plan import autocast_disabled, is_batched, is_transformed, vector_dtype, without_tangent
from barlow_loss._statistics import (
    Moments,
    at_least_one,
    combine,
    moments_from_sums,
    pivot_of,
    reciprocal_std,
    sample_index,
)

__all__ = ["normalize", "normalize_with", "values_per_channel"]


def normalize(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
) -> tuple[Tensor, Moments]:
    """w·ẑ + b in the dtype of z, with the statistics of the group's batch; and those statistics, not differentiable."""
    with autocast_disabled(z.device.type):
        if is_transformed(z, *[t for t in (weight, bias) if t is not None]):
            only_alone("normalisation", group, TRANSFORMS)
            return _plain(z, weight, bias, eps)
        y, *statistics = _BatchNormalize.apply(z, weight, bias, eps, group)
    return y, _moments(z, statistics)


def _plain(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """The same in differentiable torch operations, for the transforms that the operation below does not know."""
    n, dims = values_per_channel(z), [0, *range(2, z.ndim)]
    wide = z.to(_compute_dtype(z))
    mean = wide.mean(dims, keepdim=True)
    x = wide - mean
    more = x.mean(dims, keepdim=True)
    x = x - more
    m2 = x.square().sum(dims)
    moments = Moments(n, mean.flatten(), more.flatten(), m2)
    y = x * _per_channel(_scaled(reciprocal_std(moments, eps), weight), z)
    y = y if bias is None else y + _per_channel(bias, z)
    return y.to(z.dtype), Moments(n, *map(without_tangent, moments[1:]))


def normalize_with(given: Moments, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """w·ẑ + b with statistics that do not depend on z; the mean goes first, so that a large one is harmless."""
    with autocast_disabled(z.device.type):
        x = z - _per_channel(given.mean, z)  # promotes a 16-bit z
        r = reciprocal_std(given._replace(m2=given.m2.to(vector_dtype(z.device))), eps)
        shift = r.new_zeros(1) if bias is None else bias
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(_scaled(r, weight), x)).to(z.dtype)


def values_per_channel(z: Tensor) -> int:
    """The n of the equations."""
    return z.shape[0] * math.prod(z.shape[2:])


class _BatchNormalize(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group) -> tuple[Tensor, ...]:
        x, pivot, batch = _center(z, group)
        scale = _scaled(reciprocal_std(batch, eps), weight)
        shift = -scale * batch.offset_from(pivot)
        if bias is not None:
            shift = shift + bias
        y = _add_product(_per_channel(shift, x), x, scale, buffer=x)
        # Compiled by torch 2.11, an output of out= or of a .to() without effect silently loses its gradient.
        count = (batch.n,) if isinstance(batch.n, Tensor) else ()
        return y if y.dtype == z.dtype else y.to(z.dtype), batch.pivot, batch.offset, batch.m2, *count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, weight, bias, ctx.eps, ctx.group = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(z, weight, *statistics)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the second derivative needs the statistics as functions of z.
            x, pivot, batch = _center(z, ctx.group)
        else:
            batch = _moments(z, statistics)
            pivot = batch.pivot
            x = z - _per_channel(pivot, z)
        r, offset = reciprocal_std(batch, ctx.eps), batch.offset_from(pivot)
        g = grad_outputs[0].to(x.dtype)
        sum_g = _sum(g).to(r.dtype)
        sum_gz = (_sum(g * x).to(r.dtype) - offset * sum_g) * r  # Σ g·ẑ
        grad_z = None
        if ctx.needs_input_grad[0]:
            all_g, all_gz = all_reduce_sum(ctx.group, sum_g, sum_gz)
            of_g = _scaled(r, weight)
            n = at_least_one(batch.n)
            of_x = -of_g * r * all_gz / n
            rest = -of_g * all_g / n - of_x * offset
            grad_z = _add_product(_per_channel(rest, x), x, of_x, buffer=x)
            grad_z = _add_product(grad_z, g, of_g, buffer=x).to(z.dtype)
        grad_weight = None if weight is None else sum_gz.to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else sum_g.to(ctx.bias_dtype)
        return grad_z, grad_weight, grad_bias, None, None


def _moments(z: Tensor, statistics: list[Tensor]) -> Moments:
    """From the vectors that the operation returns, and n: returned too where other processes add to it."""
    pivot, offset, m2, *count = statistics
    return Moments(count[0] if count else values_per_channel(z), pivot, offset, m2)


def _center(z: Tensor, group: Group) -> tuple[Tensor, Tensor, Moments]:
    """This process's values relative to their own pivot, x = z − pivot, that pivot, and the moments of the batch."""
    pivot = pivot_of(_spread_rows(z.detach()), _compute_dtype(z))
    x = z - _per_channel(pivot, z)  # promotes a 16-bit z
    shard = moments_from_sums(values_per_channel(z), pivot, _sum(x), _sum(x * x))
    return x, shard.pivot, combine(shard, group)


def _spread_rows(z: Tensor) -> Tensor:
    """A few rows (·, C) for the pivot, evenly spaced over samples and positions."""
    index = sample_index(values_per_channel(z), z.device)
    if z.ndim == 2:
        return z[index]
    maps = z.flatten(2)
    positions = maps.shape[2]
    return maps[index // positions, :, index % positions]


def _per_channel(vector: Tensor, z: Tensor) -> Tensor:
    """(C,) in the compute dtype of z, and in a shape that broadcasts against it."""
    return vector.to(_compute_dtype(z)).view(-1, *[1] * (z.ndim - 2))


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _add_product(base: Tensor, x: Tensor, factor: Tensor, buffer: Tensor) -> Tensor:
    """The sum base + x·factor, the factor per channel; written into the buffer unless something records the graph."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_batched(base, x)
    return torch.addcmul(base, x, _per_channel(factor, x), out=None if recorded else buffer)


def _scaled(r: Tensor, weight: Tensor | None) -> Tensor:
    return r if weight is None else r * weight


def _sum(x: Tensor) -> Tensor:
    """Over everything but the channels: (N, C, *) to (C,)."""
    return x.sum(dim=[0, *range(2, x.ndim)])
