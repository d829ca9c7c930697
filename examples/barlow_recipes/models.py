"""The encoder, and the projector that is thrown away after pretraining."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from barlow_loss import Projector
from barlow_recipes.encoders import build_encoder, check_local_size
from barlow_recipes.errors import UsageError


class BarlowTwins(nn.Module):
    """backbone: images to representations, which one keeps; projector: representations to embeddings, for the loss.

    With ``chunks`` > 1 the images pass through the backbone in so many parts, one after the other. Of each part the
    features alone are kept, and the rest is computed again in the backward. Gradients are those of the whole batch for
    a backbone that treats images one by one (layer, group or frozen batch norms); another batch norm sees a part.
    ``heads`` is that of the :class:`~barlow_recipes.encoders.Encoder`.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, heads: tuple[str, ...] = (), chunks: int = 1) -> None:
        super().__init__()
        self.backbone, self.projector, self.heads, self.chunks = backbone, projector, heads, chunks

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, D)."""
        if self.chunks == 1:
            return cast("Tensor", self.projector(self.backbone(images)))
        represent = computed_twice(self.backbone)
        features = [represent(part) for part in images.tensor_split(self.chunks) if len(part)]
        return cast("Tensor", self.projector(torch.cat(features)))


def build_model(
    arch: str,
    projector: str,
    stem: str = "imagenet",
    channels: int = 3,
    image_size: int | None = None,
    local_size: int | None = None,
) -> BarlowTwins:
    """An encoder, as :func:`.encoders.build_encoder`, and a projector by its layers, such as "8192-8192-8192".

    UsageError where the encoder does not take images of ``local_size``, too.
    """
    encoder = build_encoder(arch, stem, channels, image_size)
    if local_size:
        check_local_size(encoder, local_size)
    *hidden, out_features = parse_projector(projector)
    hidden_features = hidden[0] if hidden else out_features
    layers = Projector(encoder.features, hidden_features, out_features, num_layers=len(hidden) + 1)
    return BarlowTwins(encoder.module, layers, encoder.heads)


def parse_projector(layers: str) -> list[int]:
    """Read "2048-2048-512": the layers' widths, the hidden ones equal."""
    widths = [int(width) for width in layers.split("-") if width.isdecimal()]
    if len(widths) != layers.count("-") + 1 or min(widths) < 1 or len(set(widths[:-1])) > 1:
        wanted = "expected widths such as 2048-2048-512, the hidden layers of one width, all positive"
        raise UsageError(f"--projector {layers}: {wanted}")
    return widths


def computed_twice(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's forward, of which only input and output are kept, and the rest is computed again in the backward.

    What batch norms keep of the images does not move again in the second pass.
    """

    @contextmanager
    def statistics_kept() -> Iterator[None]:
        kept = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
        for part, name, buffer in kept:
            setattr(part, name, buffer.clone())
        try:
            yield
        finally:
            for part, name, buffer in kept:
                setattr(part, name, buffer)

    return partial(
        checkpoint, module.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept())
    )
