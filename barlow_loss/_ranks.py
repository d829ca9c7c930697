"""How many directions embeddings use, and how fast their spectrum decays: numbers that need no label."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from barlow_loss._header import MustMatch, check_samples
from barlow_loss._rows import agreed, rows_of_all
from barlow_loss._validation import check_flags, check_tensor, check_views, two_dimensions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["alpha_req", "effective_rank", "lidar"]

_linalg: Any = torch.linalg  # its functions have no complete types


@torch.no_grad()
def effective_rank(
    z: Tensor, *, center: bool = False, process_group: ProcessGroup | None = None, synchronize: bool = True
) -> float:
    """RankMe: how many directions the embeddings really use, a smooth rank.

    ::

        p_k = σ_k / Σ_j σ_j,    rank = exp(−Σ_k p_k log p_k)

    with the singular values σ of the N×D matrix z. The paper adds 1e-7 to p against log 0; here 0·log 0 = 0, and
    singular values that float64 cannot tell from 0 are 0. The smaller of the two Gram matrices is decomposed, in
    float64: 2·N·D·min(N, D) FLOPs and a symmetric eigenvalue problem of size min(N, D).

    Args:
        z: embeddings of this process, (n, D) with D ≥ 1 and N ≥ 1 rows on all processes, any floating dtype.
        center: subtract the mean of each feature first, as the loss does. False is RankMe as published, in which a
            large common mean counts as a direction, and hides the others.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False takes this process's rows alone.

    Returns:
        Between 1 and min(N, D), or min(N − 1, D) if centred; 0 if all (centred) embeddings are 0; NaN if a value is
        not finite. It grows with N: compare only values of the same N.

    Raises:
        TypeError: ``z`` is not a floating tensor.
        ValueError: ``z`` is not (N, D) with N, D ≥ 1, or arguments differ among the processes. Every process raises it.

    Example:
        >>> round(effective_rank(torch.eye(4)), 6)
        4.0
        >>> round(effective_rank(torch.ones(4, 3)), 6)
        1.0

    Source: Garrido et al. (2023), arXiv 2210.02885, equation 1, after the effective rank of Roy & Vetterli (2007).
    """

    def check() -> MustMatch:
        check_flags("effective_rank", center=center)
        _check_matrix("effective_rank", z)
        return {"center": center}

    shards = agreed("effective_rank", [z], process_group, synchronize, check)
    if shards.total == 0:
        raise ValueError(f"effective_rank: expected N ≥ 1 samples, got z of shape {tuple(z.shape)}. Pass a batch.")
    x = rows_of_all(shards, z)
    if center:
        x = x - x.mean(dim=0)
    largest = x.abs().max()
    if not largest.isfinite():
        return math.nan
    return _perplexity(_squares(x).sqrt()) if largest > 0 else 0.0


@torch.no_grad()
def lidar(
    *views: Tensor, delta: float = 1e-4, process_group: ProcessGroup | None = None, synchronize: bool = True
) -> float:
    """LiDAR: how many directions tell the samples apart, measured by how much the views of one sample differ.

    ::

        p_k = λ_k / Σ_j λ_j,    LiDAR = exp(−Σ_k p_k log p_k)

    with the eigenvalues λ of S_w^{-1/2} S_b S_w^{-1/2}. Each sample is a class of its q views: with μ_i their mean and
    μ the mean of all, S_b = Σ_i (μ_i − μ)(μ_i − μ)ᵀ/(N − 1) and S_w = Σ_iv (z_iv − μ_i)(z_iv − μ_i)ᵀ/(N (q − 1)) + δ I.

    Directions that differ between views as much as between samples count little, which :func:`effective_rank` cannot
    see. The more views the better: of two, S_w has rank N only, and δ stands for the rest. Random embeddings have a
    high value, too, and the embeddings' size cancels but for δ: look at :func:`~barlow_loss.collapse_report` as well.

    Against log 0 the paper adds an ε, and stable-pretraining 0.1.8 adds 1e-8 to every λ, so that embeddings that are
    all alike score D there, the best value; here 0·log 0 = 0 and they score 0. Computed in float64, in the span of the
    rows where N q < D: time and memory are linear in D, and no D×D matrix is made there.

    Args:
        *views: two views or more of this process, each (n, D), any floating dtype; N ≥ 2 rows on all processes.
        delta: δ > 0, in units of the embeddings' variance.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False takes this process's rows alone.

    Returns:
        Between 1 and min(N − 1, D); 0 if the samples are all alike; NaN if a value is not finite. It grows with N:
        compare only values of the same N and q.

    Raises:
        TypeError: views that are not floating tensors of one dtype, or ``delta`` that is not a number.
        ValueError: fewer than two views, views of different or wrong shapes or devices, N < 2, D = 0, ``delta`` ≤ 0, or
            arguments that differ among the processes. Every process raises it.

    Example:
        >>> z = torch.cat([torch.eye(4), -torch.eye(4)])  # ± along four axes
        >>> round(lidar(z, z), 6)
        4.0
        >>> step = torch.tensor([0.0, 0.0, 1.0, 1.0])  # along which the views of a sample differ
        >>> round(lidar(z + step, z - step), 1)
        3.0

    Source: Thilak et al. (2023), arXiv 2312.04000; δ and the divisors as in stable-pretraining 0.1.8.
    """

    def check() -> MustMatch:
        check_views("lidar", *views)
        _check_delta(delta)
        return {"delta": float(delta)}

    shards = agreed("lidar", views, process_group, synchronize, check)
    check_samples("lidar", views[0], shards)
    z = torch.stack([rows_of_all(shards, view) for view in views])
    z = z - z[0, 0]  # what is alike everywhere becomes exactly 0
    if not z.isfinite().all():
        return math.nan
    q, n, d = z.shape
    if q * n < d:  # the rows in an orthonormal basis of their span
        z = _triangle(z.flatten(0, 1).T).T.view(q, n, q * n)
    means = z.mean(dim=0)
    within = (z - means).flatten(0, 1) / math.sqrt(n * (q - 1))
    ridge = math.sqrt(delta) * torch.eye(within.shape[1], dtype=z.dtype, device=z.device)
    root = _triangle(torch.cat([within, ridge]))  # S_w = rootᵀ root, and never squared
    x = _over(means - means.mean(dim=0), root)
    return _perplexity(_squares(x)) if x.any() else 0.0


@torch.no_grad()
def alpha_req(
    z: Tensor,
    *,
    first: int = 11,
    last: int = 100,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
) -> float:
    """α-ReQ: how fast the spectrum of the embeddings decays, λ_k ∝ k^(−α).

    α is the negative slope of log λ_k over log k, fitted for ``first`` ≤ k ≤ ``last`` to the eigenvalues
    λ_1 ≥ λ_2 ≥ … of the covariance by least squares with the weights 1/k. White embeddings have α = 0, few directions a
    large one, and the paper finds features best with α near 1. Where the spectrum is no power law, α depends on the
    range.

    Weights and range are those of reptrix, a package of one of the authors, after Stringer et al. (2019). It fits the
    logarithms of rounding, too, where the covariance has a lower rank than ``last``; here the fit ends before them.
    Computed in float64 from the smaller of the two Gram matrices, as :func:`effective_rank` is.

    Args:
        z: embeddings of this process, (n, D), any floating dtype; min(N − 1, D) > ``first`` with N rows on all of them.
        first: first index of the fit, counted from 1.
        last: last index of the fit, included; min(N − 1, D) where that is less.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False takes this process's rows alone.

    Returns:
        α; ∞ where fewer than two eigenvalues of the range are above 0, as at collapse; NaN if a value is not finite.

    Raises:
        TypeError: ``z`` is not a floating tensor, ``first`` or ``last`` no int.
        ValueError: ``z`` is not (N, D), too few samples or features for the range, ``first`` < 1, ``last`` ≤ ``first``,
            or arguments that differ among the processes. Every process raises it.

    Example:
        >>> k = torch.arange(1.0, 51.0)
        >>> z = torch.cat([k.pow(-0.5).diag(), -k.pow(-0.5).diag()])  # ± along 50 axes, with the variances 1/k
        >>> round(alpha_req(z), 4)
        1.0

    Source: Agrawal, Mondal, Ghosh & Richards (2022), "α-ReQ: Assessing Representation Quality in Self-Supervised
    Learning by measuring eigenspectrum decay", NeurIPS 35.
    """

    def check() -> MustMatch:
        _check_matrix("alpha_req", z)
        _check_range(first, last)
        return {"first": first, "last": last}

    shards = agreed("alpha_req", [z], process_group, synchronize, check)
    most = min(shards.total - 1, z.shape[1])
    if most <= first:
        raise ValueError(
            f"alpha_req: expected min(N − 1, D) > first, got N = {shards.total}, D = {z.shape[1]} and first={first}. "
            "Use more samples, or fit from a smaller index, for example first=1."
        )
    x = rows_of_all(shards, z)
    x = x - x[0]  # what is alike everywhere becomes exactly 0
    x = x - x.mean(dim=0)
    largest = x.abs().max()
    if not largest.isfinite():
        return math.nan
    if largest == 0:
        return math.inf
    eigenvalues = _squares(x).flip(0)[first - 1 : min(last, most)]
    y = eigenvalues[eigenvalues > 0].log()
    return -_slope(y, first) if len(y) > 1 else math.inf


def _triangle(x: Tensor) -> Tensor:
    """The upper triangular R with Rᵀ R = xᵀ x."""
    return cast("Tensor", _linalg.qr(x, mode="r").R)


def _over(x: Tensor, triangle: Tensor) -> Tensor:
    """x R⁻¹."""
    return cast("Tensor", _linalg.solve_triangular(triangle, x, upper=True, left=False))


def _squares(x: Tensor) -> Tensor:
    """The squared singular values of x over its largest entry, ascending; those that rounding may have made are 0."""
    x = x / x.abs().max()
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    squares = cast("Tensor", _linalg.eigvalsh(gram))
    resolution = squares[-1] * gram.shape[0] * torch.finfo(gram.dtype).eps
    return torch.where(squares > resolution, squares, 0)


def _perplexity(weights: Tensor) -> float:
    """The exponential of their entropy, once they sum to 1."""
    p = weights / weights.sum()
    return math.exp(-torch.xlogy(p, p).sum().item())


def _slope(y: Tensor, first: int) -> float:
    """Of y over log k, k = first, first + 1, …, by least squares with the weights 1/k."""
    k = torch.arange(first, first + len(y), dtype=y.dtype, device=y.device)
    x = k.log() - (k.log() / k).sum() / k.reciprocal().sum()
    return ((x * y / k).sum() / (x * x / k).sum()).item()


def _check_matrix(caller: str, z: Any) -> None:
    check_tensor(caller, "z", z)
    if z.ndim != 2 or z.shape[1] == 0:
        remedy = "Check the projector's output width." if z.ndim == 2 else two_dimensions(z.ndim)
        raise ValueError(f"{caller}: expected z of shape (N, D) with D ≥ 1, got {tuple(z.shape)}. {remedy}")


def _check_delta(delta: Any) -> None:
    if isinstance(delta, bool) or not isinstance(delta, Real):
        raise TypeError(f"lidar: expected delta to be a float, got {type(delta).__name__}. The usual value is 1e-4.")
    if not 0 < float(delta) < math.inf:
        raise ValueError(
            f"lidar: expected delta to be finite and > 0, got {delta}. The usual value is 1e-4; without it "
            "a direction in which the views agree has no scale."
        )


def _check_range(first: Any, last: Any) -> None:
    for name, value in (("first", first), ("last", last)):
        if type(value) is not int:
            raise TypeError(f"alpha_req: expected {name} to be an int, got {value!r}. The usual range is 11 to 100.")
    if not 1 <= first < last:
        raise ValueError(
            f"alpha_req: expected 1 ≤ first < last, got first={first} and last={last}. The usual range is 11 to 100."
        )
