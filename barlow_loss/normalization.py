"""Batch normalisation with float64-accurate statistics: a stateless function, and a layer for any module."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

# The base of nn.SyncBatchNorm too: what others look for when they look for batch normalisation.
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.lazy import LazyModuleMixin

from barlow_loss._collectives import ALONE, Group, check_group, group_of
from barlow_loss._header import MustMatch, check_on_all_ranks, check_samples, may_synchronize
from barlow_loss._module import OfGroup
from barlow_loss._normalize import normalize, normalize_with, values_per_channel
from barlow_loss._plan import is_batched
from barlow_loss._statistics import Moments, at_least_one
from barlow_loss._validation import check_eps, check_flags, check_tensor, two_dimensions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup

__all__ = ["DistributedBatchNorm", "standardize"]


def standardize(
    z: Tensor, eps: float = 1e-5, process_group: ProcessGroup | None = None, *, synchronize: bool = True
) -> Tensor:
    """Standardise each feature over the global batch: ẑ = (z − μ)/√(v + ε), v the biased variance.

    The normalisation that the loss applies to its views: without parameters, without running statistics, the same
    in training and evaluation. Statistics are accurate at any mean that the input can represent (float32, mean 1e4,
    standard deviation 1e-2: gradients within 1e-5 of float64, where ``F.batch_norm`` is off by 7e-3).
    Differentiable any number of times. With several processes the gradient is that of the sum of the ranks' losses, as
    with ``nn.SyncBatchNorm``; DDP's mean over the ranks makes it that of their mean.

    Args:
        z: this process's embeddings, (n, D), any floating dtype and strides; not modified. The batch of all processes
            has N ≥ 2 rows; shards may differ in length and be empty, except in a compiled graph.
        eps: added to the variance inside the root, ≥ 0. Features of variance far below it come out near 0.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the function.
        synchronize: False takes the statistics of this process's rows alone.

    Returns:
        ẑ of this process's rows, (n, D), in the dtype of ``z``; 16-bit inputs are computed in float32, with autocast or
        without. A feature that holds a NaN, or whose variance overflows, is NaN throughout; a constant feature is
        exactly 0 (eps > 0).

    Raises:
        TypeError: ``z`` is not a floating tensor, ``eps`` is not a number, or ``process_group`` is no process group.
        ValueError: ``z`` is not (N, D), N < 2, D = 0, or ``eps`` is negative; D, dtype or ``eps`` differ among the
            processes. Every process raises it, also where only one has the wrong argument.

    Example:
        >>> standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), eps=0.5)
        tensor([[-0.8165,  0.0000],
                [ 0.8165,  0.0000]])

    Source: Ioffe & Szegedy (2015), arXiv 1502.03167, algorithm 1, without γ and β; the ẑ of Zbontar et al. (2021).
    """
    group = group_of("standardize", process_group, synchronize)

    def check() -> tuple[int, MustMatch]:
        check_flags("standardize", synchronize=synchronize)
        check_tensor("standardize", "z", z)
        check_eps("standardize", eps)
        if z.ndim != 2 or z.shape[1] < 1:
            raise ValueError(
                f"standardize: expected z of shape (N, D) with D ≥ 1, got {tuple(z.shape)}. {two_dimensions(z.ndim)}"
            )
        needs_gradient = torch.is_grad_enabled() and z.requires_grad
        return z.shape[0], {"D": z.shape[1], "dtype": z.dtype, "eps": eps, "z needs a gradient": needs_gradient}

    shards = check_on_all_ranks("standardize", group, z, check)
    check_samples("standardize", z, shards)
    return normalize(z, None, None, float(eps), group)[0]


class DistributedBatchNorm(OfGroup, _BatchNorm):
    """Batch normalisation over the batch of a whole process group, on every device: (N, C) and (N, C, …).

    A drop-in for ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm``: the same constructor, state_dict, running
    statistics (unbiased variance) and behaviour in train() and eval(). Different: it takes every number of dimensions
    ≥ 2, its statistics are float64-accurate at large means, and it runs on CPU too.

    In training the statistics are those of all rows of the group, exactly, forward and backward, for shards of
    different lengths and for empty ones; the running statistics have the same bits on every rank. It costs three
    all-reduces of C, 2 C + 1 and 2 C float64 numbers, the last in backward. On the CPU a header comes before them, so
    that a wrong input on one rank raises on all. Accelerators and compiled graphs do not synchronise for one: there
    fewer than two values per channel leave the running statistics as they are, and elsewhere they raise.
    ``nn.SyncBatchNorm`` has fused kernels for CUDA.

    Args:
        num_features: number of channels C.
        eps: added to the variance inside the root, ≥ 0.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None for the cumulative average.
        affine: learn a scale and a shift per channel.
        track_running_stats: keep running statistics for eval(); without, eval() too uses those of the batch.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised). All of them call the layer, equally often.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers. It may be float32 while inputs have 16 bits.
        bias: False, of an affine layer: learn the scale alone.

    Shape:
        (N, C) or (N, C, …) → the same shape, memory format and dtype; float64 is computed in float64, everything else
        in float32, with autocast or without. In training, each channel of the global batch needs two values or more.

    Raises:
        TypeError: the input is not floating, ``process_group`` is no process group, or a flag is not a bool.
        ValueError: ``momentum`` is out of its range; the input has fewer than two dimensions or not C channels; in
            training, one value per channel.

    Example:
        >>> norm = DistributedBatchNorm(3)
        >>> norm(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])
        >>> model = DistributedBatchNorm.convert(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
        >>> [type(layer).__name__ for layer in model]
        ['ReLU', 'DistributedBatchNorm']

    Source: Ioffe & Szegedy (2015), arXiv 1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        check_eps("DistributedBatchNorm", eps)
        check_group("DistributedBatchNorm", process_group)
        check_flags("DistributedBatchNorm", affine=affine, track_running_stats=track_running_stats, bias=bias)
        given: Any = momentum
        number = not isinstance(given, bool) and isinstance(given, Real)
        if momentum is not None and not (number and 0 <= momentum <= 1):
            raise ValueError(
                f"DistributedBatchNorm: expected momentum in [0, 1] or None, got {momentum!r}. The usual value is 0.1; "
                "None averages over all batches."
            )
        super().__init__(  # pyright: ignore[reportUnknownMemberType]  # torch leaves device and dtype untyped
            num_features, float(eps), momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that every nn module has
        """Normalise (N, C) or (N, C, …), with the statistics of the batch in training."""
        if isinstance(input, Proxy):
            return _left_whole(self, input)
        group = group_of("DistributedBatchNorm", self.process_group) if self.training else ALONE
        values = self._values_per_channel(input, group)
        given = self._given_statistics(input, values)
        if given is not None:
            if self.training and self.num_batches_tracked is not None:  # of nothing
                self.num_batches_tracked.add_(1)
            return normalize_with(given, input, self.weight, self.bias, self.eps)
        if values is not None and values < 2:
            raise ValueError(
                f"DistributedBatchNorm: expected more than 1 value per channel when training, got input of shape "
                f"{tuple(input.shape)}. Use a larger batch, drop_last=True in the data loader, or eval()."
            )
        y, moments = normalize(input, self.weight, self.bias, self.eps, group)
        if self.training and self.track_running_stats:
            if is_batched(moments.m2):
                raise RuntimeError(
                    "DistributedBatchNorm: expected one batch at a time where running statistics are kept, got many by "
                    "torch.vmap. Pass track_running_stats=False, or call eval()."
                )
            self._track(moments)
        return y

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in every module, but that the conversions to ``nn.SyncBatchNorm``, which ask for it, are refused.

        They replace every batch norm and have no hook for a layer that wants to stay.

        Raises:
            RuntimeError: a function named as torch's, timm's or apex's asks.
        """
        if sys._getframe(1).f_code.co_name in ("convert_sync_batchnorm", "convert_syncbn_model"):  # pyright: ignore[reportPrivateUsage]
            raise RuntimeError(
                "DistributedBatchNorm: expected to stay, since it normalises over all processes already, but "
                "convert_sync_batchnorm would replace it and forget its process group. Leave that call out (in "
                "Lightning: sync_batchnorm=False); DistributedBatchNorm.convert(model) converts the other batch norms."
            )
        return super().named_children()

    @classmethod
    def convert(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """Replace every ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` inside ``module``, in place.

        Parameters and buffers stay the same objects, so optimisers stay valid; device, dtype and the training flag
        stay too. Module hooks do not, as with ``nn.SyncBatchNorm.convert_sync_batchnorm``.

        Args:
            module: any module.
            process_group: for the new layers; default: that of the ``nn.SyncBatchNorm`` replaced, else the world.

        Returns:
            ``module``, or the new layer where ``module`` is a batch normalisation itself.

        Raises:
            TypeError: a subclass of batch normalisation with a forward of its own, of which only the normalisation
                would survive. timm's BatchNormAct2d is known, and keeps its dropout and its activation.
            ValueError: a lazy layer that has not seen an input yet.
        """
        replaced: dict[nn.Module, nn.Module] = {
            layer: cls._like(layer, process_group)
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and not isinstance(layer, DistributedBatchNorm)
        }
        # A layer that is used under two names is converted once and replaced under both.
        names: list[tuple[str, nn.Module]] = list(cast("Any", module).named_modules(remove_duplicate=False))
        for path, child in names:
            if path and child in replaced:
                module.set_submodule(path, replaced[child])
        return replaced.get(module, module)

    @classmethod
    def _like(cls, old: _BatchNorm, process_group: ProcessGroup | None) -> DistributedBatchNorm:
        _check_convertible(old)
        new = (_NormAndActivation if _is_norm_and_activation(old) else cls)(
            old.num_features,
            old.eps,
            old.momentum,
            old.affine,
            old.track_running_stats,
            getattr(old, "process_group", None) if process_group is None else process_group,
            device="meta",  # every tensor is replaced below
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(old, name))
        for name, child in old.named_children():
            new.add_module(name, child)
        new.training = old.training
        return new

    def _values_per_channel(self, z: Any, group: Group) -> int | None:
        """Check the input, and count the values per channel in the batch; None where that would mean waiting."""

        def check() -> tuple[int, MustMatch]:
            self._check_input_dim(z)
            needs_gradient = torch.is_grad_enabled() and z.requires_grad
            return values_per_channel(z), {
                "C": self.num_features,
                "dtype": z.dtype,
                "z needs a gradient": needs_gradient,
            }

        # The layer's own device, since what comes in may be wrong on one rank, and all must take the same way.
        own = next((t for t in (self.running_mean, self.weight) if t is not None), z)
        if group.size > 1 and not (may_synchronize(own) and getattr(own, "is_cpu", True)):
            check()
            return None
        return check_on_all_ranks("DistributedBatchNorm", group, z, check).total

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        check_tensor("DistributedBatchNorm", "input", input)
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"DistributedBatchNorm: expected input of shape (N, C) or (N, C, *) with C = {self.num_features}, "
                f"got {tuple(input.shape)}. Channels come second; num_features is their number."
            )

    def _given_statistics(self, z: Tensor, values: int | None) -> Moments | None:
        """Statistics that do not come from the batch: the running ones in eval(); none in training."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return Moments(1, self.running_mean, torch.zeros_like(self.running_mean), self.running_var)
        if values == 0 or self.num_features == 0:  # passes, and updates nothing, as in nn.BatchNorm
            zeros = z.new_zeros(self.num_features)
            return Moments(1, zeros, zeros, torch.ones_like(zeros))
        return None

    @torch.no_grad()
    def _track(self, batch: Moments) -> None:
        """Move the running statistics towards the batch's; its variance unbiased, M₂/(n − 1), as torch has it."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        # There are two values or more, unless only the device knows; with fewer the statistics stay.
        enough = batch.n >= 2 if isinstance(batch.n, Tensor) else None
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, batch.mean), (self.running_var, batch.m2 / at_least_one(batch.n - 1))):
            weight = self.num_batches_tracked.reciprocal() if self.momentum is None else self.momentum
            running.lerp_(new.to(running.dtype), weight if enough is None else enough.to(running.dtype) * weight)


class _NormAndActivation(DistributedBatchNorm):
    """What timm's BatchNormAct2d becomes, on which most of its convolutional encoders stand."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if isinstance(input, Proxy):
            return _left_whole(self, input)
        dropout, activation = cast("Any", self.drop), cast("Any", self.act)
        return cast("Tensor", activation(dropout(super().forward(input))))


def _left_whole(layer: nn.Module, proxy: Proxy) -> Any:
    """The call of a layer in the graph of torch.fx: symbolic tracing does not enter torch's own layers either."""
    tracer = cast("Any", proxy.tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (proxy,), {})


def _is_norm_and_activation(layer: _BatchNorm) -> bool:
    return type(layer).__name__ == "BatchNormAct2d" and {name for name, _ in layer.named_children()} == {"drop", "act"}


def _check_convertible(layer: _BatchNorm) -> None:
    name = type(layer).__name__
    if isinstance(layer, LazyModuleMixin):  # its class becomes nn.BatchNorm*d with the first input
        raise ValueError(
            f"DistributedBatchNorm.convert: expected initialised layers, got a {name} that has seen no input. "
            "Run one batch through the module first."
        )
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and not _is_norm_and_activation(layer):
        raise TypeError(
            f"DistributedBatchNorm.convert: expected nn.BatchNorm1d/2d/3d or nn.SyncBatchNorm, got {name}, whose own "
            "forward does more than normalise and would be lost. Replace it by plain layers before converting."
        )
