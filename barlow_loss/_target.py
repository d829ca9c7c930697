"""A target t of the off-diagonal other than 0: off = Σ_{i≠j} (C_ij − t)², which with t = −1 is the form of HSIC.

C̃ = C − t (11ᵀ − I) takes the place of C in the dual. It has the diagonal of C, so what follows from its sums stays as
it is, and with the row sums s_i = u_i 1 of every view no D×D matrix is needed here either:

    ‖C̃_ij‖² = ‖C_ij‖² − 2t (s_iᵀ s_j − Σ_d c_ij) + t² D (D − 1)
    P_i = Σ_j w_ij u_j C̃_ijᵀ = M_i u_i + t Σ_j w_ij (u_j − s_j 1ᵀ)

Source: Tsai et al. (2021), arXiv 2104.13712.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from barlow_loss._pairs import each, pairs_of
from barlow_loss._plan import vector_dtype

if TYPE_CHECKING:
    from barlow_loss._pairs import Stack
    from barlow_loss._plan import Plan

__all__ = ["moved_product", "moved_squares", "shift"]


def moved_squares(squares: Tensor, u: Stack, diagonal: Tensor, plan: Plan, processes: int = 1) -> Tensor:
    """Σ w ‖C̃‖² from the parts of Σ w ‖C‖², 0-d; of so many processes this one's part of it."""
    t, d, dtype = plan.off_diagonal_target, diagonal.shape[-1], vector_dtype(squares.device)
    sums = [view.sum(1, dtype=dtype) for view in each(u)]
    total = squares.sum(dtype=dtype) + t * t * d * (d - 1) / processes
    for (i, j), c in zip(pairs_of(len(sums)), diagonal.view(-1, d).unbind(), strict=True):
        total = total - 2 * t * plan.weights[i][j] * (torch.dot(sums[i], sums[j]) - c.sum(dtype=dtype))
    return total


def shift(view: int, u: Stack, plan: Plan) -> Tensor | None:
    """What P of a view has beside M u, (N, D) in the dtype of sums; None where t is 0."""
    if not plan.off_diagonal_target:
        return None
    views = each(u)
    mean = torch.zeros_like(views[view], dtype=plan.compute_dtype)
    for other, weight in zip(views, plan.weights[view], strict=True):
        mean.add_(other, alpha=weight)
    return mean.sub_(mean.sum(1, keepdim=True)).mul_(plan.off_diagonal_target)


def moved_product(m: Tensor, u: Tensor, beside: Tensor | None) -> Tensor:
    """M u, and what ``shift`` gives."""
    if beside is None:
        return torch.mm(m, u)
    return beside.addmm_(m, u) if beside.dtype == m.dtype else beside.add_(torch.mm(m, u))
