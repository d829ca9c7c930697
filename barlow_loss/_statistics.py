"""Per-feature moments of a batch, and the affine map that standardises with them.

A large mean must not eat the variance. Each shard subtracts a pivot close to its mean first, sums in the compute
dtype, and everything that is per feature from there on is float64:

    x = z − pivot,  s₁ = Σₙ x,  s₂ = Σₙ x²,    μ = pivot + s₁/N,  M₂ = s₂ − s₁²/N,  v = M₂/N
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from barlow_loss._plan import vector_dtype

__all__ = ["Moments", "moments_from_sums", "pivot_of", "reciprocal_std", "sample_index"]

_PIVOT_ROWS = 32


class Moments(NamedTuple):
    """Number of values, mean and sum of squared deviations (M₂) of each feature: what Chan's rule combines over shards.

    The mean comes in two parts, whose sum rounds at large means and whose second one does not.
    """

    n: int
    pivot: Tensor  # (…, D) float64
    offset: Tensor  # (…, D) float64, μ − pivot
    m2: Tensor  # (…, D) float64

    @property
    def mean(self) -> Tensor:
        """μ, (…, D) float64."""
        return self.pivot + self.offset


def sample_index(n: int, device: torch.device) -> Tensor:
    """32 indices evenly spaced over 0 … n − 1, so that a batch that is sorted is met as well; n may be symbolic."""
    return torch.arange(_PIVOT_ROWS, device=device) * (n - 1) // (_PIVOT_ROWS - 1)


def pivot_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A value near each column's mean, (…, D) in ``dtype``, from sampled rows (…, R, D).

    Taken relative to the first row, so that for a constant feature z − pivot is exactly 0. If the pivot misses the
    mean by k standard deviations, the variance loses a factor 1 + k² of precision.
    """
    rows = rows.to(dtype)
    first = rows[..., :1, :]
    # The copy fixes the order of the sum: a strided view must give the same bits as its contiguous copy.
    return (first + (rows - first).contiguous().mean(dim=-2, keepdim=True)).squeeze(-2)


def moments_from_sums(n: int, pivot: Tensor, s1: Tensor, s2: Tensor) -> Moments:
    """μ − pivot = s₁/N and M₂ = s₂ − s₁²/N, in float64."""
    dtype = vector_dtype(pivot.device)
    s1 = s1.to(dtype)
    offset = s1 / n
    return Moments(n, pivot.to(dtype), offset, (s2.to(dtype) - s1 * offset).clamp_min(0))


def reciprocal_std(moments: Moments, eps: float) -> Tensor:
    """r = 1/√(v + ε), (…, D) float64, v the biased variance; NaN where v is not finite.

    Without the added 0·v an infinite variance (|z| ≥ 1e19 in float32) would give r = 0: a silent loss of D.
    """
    v = moments.m2 / moments.n
    return torch.rsqrt(v + eps) + 0.0 * v
