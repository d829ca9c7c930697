"""Per-feature moments of a batch, and the affine map that standardises with them.

A large mean must not cancel the variance. Each shard subtracts a pivot close to its mean first, sums in the compute
dtype, and everything that is per feature from there on is float64:

    x = z − pivot,  s₁ = Σₙ x,  s₂ = Σₙ x²,    μ = pivot + s₁/N,  M₂ = s₂ − s₁²/N,  v = M₂/N

Over several processes Chan's rule combines the moments of the shards, relative to a pivot that all of them share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from barlow_loss._collectives import Group, Shards, all_reduce_max, all_reduce_sum
from barlow_loss._plan import vector_dtype

__all__ = [
    "Moments",
    "at_least_one",
    "combine",
    "moments_from_sums",
    "pivot_of",
    "reciprocal_std",
    "sample_index",
    "scale_and_shift",
]

_PIVOT_ROWS = 32


class Moments(NamedTuple):
    """Number of values, mean and sum of squared deviations (M₂) of each feature.

    The mean comes in two parts, whose sum rounds at large means and whose second one does not.
    """

    n: int | Tensor  # 0-d float64 where it is a sum over processes
    pivot: Tensor  # (…, D) float64
    offset: Tensor  # (…, D) float64, μ − pivot
    m2: Tensor  # (…, D) float64

    @property
    def mean(self) -> Tensor:
        """μ, (…, D) float64."""
        return self.pivot + self.offset

    def offset_from(self, pivot: Tensor) -> Tensor:
        """μ − pivot for another pivot close by, (…, D) float64, without the rounding of μ."""
        return self.pivot - pivot + self.offset


def sample_index(n: int, device: torch.device) -> Tensor:
    """32 indices evenly spaced over 0 … n − 1, so that a batch that is sorted is met as well; n may be symbolic."""
    return torch.arange(_PIVOT_ROWS if n else 0, device=device) * (n - 1) // (_PIVOT_ROWS - 1)


def pivot_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A value near each column's mean, (…, D) in ``dtype``, from sampled rows (…, R, D).

    Taken relative to the first row, so that for a constant feature z − pivot is exactly 0. If the pivot misses the
    mean by k standard deviations, the variance loses a factor 1 + k² of precision. Without rows it is 0.
    """
    rows = rows.to(dtype)
    if rows.shape[-2] == 0:
        return rows.sum(dim=-2)
    first = rows[..., :1, :]
    # The copy fixes the order of the sum: a strided view must give the same bits as its contiguous copy.
    return (first + (rows - first).contiguous().mean(dim=-2, keepdim=True)).squeeze(-2)


def at_least_one(n: int | Tensor) -> int | Tensor:
    """n, to divide by: the sums over no value are 0, and so are their means."""
    return n.clamp_min(1) if isinstance(n, Tensor) else n or 1


def moments_from_sums(n: int | Tensor, pivot: Tensor, s1: Tensor, s2: Tensor) -> Moments:
    """μ − pivot = s₁/N and M₂ = s₂ − s₁²/N, in float64; both 0 for N = 0."""
    dtype = vector_dtype(pivot.device)
    s1 = s1.to(dtype)
    offset = s1 / at_least_one(n)
    return Moments(n, pivot.to(dtype), offset, (s2.to(dtype) - s1 * offset).clamp_min(0))


def combine(shard: Moments, group: Group) -> Moments:
    """The moments of the global batch from those of this process's shard: Chan's rule, in float64.

        N = Σ_w n_w,    μ − p = Σ_w n_w m_w / N,    M₂ = Σ_w (M₂_w + n_w m_w²) − N (μ − p)²,    m_w = μ_w − p

    p is the largest pivot of the shards, which is computable without knowing which shards are empty. It lies within the
    spread of the shards' means, so the subtraction costs float64 little, and a feature that is the same constant
    everywhere has m_w = 0 exactly. Every rank ends with the same bits.
    """
    if group.size == 1:
        return shard
    lowest = torch.full_like(shard.pivot, -torch.inf)
    pivot = all_reduce_max(group, shard.pivot.detach() if shard.n else lowest)
    pivot = torch.where(pivot == lowest, 0.0, pivot)  # every shard is empty
    n, m = shard.n, shard.offset_from(pivot)
    total, s1, s2 = all_reduce_sum(group, n * torch.ones_like(m.flatten()[:1]), n * m, shard.m2 + n * m.square())
    return moments_from_sums(total.squeeze(0), pivot, s1, s2)


def reciprocal_std(moments: Moments, eps: float) -> Tensor:
    """r = 1/√(v + ε), (…, D) float64, v the biased variance; NaN where v is not finite.

    Without the added 0·v an infinite variance (|z| ≥ 1e19 in float32) would give r = 0: a silent loss of D.
    """
    v = moments.m2 / at_least_one(moments.n)
    return torch.rsqrt(v + eps) + 0.0 * v


def scale_and_shift(shard: Moments, eps: float, shards: Shards) -> tuple[Tensor, Tensor]:
    """ρ = r/√N and shift = −(μ − pivot)·ρ of the global batch, (…, D) float64.

    u = (z − pivot)·ρ + shift, with the shard's own pivot.
    """
    moments = combine(shard, shards.group)
    rho = reciprocal_std(moments, eps) * shards.total**-0.5
    return rho, -moments.offset_from(shard.pivot) * rho
