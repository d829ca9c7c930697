"""VICReg, exact and in time linear in D: :func:`vicreg_loss` and its module :class:`VICRegLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from barlow_loss._collectives import check_group, group_of
from barlow_loss._gram_norm import batch_for
from barlow_loss._header import MustMatch, check_on_all_ranks, check_samples
from barlow_loss._module import LossModule
from barlow_loss._plan import ALGORITHMS, Algorithm
from barlow_loss._validation import check_choice, check_eps, check_flags, check_views, check_weight
from barlow_loss._validation_relatives import claim_of_weight, needing_gradients
from barlow_loss._vicreg import invariance_variance_covariance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    class _Settings(TypedDict, total=False):
        invariance: float | Tensor
        variance: float | Tensor
        covariance: float | Tensor
        eps: float
        algorithm: Algorithm
        synchronize: bool
        process_group: ProcessGroup | None
        grad_reduction: _GradReduction


__all__ = ["VICRegLoss", "VICRegTerms", "vicreg_loss"]

_Weight = float | Tensor
_GradReduction = Literal["mean", "sum"]
_USUAL = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


class VICRegTerms(NamedTuple):
    """The loss and its three terms before their weights: ``25 * invariance + 25 * variance + covariance == loss``.

    All four are 0-d, float32 (float64 for float64 views), and differentiable.
    """

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


@overload
def vicreg_loss(*views: Tensor, return_terms: Literal[False] = ..., **settings: Unpack[_Settings]) -> Tensor: ...


@overload
def vicreg_loss(*views: Tensor, return_terms: Literal[True], **settings: Unpack[_Settings]) -> VICRegTerms: ...


@overload
def vicreg_loss(*views: Tensor, return_terms: bool, **settings: Unpack[_Settings]) -> Tensor | VICRegTerms: ...


def vicreg_loss(
    *views: Tensor,
    invariance: float | Tensor = 25.0,
    variance: float | Tensor = 25.0,
    covariance: float | Tensor = 1.0,
    eps: float = 1e-4,
    algorithm: Algorithm = "auto",
    synchronize: bool = True,
    process_group: ProcessGroup | None = None,
    grad_reduction: _GradReduction = "mean",
    return_terms: bool = False,
) -> Tensor | VICRegTerms:
    """The VICReg loss of two views or more, exact on any number of processes, in time linear in D for N ≤ D/2.

    ::

        s = ‖Z − Z'‖²/(N D),    v(Z) = 1/D Σ_d max(0, 1 − √(Var_d + ε)),    c(Z) = 1/D Σ_{i≠j} Cov(Z)_ij²
        Cov(Z) = Σ_n (z_n − z̄)(z_n − z̄)ᵀ/(N − 1),    L = λ s + μ (v(Z) + v(Z'))/2 + ν (c(Z) + c(Z'))

    N counts the rows of all processes in the group; means, variances (unbiased) and
    covariances are over it. These are the definitions of the official program, for which 25, 25 and 1 are. Equations 5
    and 6 of the paper neither divide s by D nor halve v.

    With V views s is the mean over all pairs of views, v the mean over the views, and c twice the mean over the views.
    So two views have the official value, and the learning rate need not change with their number.

    Args:
        *views: two or more views' embeddings, each (N, D) with N ≥ 2, of one dtype (float64, float32, bfloat16 or
            float16) and device, any strides. Row n of each comes from the same sample. They are never modified. With
            several processes, the local rows; their number may differ between ranks, and be 0.
        invariance: λ, weight of s, ≥ 0; a float or a 0-d tensor (which may require grad, and does not recompile when
            its value changes). Alike on all processes; the gradient of a tensor is whole on each, so it wants a mean
            over them, whatever ``grad_reduction``.
        variance: μ, weight of v, likewise.
        covariance: ν, weight of c, likewise.
        eps: ε, added to the variance inside the root, ≥ 0; with 0 the gradient of a constant feature is NaN.
        algorithm: "primal" works on the D×D covariance of each view, "dual" on its N×N Gram matrix, by
            ‖XᵀX‖² = ‖XXᵀ‖²; both are exact. "auto" takes the dual for N ≤ D/2.
        synchronize: take all three terms over the rows of all processes of ``process_group``. All of them call the
            function then. False: the loss of this process's rows alone.
        process_group: the processes to synchronise over; default: the world, once torch.distributed is initialised.
        grad_reduction: how the training wrapper reduces gradients over processes, "mean" (DDP, FSDP2) or "sum". It has
            no effect in one process.
        return_terms: return :class:`VICRegTerms` in place of the loss.

    Returns:
        The loss, 0-d, in float32 for 16-bit views and under autocast, which is switched off inside; float64 for
        float64 views. Gradients come in the dtype of the views. NaN anywhere in a view makes the loss NaN; infinity
        makes it infinite or NaN.

    Raises:
        ValueError: the shapes differ or are not (N, D), N < 2, D = 0, the devices differ, fewer than two views, or a
            setting out of its range; the number of views, D, dtype, settings or the need for gradients differ among the
            processes.
        TypeError: views that are not floating tensors of one dtype, or a setting of the wrong type.
        RuntimeError: in backward, where a second derivative is asked for; in a compiled graph, where the processes have
            different numbers of rows.

        An invalid argument on one rank raises the same error on every rank, except in a compiled graph, which compares
        the numbers of rows alone.

    Several processes:
        Every rank returns the same bits: the loss of the concatenated batch. With ``grad_reduction="mean"``, after the
        wrapper's mean over the ranks the parameters' gradients are those of one process with the whole batch. The
        official program has the same gradients for shards of one size, so what was tuned with it needs no change. Its
        loss differs from rank to rank, because its s is of the rank's own rows.

    There is no ``backend``: everything is plain torch, on every device. The matrix products are most of the time, and
    ``torch.compile(fullgraph=True)`` fuses the passes around them.

    Example:
        >>> z1, z2 = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> loss = vicreg_loss(z1, z2)
        >>> loss.backward()
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> vicreg_loss(z, z)  # equal views, no covariance, standard deviations above 1
        tensor(0.)
        >>> vicreg_loss(z, -z, return_terms=True).invariance
        tensor(4.)

    References:
        Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, ICLR
        2022, arXiv 2105.04906, equations 1 to 6; ``main_vicreg.py`` of github.com/facebookresearch/vicreg at 4e12602.
        That a covariance and a Gram matrix have one norm: Garrido et al., arXiv 2206.02574.
    """
    caller = "vicreg_loss"
    settings = {"invariance": invariance, "variance": variance, "covariance": covariance}
    others = eps, algorithm, grad_reduction
    flags = {"return_terms": return_terms, "synchronize": synchronize}
    shards = check_on_all_ranks(
        caller,
        group_of(caller, process_group, synchronize),
        views[0] if views else None,
        lambda: _must_match(caller, flags, views, settings, *others),
    )
    check_samples(caller, views[0], shards)
    batch = batch_for(caller, shards, algorithm, grad_reduction, *views)
    terms = invariance_variance_covariance(batch, eps, *views)
    loss = sum(_like(weight, terms[0]) * term for weight, term in zip(settings.values(), terms, strict=True))
    assert isinstance(loss, Tensor)
    return VICRegTerms(loss, *terms) if return_terms else loss


def _like(weight: _Weight, term: Tensor) -> _Weight:
    return weight.to(term.device, term.dtype) if isinstance(weight, torch.Tensor) else float(weight)


def _must_match(
    caller: str,
    flags: dict[str, Any],
    views: tuple[Tensor, ...],
    weights: dict[str, _Weight],
    eps: Any,
    algorithm: Any,
    grad_reduction: Any,
) -> tuple[int, MustMatch]:
    """This rank's number of rows, and what every rank must have alike; raises what is wrong on this one."""
    check_flags(caller, **flags)
    check_views(caller, *views)
    _check_settings(caller, weights, eps, algorithm, grad_reduction)
    z = views[0]
    return z.shape[0], {
        "D": z.shape[1],
        "dtype": z.dtype,
        "device": z.device.type,
        "views that need gradients": needing_gradients(views),
        **{name: claim_of_weight(weight) for name, weight in weights.items()},
        "eps": float(eps),
        "algorithm": algorithm,
        "grad_reduction": grad_reduction,
    }


def _check_settings(caller: str, weights: dict[str, _Weight], eps: Any, algorithm: Any, grad_reduction: Any) -> None:
    for name, weight in weights.items():
        check_weight(caller, name, weight, _USUAL[name])
    check_eps(caller, eps)
    check_choice(caller, "algorithm", algorithm, ALGORITHMS)
    check_choice(caller, "grad_reduction", grad_reduction, ("mean", "sum"))


class VICRegLoss(LossModule):
    """The module of :func:`vicreg_loss`: stores its settings, has no parameters and an empty state_dict.

    Args:
        invariance: λ, weight of the mean squared error, ≥ 0.
        variance: μ, weight of the hinge on the standard deviations, ≥ 0.
        covariance: ν, weight of the squared covariances, ≥ 0.
        eps: added to the variance inside the root, ≥ 0.
        algorithm: "auto", "primal" or "dual".
        synchronize: over all processes of ``process_group``; see :func:`vicreg_loss`.
        process_group: default: the world, once torch.distributed is initialised.
        grad_reduction: "mean" or "sum"; see :func:`vicreg_loss`.

    Raises:
        ValueError, TypeError: a setting out of its range or of the wrong type, already here.

    Example:
        >>> loss_fn = VICRegLoss()
        >>> z1, z2 = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
        >>> loss_fn(z1, z2).shape
        torch.Size([])
        >>> loss_fn(z1, z2, return_terms=True)._fields
        ('loss', 'invariance', 'variance', 'covariance')
    """

    invariance: float | Tensor
    variance: float | Tensor
    covariance: float | Tensor
    WEIGHTS = ("invariance", "variance", "covariance")

    def __init__(
        self,
        invariance: float | Tensor = 25.0,
        variance: float | Tensor = 25.0,
        covariance: float | Tensor = 1.0,
        *,
        eps: float = 1e-4,
        algorithm: Algorithm = "auto",
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
        grad_reduction: _GradReduction = "mean",
    ) -> None:
        super().__init__()
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        _check_settings("VICRegLoss", weights, eps, algorithm, grad_reduction)
        check_group("VICRegLoss", process_group)
        check_flags("VICRegLoss", synchronize=synchronize)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance
        self.eps = eps
        self.algorithm: Algorithm = algorithm
        self.synchronize = synchronize
        self.process_group = process_group
        self.grad_reduction: _GradReduction = grad_reduction

    @overload
    def forward(self, *views: Tensor, return_terms: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, *views: Tensor, return_terms: Literal[True]) -> VICRegTerms: ...

    @overload
    def forward(self, *views: Tensor, return_terms: bool) -> Tensor | VICRegTerms: ...

    def forward(self, *views: Tensor, return_terms: bool = False) -> Tensor | VICRegTerms:
        """The loss of two or more (N, D) views, or its :class:`VICRegTerms`."""
        return vicreg_loss(
            *views,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
            eps=self.eps,
            algorithm=self.algorithm,
            synchronize=self.synchronize,
            process_group=self.process_group,
            grad_reduction=self.grad_reduction,
            return_terms=return_terms,
        )

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        names = ("invariance", "variance", "covariance", "eps", "algorithm", "synchronize", "grad_reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
