"""The oracle: the Barlow Twins equation as the paper writes it, differentiated by autograd; and its relatives.

Every optimised path is judged by this file, run in float64, and nothing in the package imports it.
It costs O(N D²) time and several D×D matrices; use :func:`barlow_loss.barlow_twins_loss` for training.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MixedReferenceTerms",
    "ReferenceTerms",
    "VICRegReferenceTerms",
    "barlow_twins_loss",
    "mixed_barlow_twins_loss",
    "vicreg_loss",
]


class ReferenceTerms(NamedTuple):
    """``on_diagonal + lambd * off_diagonal == loss``; 0-d tensors in the dtype of the views."""

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor


def _standardize(z: Tensor, eps: float, correction: int = 0) -> Tensor:
    """ẑ = (z − μ) / √(v + ε), per feature over the batch, v the biased variance, or with N − correction."""
    x = z - z.mean(dim=0)
    x = x - x.mean(dim=0)  # at mean 1e4 and std 1e-2, what one subtraction leaves is 1e-10 of the gradient
    v = (x * x).sum(dim=0) / (len(z) - correction)
    return x / torch.sqrt(v + eps)


def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    lambd: float | Tensor = 0.0051,
    eps: float = 1e-5,
    off_diagonal_target: float = 0.0,
    correction: int = 0,
) -> ReferenceTerms:
    """The loss of Zbontar et al. (2021), equations 1 and 2, term by term, in the dtype of its inputs.

    ::

        C = ẑ1ᵀ ẑ2/N,    L = Σ_i (C_ii − 1)² + λ Σ_{i≠j} (C_ij − t)²

    Args:
        z1: the first view's embeddings, (N, D), any floating dtype.
        z2: the second view's embeddings, the same shape and dtype.
        lambd: weight of the off-diagonal sum, ≥ 0.
        eps: added to the biased variance inside the root, ≥ 0.
        off_diagonal_target: t; 0 in the paper, −1 in the form of HSIC (arXiv 2104.13712).
        correction: the variance divides by N − correction.

    Returns:
        The loss and its two sums. All three are differentiable, any number of times.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        >>> barlow_twins_loss(z, z, eps=0.0).loss  # whitened, identical views
        tensor(0., dtype=torch.float64)
    """
    n, d = z1.shape
    c = _standardize(z1, eps, correction).T @ _standardize(z2, eps, correction) / n
    diagonal = torch.eye(d, dtype=torch.bool, device=c.device)
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = (c - off_diagonal_target).masked_fill(diagonal, 0).square().sum()
    return ReferenceTerms(on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal)


class VICRegReferenceTerms(NamedTuple):
    """``λ * invariance + μ * variance + ν * covariance == loss``; 0-d tensors in the dtype of the views."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_loss(
    *views: Tensor,
    invariance: float | Tensor = 25.0,
    variance: float | Tensor = 25.0,
    covariance: float | Tensor = 1.0,
    eps: float = 1e-4,
) -> VICRegReferenceTerms:
    """The loss of Bardes et al. (2022) as their program has it, term by term, in the dtype of its inputs.

    ::

        s = ‖Z − Z'‖²/(N D),    v(Z) = 1/D Σ_d max(0, 1 − √(Var_d + ε)),    c(Z) = 1/D Σ_{i≠j} Cov(Z)_ij²

    Args:
        *views: two or more views' embeddings, (N, D), any floating dtype.
        invariance: weight of s, the mean over all pairs of views.
        variance: weight of v, the mean over the views.
        covariance: weight of c, twice the mean over the views.
        eps: added to the unbiased variance inside the root, ≥ 0.

    Returns:
        The loss and its three terms. All four are differentiable, any number of times.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        >>> vicreg_loss(z, z).loss  # equal views, no covariance, standard deviations above 1
        tensor(0., dtype=torch.float64)
    """
    n, d = views[0].shape
    pairs = list(itertools.combinations(views, 2))
    s = torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
    centered = [z - z.mean(dim=0) for z in views]
    centered = [x - x.mean(dim=0) for x in centered]
    variances = torch.stack([x.square().sum(dim=0) for x in centered]) / (n - 1)
    v = torch.relu(1 - torch.sqrt(variances + eps)).mean()
    diagonal = torch.eye(d, dtype=torch.bool, device=views[0].device)
    off_diagonals = [(x.T @ x / (n - 1)).masked_fill(diagonal, 0).square().sum() for x in centered]
    c = 2 * torch.stack(off_diagonals).mean() / d
    return VICRegReferenceTerms(invariance * s + variance * v + covariance * c, s, v, c)


class MixedReferenceTerms(NamedTuple):
    """``on_diagonal + lambd * (off_diagonal + mix_scale * mixture) == loss``; 0-d, in the dtype of the views."""

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor
    mixture: Tensor


def mixed_barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    z_mixed: Tensor,
    alpha: float | Tensor,
    permutation: Tensor,
    *,
    lambd: float | Tensor = 0.0051,
    mix_scale: float | Tensor = 5.0,
    eps: float = 1e-5,
) -> MixedReferenceTerms:
    """The loss of Bandara et al. (2023), term by term, in the dtype of its inputs.

    ::

        R = Σ_{v=1,2} ‖ ẑ_mᵀ ẑ_v/N − (α ẑ_1 + (1 − α) ẑ_2[π])ᵀ ẑ_v/N ‖²,    L = L_BT + λ · mix_scale · R

    Args:
        z1: the first view's embeddings, (N, D), any floating dtype.
        z2: the second view's embeddings, the same shape and dtype.
        z_mixed: the embeddings of the mixed samples α x1 + (1 − α) x2[π], the same shape and dtype.
        alpha: α, the share of the first view.
        permutation: π, (N,) indices.
        lambd: λ, weight of the off-diagonal sum.
        mix_scale: weight of R, times λ.
        eps: added to the biased variance inside the root, ≥ 0.

    Returns:
        The loss and its three sums. All four are differentiable, any number of times.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        >>> mixed_barlow_twins_loss(z, z, z, 0.3, torch.arange(4), eps=0.0).loss  # nothing is mixed
        tensor(0., dtype=torch.float64)
    """
    n = z1.shape[0]
    _, on_diagonal, off_diagonal = barlow_twins_loss(z1, z2, lambd=lambd, eps=eps)
    u1, u2, um = (_standardize(z, eps) for z in (z1, z2, z_mixed))
    target = alpha * u1 + (1 - alpha) * u2[permutation]
    mixture = torch.stack([(um.T @ u / n - target.T @ u / n).square().sum() for u in (u1, u2)]).sum()
    return MixedReferenceTerms(
        on_diagonal + lambd * off_diagonal + mix_scale * lambd * mixture, on_diagonal, off_diagonal, mixture
    )
