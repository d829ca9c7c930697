"""The projector: the MLP that maps a backbone's features to the embeddings which the loss compares."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, overload

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

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
        _check_size("in_features", in_features)
        _check_size("hidden_features", hidden_features)
        _check_size("out_features", out_features)
        _check_size("num_layers", num_layers)
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

    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...
    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    def __getitem__(self, idx: slice | int) -> nn.Module:
        # nn.Sequential slices into type(self)(layers), but the constructor here takes widths.
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"Projector: expected {name} to be an int, got {value!r} ({type(value).__name__}). Pass a whole number."
        )
    if value < 1:
        raise ValueError(f"Projector: expected {name} ≥ 1, got {value}. Use 1 or more.")
