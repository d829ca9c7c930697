"""Diagnostics: what the embeddings of the views say about agreement, redundancy and collapse. No gradients.

Nothing here is differentiable. With several processes everything is about the batch of all, and all of them call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn import functional

from barlow_loss._collectives import Shards, all_reduce_matrix
from barlow_loss._header import MustMatch, check_samples
from barlow_loss._normalize import normalize
from barlow_loss._pairs import pairs_of
from barlow_loss._plan import autocast_disabled
from barlow_loss._ranks import alpha_req, effective_rank, lidar
from barlow_loss._report import CollapseReport, PairReports
from barlow_loss._rows import agreed, rows_of_all
from barlow_loss._validation import check_eps, check_views, check_weight
from barlow_loss.loss import barlow_twins_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CollapseReport",
    "PairReports",
    "alpha_req",
    "collapse_report",
    "cross_correlation",
    "effective_rank",
    "lidar",
    "noise_floor",
]


@overload
def cross_correlation(
    z1: Tensor,
    z2: Tensor,
    *,
    eps: float = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
) -> Tensor: ...


@overload
def cross_correlation(
    z1: Tensor,
    z2: Tensor,
    *others: Tensor,
    eps: float = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
) -> Any: ...


@torch.no_grad()
def cross_correlation(
    z1: Tensor,
    z2: Tensor,
    *others: Tensor,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
) -> Tensor | dict[tuple[int, int], Tensor]:
    """The cross-correlation matrix of two views: C = ẑ1ᵀ ẑ2 / N with ẑ = (z − μ)/√(v + ε), v the biased variance.

    The matrix that the loss draws to the identity, for looking at; of more views that of every pair. It costs 2 N D²
    FLOPs and D² numbers, which the loss itself avoids where N ≤ D/2.

    Args:
        z1: the first view's embeddings of this process, (n, D), any floating dtype; N ≥ 2 rows on all processes.
        z2: the second view's embeddings, the same shape, dtype and device.
        *others: those of more views.
        eps: added to the variance inside the root, ≥ 0.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False takes this process's rows alone.

    Returns:
        C of the global batch, (D, D), every entry in [−1, 1]: float64 for float64 views, else float32, under autocast
        too; the same bits on every process. It carries no gradient. Of more than two views a dict: (i, j) with i < j,
        counted from 0, to the C of that pair.

    Raises:
        TypeError: views that are not floating tensors of one dtype, or ``eps`` that is not a number.
        ValueError: views of different or wrong shapes or devices, N < 2, D = 0, a negative ``eps``, or arguments that
            differ among the processes. Every process raises it.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> cross_correlation(z, z, eps=0.0)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Zbontar et al. (2021), arXiv 2103.03230, equation 2.
    """
    views = z1, z2, *others
    shards = _agreed("cross_correlation", views, process_group, synchronize, eps=eps)
    wide = torch.promote_types(views[0].dtype, torch.float32)
    with autocast_disabled(views[0].device.type):
        hat = [normalize(z.to(wide), None, None, eps, shards.group)[0] for z in views]
        found = {
            (i, j): all_reduce_matrix(shards.group, hat[i].T @ hat[j]) / shards.total for i, j in pairs_of(len(views))
        }
    return found if len(views) > 2 else found[0, 1]


def noise_floor(n: int, d: int) -> float:
    """The off-diagonal sum of embeddings that carry no common structure: Σ_{i≠j} C_ij² ≈ D(D − 1)/(N − 1).

    Over N samples two unrelated features still correlate by chance, by 1/√(N − 1) in the root mean square. Random
    embeddings have this sum even where both views are identical, so no loss is 0, and its λ-fold is what a loss
    "around 1,300" at N = 256, D = 8192 consists of. Training can go below, by fitting the batch.

    Args:
        n: samples in the batch, ≥ 2.
        d: features, ≥ 1.

    Returns:
        The expected sum, ≥ 0; exact for Gaussian features and eps = 0.

    Raises:
        ValueError: n < 2 or d < 1.

    Example:
        >>> round(0.0051 * noise_floor(n=256, d=8192))
        1342

    Source: the squared sample correlation of two independent Gaussian variables is Beta(1/2, (N − 2)/2) distributed,
    whose mean is 1/(N − 1).
    """
    if n < 2 or d < 1:
        raise ValueError(f"noise_floor: expected n ≥ 2 samples and d ≥ 1 features, got n={n} and d={d}.")
    return d * (d - 1) / (n - 1)


@overload
def collapse_report(
    z1: Tensor,
    z2: Tensor,
    *,
    lambd: float = ...,
    eps: float = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
) -> CollapseReport: ...


@overload
def collapse_report(
    z1: Tensor,
    z2: Tensor,
    *others: Tensor,
    lambd: float = ...,
    eps: float = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
) -> Any: ...


@torch.no_grad()
def collapse_report(
    z1: Tensor,
    z2: Tensor,
    *others: Tensor,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
) -> CollapseReport | PairReports:
    """Measure agreement, redundancy and collapse of the views' embeddings; print the result for a table.

    Computed in float64. Time and memory are linear in D for D > N, cubic in min(N, D) for the rank. Several processes
    gather the rows of all, and each measures the global batch. It waits for the device: call it now and then, not in
    every step.

    Args:
        z1: the first view's embeddings of this process, (n, D), any floating dtype; N ≥ 2 rows on all processes.
        z2: the second view's embeddings, the same shape, dtype and device.
        *others: those of more views.
        lambd: λ of the loss, ≥ 0.
        eps: ε of the loss, ≥ 0.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False reports on this process's rows alone; then one process may call it and the others not.

    Returns:
        A :class:`CollapseReport` of plain numbers, the same on every process. Of more than two views
        :class:`~barlow_loss.PairReports`: one of each pair, and the worst by name.

    Raises:
        TypeError: views that are not floating tensors of one dtype, or a setting of the wrong type.
        ValueError: views of different or wrong shapes or devices, N < 2, D = 0, a negative setting, or
            arguments that differ among the processes. Every process raises it.

    Example:
        >>> z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> report = collapse_report(z, z)
        >>> report.dead_features, round(report.mean_diagonal, 3)
        (0, 1.0)
        >>> print(report.verdict)
        No sign of collapse; as decorrelated as a batch of this size can show.
        >>> collapse_report(z, z, -z).worst
        (0, 2)

    Source: the loss of Zbontar et al. (2021), arXiv 2103.03230; RankMe of Garrido et al. (2023), arXiv 2210.02885;
    alignment of Wang & Isola (2020), arXiv 2005.10242, with α = 2.
    """
    views = z1, z2, *others
    shards = _agreed("collapse_report", views, process_group, synchronize, eps=eps, lambd=lambd)
    dtype = views[0].dtype
    whole = [rows_of_all(shards, z) for z in views]
    ranks = [effective_rank(z, center=True, synchronize=False) for z in whole]
    reports = {
        (i, j): _report((whole[i], whole[j]), (ranks[i], ranks[j]), dtype, float(lambd), float(eps))
        for i, j in pairs_of(len(views))
    }
    return PairReports(reports) if len(views) > 2 else reports[0, 1]


def _report(
    z: tuple[Tensor, Tensor], ranks: tuple[float, float], dtype: torch.dtype, lambd: float, eps: float
) -> CollapseReport:
    """Of two views in float64, which came in ``dtype``."""
    n, d = z[0].shape
    means = torch.stack([view.mean(dim=0) for view in z])
    x1, x2 = (view - mean for view, mean in zip(z, means, strict=True))
    variances = torch.stack([x.square().mean(dim=0) for x in (x1, x2)])
    stds = variances.sqrt()
    diagonal = (x1 * x2).mean(dim=0) * torch.rsqrt(variances + eps).prod(dim=0)
    dead = (variances <= eps) | (stds <= torch.finfo(dtype).eps * means.abs())
    terms = barlow_twins_loss(
        x1, x2, lambd=lambd, eps=eps, algorithm="dual" if d > n else "primal", synchronize=False, return_terms=True
    )
    off_diagonal = terms.off_diagonal.item()
    return CollapseReport(
        n=n,
        d=d,
        lambd=lambd,
        eps=eps,
        loss=terms.loss.item(),
        loss_noise_floor=lambd * noise_floor(n, d),
        on_diagonal=terms.on_diagonal.item(),
        off_diagonal=off_diagonal,
        off_diagonal_noise_floor=noise_floor(n, d),
        mean_diagonal=diagonal.mean().item(),
        off_diagonal_rms=math.sqrt(off_diagonal / max(d * (d - 1), 1)),
        off_diagonal_rms_noise_floor=(n - 1) ** -0.5,
        dead_features=int(dead.any(dim=0).sum().item()),
        **_std_quantiles(stds),
        effective_rank_1=ranks[0],
        effective_rank_2=ranks[1],
        alignment=_alignment(*z),
    )


def _agreed(
    caller: str, views: tuple[Tensor, ...], process_group: ProcessGroup | None, synchronize: bool, **settings: float
) -> Shards:
    """Check views and settings, on every process of the group."""

    def check() -> MustMatch:
        check_views(caller, *views)
        check_eps(caller, settings["eps"])
        check_weight(caller, "lambd", settings.get("lambd", 0.0), 0.0051)
        return {name: float(value) for name, value in settings.items()}

    shards = agreed(caller, views, process_group, synchronize, check)
    check_samples(caller, views[0], shards)
    return shards


def _std_quantiles(stds: Tensor) -> dict[str, float]:
    names = ("std_min", "std_p10", "std_median", "std_p90", "std_max")
    quantiles = torch.quantile(stds.flatten(), stds.new_tensor([0.0, 0.1, 0.5, 0.9, 1.0]))
    return dict(zip(names, (quantile.item() for quantile in quantiles), strict=True))


def _alignment(z1: Tensor, z2: Tensor) -> float:
    """The mean over pairs of |z1/|z1| − z2/|z2||²."""
    difference = functional.normalize(z1, dim=1) - functional.normalize(z2, dim=1)
    return difference.square().sum(dim=1).mean().item()
