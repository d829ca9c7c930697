"""Barlow Twins with mixed samples: :func:`mixed_barlow_twins_loss` and its module :class:`MixedBarlowTwinsLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from barlow_loss._collectives import Shards, check_group, group_of
from barlow_loss._gram_norm import batch_for, cross_norm
from barlow_loss._header import MustMatch, check_on_all_ranks, check_samples
from barlow_loss._module import LossModule
from barlow_loss._normalize import normalize
from barlow_loss._plan import (
    ALGORITHMS,
    BACKENDS,
    Algorithm,
    Backend,
    autocast_disabled,
    autocast_enabled,
    choose_backend,
)
from barlow_loss._validation import check_choice, check_eps, check_flags, check_views, check_weight
from barlow_loss._validation_relatives import (
    check_alpha,
    check_permutation,
    claim_of_weight,
    needing_gradients,
)
from barlow_loss.loss import barlow_twins_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    class _Settings(TypedDict, total=False):
        lambd: float | Tensor
        mix_scale: float | Tensor
        eps: float
        algorithm: Algorithm
        backend: Backend
        synchronize: bool
        process_group: ProcessGroup | None
        grad_reduction: _GradReduction


__all__ = ["MixedBarlowTwinsLoss", "MixedBarlowTwinsTerms", "mixed_barlow_twins_loss"]

_GradReduction = Literal["mean", "sum"]


class MixedBarlowTwinsTerms(NamedTuple):
    """The loss and its sums: ``on_diagonal + lambd * off_diagonal + mix_scale * lambd * mixture == loss``.

    All four are 0-d, float32 (float64 for float64 views), and differentiable.
    """

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor
    mixture: Tensor


@overload
def mixed_barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    z_mixed: Tensor,
    alpha: float | Tensor,
    permutation: Tensor,
    *,
    return_terms: Literal[False] = ...,
    **settings: Unpack[_Settings],
) -> Tensor: ...


@overload
def mixed_barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    z_mixed: Tensor,
    alpha: float | Tensor,
    permutation: Tensor,
    *,
    return_terms: Literal[True],
    **settings: Unpack[_Settings],
) -> MixedBarlowTwinsTerms: ...


@overload
def mixed_barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    z_mixed: Tensor,
    alpha: float | Tensor,
    permutation: Tensor,
    *,
    return_terms: bool,
    **settings: Unpack[_Settings],
) -> Tensor | MixedBarlowTwinsTerms: ...


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
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    synchronize: bool = True,
    process_group: ProcessGroup | None = None,
    grad_reduction: _GradReduction = "mean",
    return_terms: bool = False,
) -> Tensor | MixedBarlowTwinsTerms:
    """Mixed Barlow Twins: the loss of two views, and how far mixed samples are from mixed embeddings.

    The encoder sees a third batch, x_m = α x_1 + (1 − α) x_2[π], with samples of the first view mixed with those of
    the second in another order. Its embeddings should have the cross-correlations that the mixed embeddings have:

    ::

        R = Σ_{v=1,2} ‖ ẑ_mᵀ ẑ_v/N − (α ẑ_1 + (1 − α) ẑ_2[π])ᵀ ẑ_v/N ‖²,    L = L_BT + λ · mix_scale · R

    with ẑ and L_BT of :func:`barlow_loss.barlow_twins_loss`. The two differences are one product with
    E = ẑ_m − α ẑ_1 − (1 − α) ẑ_2[π], so R = ⟨EEᵀ, ẑ_1ẑ_1ᵀ + ẑ_2ẑ_2ᵀ⟩/N² needs no D×D matrix.

    Args:
        z1: the first view's embeddings, (N, D) with N ≥ 2, of dtype float64, float32, bfloat16 or float16, any
            strides. Never modified. With several processes, the local rows; their number may differ, and be 0.
        z2: the second view's embeddings, the same shape, dtype and device. Row n of both comes from the same sample.
        z_mixed: the embeddings of the mixed samples, likewise. Row n comes from x_1[n] and x_2[π[n]].
        alpha: α, the share of the first view, in [0, 1]; a float or a 0-d tensor. Each process may have its own: it
            belongs to the process's rows.
        permutation: π, (n,) int64 or int32 on the device of the views: indices into this process's rows, from 0 to
            n − 1. So samples are mixed within a process, and each draws its own ``torch.randperm(n)``. That every index
            is there once is not checked.
        lambd: λ, weight of the off-diagonal sum and of R, ≥ 0; a float or a 0-d tensor.
        mix_scale: weight of R, times λ, ≥ 0; a float or a 0-d tensor. 5 is the default of the published program; its
            scripts take 2 to 4 for small images and 1/2 for ImageNet. Alike on all processes.
        eps: added to the variance inside the root, ≥ 0; part of the loss.
        algorithm: "primal" works on D×D cross-correlations, "dual" on N×N Gram matrices; both are exact. "auto" takes
            the dual for N ≤ D/2.
        backend: of L_BT; see :func:`barlow_loss.barlow_twins_loss`. R is plain torch in any case.
        synchronize: take statistics and correlations over the rows of all processes of ``process_group``. All of them
            call the function then. False: the loss of this process's rows alone.
        process_group: the processes to synchronise over; default: the world, once torch.distributed is initialised.
        grad_reduction: how the training wrapper reduces gradients over processes, "mean" (DDP, FSDP2) or "sum".
        return_terms: return :class:`MixedBarlowTwinsTerms` in place of the loss.

    Returns:
        The loss, 0-d, in float32 for 16-bit views and under autocast too; float64 for float64 views. Gradients come in
        the dtype of the views. NaN or infinity anywhere in a view makes the loss NaN.

    Raises:
        ValueError: the shapes differ or are not (N, D), N < 2, D = 0, the devices differ, ``permutation`` has not one
            index for each row, or a setting out of its range; ``backend="triton"`` on a device that Triton does not
            serve; D, dtype, settings or the need for gradients differ among the processes.
        TypeError: views that are not floating tensors of one dtype, a ``permutation`` that is no tensor of integers, or
            a setting of the wrong type.
        IndexError: an index of ``permutation`` is not a row (on CUDA an assertion on the device).
        RuntimeError: as with :func:`barlow_loss.barlow_twins_loss`, for a second derivative too.

        An invalid argument on one rank raises the same error on every rank, except an index that is not a row, and
        except in a compiled graph, which compares the numbers of rows alone.

    Several processes:
        Every rank returns the same bits: the loss of the concatenated batch, whose permutation is that of each rank
        within the rank's rows. Gradients are reduced as those of :func:`barlow_loss.barlow_twins_loss`. In the
        dual R adds 3 N D elements to what a rank gathers, in the primal 2 D², and a few vectors for each view.

    Against the published program:
        ``main.py`` divides by the unbiased deviation, without ε, and the correlations by N. So each of its correlations
        is (N − 1)/N of one for ε = 0, and its R is ((N − 1)/N)² of it: 0.8 % less at N = 256. Its ``main_imagenet.py``
        halves R, has statistics per rank, and in the target for v = 2 has ẑ_2 in place of ẑ_1; here it is as in
        ``main.py`` and the paper.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x1, x2 = torch.randn(2, 64, 256, generator=generator)
        >>> alpha, permutation = 0.3, torch.randperm(64, generator=generator)
        >>> mixed = alpha * x1 + (1 - alpha) * x2[permutation]
        >>> z1, z2, z_mixed = (torch.tanh(x) for x in (x1, x2, mixed))  # an encoder
        >>> terms = mixed_barlow_twins_loss(z1, z2, z_mixed, alpha, permutation, return_terms=True)
        >>> bool(terms.mixture > 0)
        True
        >>> unmixed = mixed_barlow_twins_loss(z1, z2, z1, 1.0, permutation, return_terms=True)
        >>> unmixed.mixture
        tensor(0.)

    References:
        Bandara, De Melo, Patel: Guarding Barlow Twins Against Overfitting with Mixed Samples, arXiv 2312.02151;
        ``main.py`` of github.com/wgcban/mix-bt at e2c6af0.
    """
    caller = "mixed_barlow_twins_loss"
    views = {"z1": z1, "z2": z2, "z_mixed": z_mixed}
    settings = lambd, mix_scale, eps, algorithm, backend, grad_reduction
    flags = {"return_terms": return_terms, "synchronize": synchronize}
    shards = check_on_all_ranks(
        caller,
        group_of(caller, process_group, synchronize),
        z1,
        lambda: _must_match(caller, flags, views, alpha, permutation, *settings),
    )
    check_samples(caller, z1, shards)
    base = barlow_twins_loss(
        z1,
        z2,
        lambd=lambd,
        eps=eps,
        algorithm=algorithm,
        backend=backend,
        synchronize=synchronize,
        process_group=process_group,
        grad_reduction=grad_reduction,
        return_terms=True,
    )
    mixture = _mixture(caller, shards, algorithm, grad_reduction, eps, alpha, permutation, *views.values())
    loss = base.loss + _like(mix_scale, mixture) * _like(lambd, mixture) * mixture
    return MixedBarlowTwinsTerms(loss, base.on_diagonal, base.off_diagonal, mixture) if return_terms else loss


def _mixture(
    caller: str,
    shards: Shards,
    algorithm: str,
    grad_reduction: str,
    eps: float,
    alpha: float | Tensor,
    permutation: Tensor,
    *views: Tensor,
) -> Tensor:
    """R = Σ_v ‖Eᵀẑ_v‖²/N², E = ẑ_m − α ẑ_1 − (1 − α) ẑ_2[π]."""
    z = views[0]
    wide = torch.promote_types(z.dtype, torch.float32)
    with autocast_disabled(z.device.type):
        u1, u2, mixed = (normalize(view.to(wide).contiguous(), None, None, eps, shards.group)[0] for view in views)
        alpha = _like(alpha, u1)
        e = mixed - alpha * u1 - (1 - alpha) * u2.index_select(0, permutation)
        batch = batch_for(caller, shards, algorithm, grad_reduction, z)
        return cross_norm(batch, e, u1, u2) / shards.total**2


def _like(weight: float | Tensor, t: Tensor) -> float | Tensor:
    return weight.to(t.device, t.dtype) if isinstance(weight, Tensor) else float(weight)


def _must_match(
    caller: str, flags: dict[str, Any], views: dict[str, Tensor], alpha: Any, permutation: Any, *settings: Any
) -> tuple[int, MustMatch]:
    """This rank's number of rows, and what every rank must have alike; raises what is wrong on this one."""
    check_flags(caller, **flags)
    check_views(caller, *views.values(), names=list(views))
    z = views["z1"]
    check_alpha(caller, alpha)
    check_permutation(caller, permutation, z)
    _check_settings(caller, *settings)
    lambd, mix_scale, eps, algorithm, backend, grad_reduction = settings
    return z.shape[0], {
        "D": z.shape[1],
        "dtype": z.dtype,
        "device": z.device.type,
        "autocast": autocast_enabled(z.device.type),
        "views that need gradients": needing_gradients(views.values()),
        "lambd": claim_of_weight(lambd),
        "mix_scale": claim_of_weight(mix_scale),
        "eps": float(eps),
        "algorithm": algorithm,
        "backend": choose_backend(caller, backend, z.device),
        "grad_reduction": grad_reduction,
    }


def _check_settings(
    caller: str, lambd: Any, mix_scale: Any, eps: Any, algorithm: Any, backend: Any, grad_reduction: Any
) -> None:
    check_weight(caller, "lambd", lambd, 0.0051)
    check_weight(caller, "mix_scale", mix_scale, 5.0)
    check_eps(caller, eps)
    check_choice(caller, "algorithm", algorithm, ALGORITHMS)
    check_choice(caller, "backend", backend, BACKENDS)
    check_choice(caller, "grad_reduction", grad_reduction, ("mean", "sum"))


class MixedBarlowTwinsLoss(LossModule):
    """The module of :func:`mixed_barlow_twins_loss`: stores its settings, has no parameters and an empty state_dict.

    Args:
        lambd: weight of the off-diagonal sum and of R, ≥ 0.
        mix_scale: weight of R, times ``lambd``, ≥ 0.
        eps: added to the variance inside the root, ≥ 0.
        algorithm: "auto", "primal" or "dual".
        backend: "auto", "eager" or "triton".
        synchronize: over all processes of ``process_group``; see :func:`mixed_barlow_twins_loss`.
        process_group: default: the world, once torch.distributed is initialised.
        grad_reduction: "mean" or "sum"; see :func:`mixed_barlow_twins_loss`.

    Raises:
        ValueError, TypeError: a setting out of its range or of the wrong type, already here.

    Example:
        >>> loss_fn = MixedBarlowTwinsLoss(lambd=0.0051, mix_scale=4.0)
        >>> z1, z2, z_mixed = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0))
        >>> loss_fn(z1, z2, z_mixed, alpha=0.3, permutation=torch.randperm(64)).shape
        torch.Size([])
    """

    lambd: float | Tensor
    mix_scale: float | Tensor
    WEIGHTS = ("lambd", "mix_scale")

    def __init__(
        self,
        lambd: float | Tensor = 0.0051,
        mix_scale: float | Tensor = 5.0,
        *,
        eps: float = 1e-5,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
        grad_reduction: _GradReduction = "mean",
    ) -> None:
        super().__init__()
        _check_settings("MixedBarlowTwinsLoss", lambd, mix_scale, eps, algorithm, backend, grad_reduction)
        check_group("MixedBarlowTwinsLoss", process_group)
        check_flags("MixedBarlowTwinsLoss", synchronize=synchronize)
        self.lambd = lambd
        self.mix_scale = mix_scale
        self.eps = eps
        self.algorithm: Algorithm = algorithm
        self.backend: Backend = backend
        self.synchronize = synchronize
        self.process_group = process_group
        self.grad_reduction: _GradReduction = grad_reduction

    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        z_mixed: Tensor,
        alpha: float | Tensor,
        permutation: Tensor,
        *,
        return_terms: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        z_mixed: Tensor,
        alpha: float | Tensor,
        permutation: Tensor,
        *,
        return_terms: Literal[True],
    ) -> MixedBarlowTwinsTerms: ...

    @overload
    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        z_mixed: Tensor,
        alpha: float | Tensor,
        permutation: Tensor,
        *,
        return_terms: bool,
    ) -> Tensor | MixedBarlowTwinsTerms: ...

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        z_mixed: Tensor,
        alpha: float | Tensor,
        permutation: Tensor,
        *,
        return_terms: bool = False,
    ) -> Tensor | MixedBarlowTwinsTerms:
        """The loss of two views and their mixed samples, all (N, D), or its :class:`MixedBarlowTwinsTerms`."""
        return mixed_barlow_twins_loss(
            z1,
            z2,
            z_mixed,
            alpha,
            permutation,
            lambd=self.lambd,
            mix_scale=self.mix_scale,
            eps=self.eps,
            algorithm=self.algorithm,
            backend=self.backend,
            synchronize=self.synchronize,
            process_group=self.process_group,
            grad_reduction=self.grad_reduction,
            return_terms=return_terms,
        )

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        names = ("lambd", "mix_scale", "eps", "algorithm", "backend", "synchronize", "grad_reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
