r"""The oracle: the Barlow Twins equation as the paper writes it, differentiated by autograd.

Every optimised path is judged by this file, run in float64, and nothing in the package imports it.
It costs O(N D²) time and several D×D matrices; use :func:`barlow_loss.barlow_twins_loss` for training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ReferenceTerms", "barlow_twins_loss"]


class ReferenceTerms(NamedTuple):
    """``on_diagonal + lambd * off_diagonal == loss``; 0-d tensors in the dtype of the views."""

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor


def _standardize(z: Tensor, eps: float) -> Tensor:
    """ẑ = (z − μ) / √(v + ε), per feature over the batch, v the biased variance."""
    x = z - z.mean(dim=0)
    x = x - x.mean(dim=0)  # at mean 1e4 and std 1e-2, what one subtraction leaves is 1e-10 of the gradient
    v = (x * x).mean(dim=0)
    return x / torch.sqrt(v + eps)


def barlow_twins_loss(z1: Tensor, z2: Tensor, *, lambd: float | Tensor = 0.0051, eps: float = 1e-5) -> ReferenceTerms:
    r"""The loss of Zbontar et al. (2021), equations 1 and 2, term by term, in the dtype of its inputs.

    .. math::
        C = \hat z_1^\top \hat z_2 / N, \qquad
        L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2

    Args:
        z1: the first view's embeddings, (N, D), any floating dtype.
        z2: the second view's embeddings, the same shape and dtype.
        lambd: weight of the off-diagonal sum, ≥ 0.
        eps: added to the biased variance inside the root, ≥ 0.

    Returns:
        The loss and its two sums. All three are differentiable, any number of times.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        >>> barlow_twins_loss(z, z, eps=0.0).loss  # whitened, identical views
        tensor(0., dtype=torch.float64)
    """
    n, d = z1.shape
    c = _standardize(z1, eps).T @ _standardize(z2, eps) / n
    diagonal = torch.eye(d, dtype=torch.bool, device=c.device)
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = c.masked_fill(diagonal, 0).square().sum()
    return ReferenceTerms(on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal)
