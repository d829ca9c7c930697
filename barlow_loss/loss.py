"""Public API: :func:`barlow_twins_loss` and its module :class:`BarlowTwinsLoss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from barlow_loss._collectives import Shards, check_group, group_of
from barlow_loss._function import loss_and_sums
from barlow_loss._header import MustMatch, check_on_all_ranks, check_samples
from barlow_loss._module import LossModule
from barlow_loss._pairs import TWO_VIEWS
from barlow_loss._plan import ALGORITHMS, BACKENDS, Algorithm, Backend, autocast_enabled, choose_backend, plan_for
from barlow_loss._validation import (
    check_choice,
    check_eps,
    check_flags,
    check_pair_weights,
    check_target,
    check_views,
    check_weight,
    weight_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    class _Settings(TypedDict, total=False):
        lambd: float | Tensor
        eps: float
        algorithm: Algorithm
        backend: Backend
        synchronize: bool
        process_group: ProcessGroup | None
        grad_reduction: GradReduction
        pair_weights: PairWeights | None
        off_diagonal_target: float
        correction: int
        z1: Tensor | None
        z2: Tensor | None


__all__ = ["BarlowTwinsLoss", "BarlowTwinsTerms", "barlow_twins_loss"]

GradReduction = Literal["mean", "sum"]
PairWeights = Tensor | Sequence[Sequence[float]]


class BarlowTwinsTerms(NamedTuple):
    """The loss and its two sums: ``on_diagonal + lambd * off_diagonal == loss``.

    All three are 0-d, float32 (float64 for float64 views), and differentiable.
    """

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor


@overload
def barlow_twins_loss(*views: Tensor, return_terms: Literal[False] = ..., **settings: Unpack[_Settings]) -> Tensor: ...


@overload
def barlow_twins_loss(
    *views: Tensor, return_terms: Literal[True], **settings: Unpack[_Settings]
) -> BarlowTwinsTerms: ...


@overload
def barlow_twins_loss(
    *views: Tensor, return_terms: bool, **settings: Unpack[_Settings]
) -> Tensor | BarlowTwinsTerms: ...


def barlow_twins_loss(
    *views: Tensor,
    lambd: float | Tensor = 0.0051,
    eps: float = 1e-5,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    synchronize: bool = True,
    process_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
    return_terms: bool = False,
    pair_weights: PairWeights | None = None,
    off_diagonal_target: float = 0.0,
    correction: int = 0,
    z1: Tensor | None = None,
    z2: Tensor | None = None,
) -> Tensor | BarlowTwinsTerms:
    """The Barlow Twins loss of two or more views, exact on any number of processes, linear in D for N ≤ D/2.

    ::

        ẑ = (z − μ)/√(v + ε),    C = ẑ1ᵀ ẑ2/N,    L = Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij²

    N counts the rows of all processes in the group; μ and v are the mean and the biased
    variance of each feature over it, of each view by itself. The sums are sums, not means, as in the paper: the value
    grows with D, and random embeddings have an off-diagonal sum of about D(D−1)/(N−1)
    (:func:`barlow_loss.collapse_report` shows it beside yours).

    Of V > 2 views it is the mean over the V(V−1)/2 pairs, or their weighted mean, so the learning rate stays. The
    matrix products of the dual are 4 V N² D FLOPs, linear in V, where a loop over the pairs takes V − 1 times that.

    Args:
        *views: the views' embeddings z1, z2 and so on, each (N, D) with N ≥ 2, of one dtype (float64, float32, bfloat16
            or float16) and device, any strides. Row n of all comes from the same sample. They are never modified. With
            several processes, the local rows; their number may differ between ranks, and be 0.
        lambd: weight of the off-diagonal sum, ≥ 0; a float or a 0-d tensor (which may require grad, and does not
            recompile when its value changes). The paper's 0.0051 belongs to D = 8192. The same on all processes; each
            rank gets the full gradient of a tensor λ: average it, do not sum it, whatever ``grad_reduction``.
        eps: added to the variance inside the root, ≥ 0; part of the loss.
        algorithm: "primal" works on the D×D matrix C (6 N D² FLOPs for each pair), "dual" on the N×N Gram matrices of
            the views (4 N² D for each view); both are exact. "auto" takes the dual for N ≤ D/2, and of more than two
            views for N ≤ D, unless the products are in 16 bits.
        backend: "eager" is plain torch, on every device; "triton" fuses all but the matrix products into a few
            kernels, on CUDA, ROCm and XPU; both are exact. "auto" takes Triton, where it can be used, on NVIDIA
            GPUs of compute capability 8.0 and newer and on AMD's gfx942 and gfx950; for CPU tensors it never does.
        synchronize: take statistics and correlations over the rows of all processes of ``process_group``. All of them
            call the function then. False: the loss of this process's rows alone.
        process_group: the processes to synchronise over; default: the world, once torch.distributed is initialised.
            For a DeviceMesh pass ``mesh.get_group()``, for a dimension of it ``mesh["name"].get_group()``.
        grad_reduction: how the training wrapper reduces gradients over processes, "mean" (DDP, FSDP2) or "sum"; see
            below. It has no effect in one process.
        return_terms: return :class:`BarlowTwinsTerms` in place of the loss, each the mean over pairs.
        pair_weights: w_ij of the mean over pairs Σ_{i<j} w_ij L_ij / Σ_{i<j} w_ij, a symmetric (V, V) tensor on the CPU
            or nested sequence, ≥ 0, with a diagonal of 0; None: all alike. 0 leaves a pair out. Two global crops
            against every view, and no local crop against another, of 2 + 2: ``[[0, 1, 1, 1], [1, 0, 1, 1],
            [1, 1, 0, 0], [1, 1, 0, 0]]``. Alike on all processes. Under torch.compile give numbers, not a tensor.
        off_diagonal_target: t of the off-diagonal sum Σ_{i≠j} (C_ij − t)², a number; −1 is the form that Tsai et al.
            derive from HSIC. Alike on all processes. The dual's rounding is relative to t² D² then, which matters where
            all features are nearly one (t = 1).
        correction: the deviation divides by N − correction, as torch.var's: 0 as in the paper and its official program,
            1 as in programs that take ``torch.std``. C is divided by N with either.
        z1: the first view by its name, if none comes by position.
        z2: the second view by its name.

    Returns:
        The loss, 0-d, in float32 for 16-bit views and under autocast too; float64 for float64 views. Gradients come in
        the dtype of the views. At D = 2048 most of them are below float16's smallest normal number: train float16
        with ``torch.amp.GradScaler``. NaN or infinity anywhere in a view makes the loss NaN. Views that need
        a gradient are kept until the backward, for a second derivative.

    Raises:
        ValueError: the shapes differ or are not (N, D), N < 2, D = 0, the devices differ, fewer than two views, or a
            setting out of its range; ``pair_weights`` that are not (V, V), symmetric and ≥ 0 with a diagonal of 0;
            ``backend="triton"`` on a device that Triton does not serve; D, dtype, settings, the number of views or the
            need for gradients differ among the processes.
        TypeError: views that are not floating tensors of one dtype, or a setting of the wrong type.
        RuntimeError: ``backend="triton"`` where triton cannot be imported or build its launcher, or the GPU is too
            old; over several processes a second derivative, torch.func's transforms, batched gradients, forward mode
            and torch.jit.trace, which one process takes by the plain formula; in a compiled graph, where processes have
            different numbers of rows (on CUDA an assertion on the device, which ends the process); from
            torch.distributed, where a process has died, does not come, or was given another group.

        An invalid argument on one rank raises the same error on every rank, except in a compiled graph, which compares
        the numbers of rows alone.

    Several processes:
        Every rank returns the same bits: the loss of the concatenated batch. With ``grad_reduction="mean"``, after the
        wrapper's mean over the ranks the parameters' gradients are those of one process with the whole batch, so each
        rank's own gradient is W times its part of them; with "sum" they are after a sum. Ranks that weight the loss
        differently get the gradient of the mean of what they weighted. docs/migrating.md has what to change in a recipe
        that was tuned with the official program, whose gradient is 1/W of this one.

        Everything is communicated in forward, except a sum of two numbers in backward: V·N·D elements to and from each
        rank in the dual, 2·D² for each pair in the primal, and with two views 9 or 7 D-vectors. The dual holds the N
        gathered rows of all views on every rank while it works. In eager mode a header is exchanged first. It
        synchronises the device, unless the group has a backend for the CPU, as with
        ``init_process_group("cpu:gloo,cuda:nccl")``.

    Example:
        >>> z1, z2 = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> loss = barlow_twins_loss(z1, z2, lambd=0.0051)
        >>> loss.backward()
        >>> z3 = torch.randn(64, 256)
        >>> barlow_twins_loss(z1, z2, z3, pair_weights=[[0, 1, 1], [1, 0, 0], [1, 0, 0]]).shape  # z1 against the others
        torch.Size([])
        >>> terms = barlow_twins_loss(z1, z2, return_terms=True)
        >>> bool(terms.on_diagonal + 0.0051 * terms.off_diagonal == terms.loss)
        True

    References:
        Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021,
        arXiv 2103.03230, equations 1 and 2. The Frobenius identity of the dual, and the target −1: Tsai et al., arXiv
        2104.13712, equation 4.
    """
    caller = "barlow_twins_loss"
    problem = None
    if z1 is not None or z2 is not None:
        views, problem = _by_name(views, z1, z2)
    group = group_of(caller, process_group, synchronize)
    settings = lambd, eps, algorithm, backend, grad_reduction, off_diagonal_target, correction
    if group.size == 1:
        if problem or type(return_terms) is not bool or type(synchronize) is not bool:
            _check_call(caller, problem, return_terms, synchronize)
        check_views(caller, *views)
        _check_settings(caller, *settings)
        shards = Shards(group, (views[0].shape[0],))
    else:
        first = views[0] if views else None
        shards = check_on_all_ranks(
            caller,
            group,
            first,
            lambda: _must_match(caller, views, pair_weights, (problem, return_terms, synchronize), *settings),
        )
    plain = pair_weights is None and len(views) == 2
    weights = TWO_VIEWS if plain else check_pair_weights(caller, pair_weights, len(views))
    n = shards.total
    if n < 2:
        check_samples(caller, views[0], shards)
    lambd, eps, target = (
        lambd if isinstance(lambd, torch.Tensor) else float(lambd),
        float(eps),
        float(off_diagonal_target),
    )
    if correction:
        terms = _with_unbiased_deviation(
            caller, views, lambd, eps, target, (algorithm, backend, grad_reduction, weights), shards
        )
    else:
        plan = plan_for(caller, algorithm, backend, grad_reduction, weights, n, views, target)
        terms = loss_and_sums(views, lambd, eps, plan, shards)
    return BarlowTwinsTerms(*terms) if return_terms else terms[0]


def _with_unbiased_deviation(
    caller: str,
    views: tuple[Tensor, ...],
    lambd: float | Tensor,
    eps: float,
    target: float,
    settings: tuple[Any, ...],
    shards: Shards,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms where the deviation divides by N − 1: with s = (N − 1)/N it is s C(s ε) in place of C.

    So Σ_i (s C_ii − 1)² = s² Σ_i (C_ii − 1/s)², and Σ_{i≠j} (s C_ij − t)² = s² Σ_{i≠j} (C_ij − t/s)².
    """
    n = shards.total
    s = (n - 1) / n
    algorithm, backend, grad_reduction, weights = settings
    plan = plan_for(caller, algorithm, backend, grad_reduction, weights, n, views, target / s, 1 / s)
    _, on_diagonal, off_diagonal = loss_and_sums(views, lambd, s * eps, plan, shards)
    on_diagonal, off_diagonal = s * s * on_diagonal, s * s * off_diagonal
    weight = lambd.to(on_diagonal.device, on_diagonal.dtype) if isinstance(lambd, torch.Tensor) else lambd
    return on_diagonal + weight * off_diagonal, on_diagonal, off_diagonal


def _by_name(views: tuple[Any, ...], z1: Any, z2: Any) -> tuple[tuple[Any, ...], str | None]:
    """The views, of which the first two may have come by name as if they were parameters; and what is wrong with it."""
    for place, z in enumerate((z1, z2)):
        if z is None:
            continue
        if len(views) != place:
            return views, f"z{place + 1} " + ("comes by position, too" if len(views) > place else "came without z1")
        views = (*views, z)
    return views, None


def _check_call(caller: str, problem: str | None, return_terms: Any, synchronize: Any) -> None:
    """Check what does not depend on the shape of the views.

    Raises:
        TypeError: a view is given twice, or a flag is not a bool.
    """
    if problem:
        raise TypeError(f"{caller}: expected each view once, but {problem}. Use loss(z1, z2).")
    check_flags(caller, return_terms=return_terms, synchronize=synchronize)


def _must_match(
    caller: str, views: tuple[Tensor, ...], pair_weights: Any, call: tuple[Any, ...], *settings: Any
) -> tuple[int, MustMatch]:
    """This rank's number of rows, and what every rank must have alike; raises what is wrong on this one."""
    _check_call(caller, *call)
    z1 = check_views(caller, *views)[0]
    _check_settings(caller, *settings)
    lambd, eps, algorithm, backend, grad_reduction, off_diagonal_target, correction = settings
    return z1.shape[0], {
        "D": z1.shape[1],
        "views": len(views),
        "pair_weights": None if pair_weights is None else check_pair_weights(caller, pair_weights, len(views)),
        "dtype": z1.dtype,
        "device": z1.device.type,
        "autocast": autocast_enabled(z1.device.type),
        "views that need gradients": [torch.is_grad_enabled() and z.requires_grad for z in views],
        "lambd": "a tensor" if isinstance(lambd, torch.Tensor) else float(lambd),
        "eps": float(eps),
        "algorithm": algorithm,
        "backend": choose_backend(caller, backend, z1.device),
        "grad_reduction": grad_reduction,
        "off_diagonal_target": float(off_diagonal_target),
        "correction": correction,
    }


def _check_settings(
    caller: str,
    lambd: Any,
    eps: Any,
    algorithm: Any,
    backend: Any,
    grad_reduction: Any,
    off_diagonal_target: Any,
    correction: Any,
) -> None:
    check_weight(caller, "lambd", lambd, 0.0051)
    check_eps(caller, eps)
    if not (type(off_diagonal_target) is float and abs(off_diagonal_target) < math.inf):  # a call less in every step
        check_target(caller, off_diagonal_target)
    if type(correction) is not int or not 0 <= correction <= 1:
        raise ValueError(
            f"{caller}: expected correction to be 0 or 1, got {correction!r}. 0 divides the variance by N, 1 by N − 1."
        )
    check_choice(caller, "algorithm", algorithm, ALGORITHMS)
    check_choice(caller, "backend", backend, BACKENDS)
    check_choice(caller, "grad_reduction", grad_reduction, ("mean", "sum"))


class BarlowTwinsLoss(LossModule):
    """The Barlow Twins loss Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij², C = ẑ1ᵀ ẑ2/N, of two views or more.

    Views are the embeddings of the same N samples in the same order, (N, D) with N ≥ 2; the loss is 0-d. It is the
    module of :func:`barlow_twins_loss`, where all is said. It gives the same loss in ``train()`` and ``eval()``:
    statistics are always those of the batch. It has no parameters, and nothing in its ``state_dict()``.

    Args:
        lambd: weight of the off-diagonal sum, ≥ 0. A tensor goes where the module goes, and is not saved.
        eps: added to the variance inside the root, ≥ 0.
        algorithm: "auto", "primal" or "dual".
        backend: "auto", "eager" or "triton".
        synchronize: over all processes of ``process_group``; see :func:`barlow_twins_loss`.
        process_group: default: the world, once torch.distributed is initialised.
        grad_reduction: "mean" or "sum"; see :func:`barlow_twins_loss`.
        pair_weights: of the views; default: all pairs alike.
        off_diagonal_target: what the C_ij off the diagonal shall be; see :func:`barlow_twins_loss`.
        correction: 0 or 1, of the deviation's N − correction.

    Raises:
        ValueError, TypeError: a setting out of its range or of the wrong type, already here.

    Example:
        >>> loss_fn = BarlowTwinsLoss(lambd=0.0051)
        >>> z1, z2 = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
        >>> loss_fn(z1, z2).shape
        torch.Size([])
        >>> loss_fn(z1, z2, return_terms=True)._fields
        ('loss', 'on_diagonal', 'off_diagonal')
    """

    lambd: float | Tensor
    WEIGHTS = ("lambd",)

    def __init__(
        self,
        lambd: float | Tensor = 0.0051,
        *,
        eps: float = 1e-5,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
        grad_reduction: GradReduction = "mean",
        pair_weights: PairWeights | None = None,
        off_diagonal_target: float = 0.0,
        correction: int = 0,
    ) -> None:
        super().__init__()
        settings = lambd, eps, algorithm, backend, grad_reduction, off_diagonal_target, correction
        _check_settings("BarlowTwinsLoss", *settings)
        check_group("BarlowTwinsLoss", process_group)
        check_flags("BarlowTwinsLoss", synchronize=synchronize)
        self.lambd = lambd
        self.eps = eps
        self.algorithm: Algorithm = algorithm
        self.backend: Backend = backend
        self.synchronize = synchronize
        self.process_group = process_group
        self.grad_reduction: GradReduction = grad_reduction
        self.pair_weights = None if pair_weights is None else weight_rows("BarlowTwinsLoss", pair_weights)
        self.off_diagonal_target = off_diagonal_target
        self.correction = correction

    @overload
    def forward(
        self, *views: Tensor, return_terms: Literal[False] = ..., z1: Tensor | None = ..., z2: Tensor | None = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, *views: Tensor, return_terms: Literal[True], z1: Tensor | None = ..., z2: Tensor | None = ...
    ) -> BarlowTwinsTerms: ...

    @overload
    def forward(
        self, *views: Tensor, return_terms: bool, z1: Tensor | None = ..., z2: Tensor | None = ...
    ) -> Tensor | BarlowTwinsTerms: ...

    def forward(
        self, *views: Tensor, return_terms: bool = False, z1: Tensor | None = None, z2: Tensor | None = None
    ) -> Tensor | BarlowTwinsTerms:
        """The loss of two or more (N, D) views, z1, z2 and so on, or its :class:`BarlowTwinsTerms`."""
        return barlow_twins_loss(
            *views,
            lambd=self.lambd,
            eps=self.eps,
            algorithm=self.algorithm,
            backend=self.backend,
            synchronize=self.synchronize,
            process_group=self.process_group,
            grad_reduction=self.grad_reduction,
            pair_weights=self.pair_weights,
            off_diagonal_target=self.off_diagonal_target,
            correction=self.correction,
            return_terms=return_terms,
            z1=z1,
            z2=z2,
        )

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        names = "lambd", "eps", "algorithm", "backend", "synchronize", "grad_reduction", "pair_weights"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "off_diagonal_target", "correction"))
