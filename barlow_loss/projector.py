"""The projector: the MLP that maps a backbone's features to the embeddings which the loss compares."""

from __future__ import annotations

from collections import OrderedDict
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["Projector"]


class Projector(nn.Sequential):
    """Linear → norm → ReLU, repeated, then one last Linear: the projector of Barlow Twins.

    No Linear has a bias: the normalisation after it, or the loss after the last one, would subtract it again.
    The state_dict keys of the default depth are those of the official projector (``0.weight``, ``1.weight``,
    ``1.bias``, ``1.running_mean``, …, ``3.weight``, …, ``6.weight``), so its checkpoints load with ``strict=True``.

    Args:
        in_features: width of the backbone's output, ≥ 1 (2048 for a ResNet-50).
        hidden_features: width of every hidden layer, ≥ 1.
        out_features: width D of the embedding, ≥ 1. The loss profits from a wide one, here at no quadratic cost.
        num_layers: number of Linear layers, ≥ 1. With 1 the projector is a single Linear.
        norm_layer: makes the normalisation of a hidden layer from its width,
            e.g. ``nn.BatchNorm1d`` or :class:`barlow_loss.DistributedBatchNorm`.

    Shape:
        (N, in_features) → (N, out_features); the dtype is that of ``nn.Linear``: the parameters', or autocast's.

    Raises:
        TypeError: a size is not an int, or ``norm_layer`` is not callable.
        ValueError: a size is below 1.

    Example:
        >>> import torch
        >>> projector = Projector(512, hidden_features=1024, out_features=2048)
        >>> projector(torch.randn(8, 512)).shape
        torch.Size([8, 2048])

    Source: Zbontar et al. (2021), arXiv 2103.03230, section 2.2: three Linear layers of 8192 units each, the first
    two followed by batch normalisation and a rectified linear unit.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 8192,
        out_features: int = 8192,
        num_layers: int = 3,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm1d,
    ) -> None:
        in_features = _size("in_features", in_features)
        hidden_features = _size("hidden_features", hidden_features)
        out_features = _size("out_features", out_features)
        num_layers = _size("num_layers", num_layers)
        if not callable(norm_layer):
            raise TypeError(
                f"Projector: expected norm_layer to make a module from a width, got {norm_layer!r}. "
                "Pass the class, for example nn.BatchNorm1d."
            )
        layers: list[nn.Module] = []
        width = in_features
        for _ in range(num_layers - 1):
            layers += [
                nn.Linear(width, hidden_features, bias=False),
                norm_layer(hidden_features),
                nn.ReLU(inplace=True),
            ]
            width = hidden_features
        super().__init__(*layers, nn.Linear(width, out_features, bias=False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in every module, after a check of the width: it is here because torch.fx and torch.jit read forward."""
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            width, given = getattr(self[0], "in_features", None), args[0] if args else None
            if not isinstance(given, torch.Tensor) or width is None or given.shape[-1:] == (width,):
                raise
            raise ValueError(
                f"Projector: expected input of shape (N, {width}), got {tuple(given.shape)}. Pool feature maps with "
                f"z.flatten(2).mean(2), or build Projector(in_features={given.shape[1] if given.ndim == 2 else '...'})."
            ) from error

    @classmethod
    def from_checkpoint(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm1d,
    ) -> Projector:
        """The projector of a checkpoint of the official program, its widths included.

        The file is read with ``weights_only=True``: nothing in it is run.

        Args:
            source: path of the official ``checkpoint.pth``, or a dict: what is in it, the ``state_dict`` of its model
                (``module.projector.*`` or ``projector.*``), or a projector's own.
            norm_layer: as of :class:`Projector`; its state_dict keys must be those of ``nn.BatchNorm1d``.

        Returns:
            The projector on the CPU, in the dtype of a new ``nn.Linear``, and in ``train()``.

        Raises:
            OSError: the file cannot be read.
            TypeError: ``source`` holds no dict.
            ValueError: there is no projector in it, or one of another form; it names the first missing and unexpected
                keys, or the first shape that differs.

        Example:
            >>> checkpoint = {"epoch": 1, "model": {
            ...     f"module.projector.{name}": tensor
            ...     for name, tensor in Projector(512, 1024, 2048).state_dict().items()
            ... }}
            >>> Projector.from_checkpoint(checkpoint)[6]
            Linear(in_features=1024, out_features=2048, bias=False)

        Source: ``main.py`` of facebookresearch/barlowtwins, which saves epoch, model and optimizer.
        """
        from barlow_loss._checkpoints import read_projector

        state = read_projector(source)
        weights = [tensor for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2]
        if not weights:
            raise ValueError(
                f"Projector.from_checkpoint: expected the weights of linear layers, got {list(state)[:3]}. "
                "Pass a checkpoint that has a projector."
            )
        hidden_features = weights[0].shape[0]
        projector = cls(weights[0].shape[1], hidden_features, weights[-1].shape[0], len(weights), norm_layer)
        if problem := _misfit(projector.state_dict(), state):
            raise ValueError(
                f"Projector.from_checkpoint: expected {len(weights)} linear layers without biases, {hidden_features} "
                f"wide except the last, with a norm and a ReLU between them, but {problem}. "
                "Build another form as a module of your own."
            )
        projector.load_state_dict(state)
        return projector

    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...
    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    def __getitem__(self, idx: slice | int) -> nn.Module:
        # nn.Sequential slices into type(self)(layers), but the constructor here takes widths.
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    missing, unexpected = (
        [name for name in left if name not in right] for left, right in ((expected, found), (found, expected))
    )
    if missing or unexpected:
        names = (("missing", missing), ("unexpected", unexpected))
        return " and ".join(f"{len(keys)} keys are {what}, first {keys[0]}" for what, keys in names if keys)
    return next(
        (
            f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if found[name].shape != tensor.shape
        ),
        "",
    )


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"Projector: expected {name} to be an int, got {value!r} ({type(value).__name__}). Pass a whole number."
        )
    if value < 1:
        raise ValueError(f"Projector: expected {name} ≥ 1, got {value}. Use 1 or more.")
    return int(value)
