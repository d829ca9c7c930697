"""The encoder, and the projector that is thrown away after pretraining."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from barlow_loss import Projector
from barlow_recipes.encoders import build_encoder
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
        return cast("Tensor", self.projector(self.represent(images)))

    def represent(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, features)."""
        if self.chunks == 1:
            return cast("Tensor", self.backbone(images))
        represent = computed_twice(self.backbone)
        return torch.cat([represent(part) for part in images.tensor_split(self.chunks) if len(part)])


def build_model(
    arch: str, projector: str, stem: str = "imagenet", channels: int = 3, image_size: int | None = None
) -> BarlowTwins:
    """Build an encoder, as :func:`.encoders.build_encoder`, and a projector by its layers, such as "8192-8192-8192".

    Raises:
        UsageError: one of them cannot be built.
    """
    encoder = build_encoder(arch, stem, channels, image_size)
    *hidden, out_features = parse_projector(projector)
    hidden_features = hidden[0] if hidden else out_features
    layers = Projector(encoder.features, hidden_features, out_features, num_layers=len(hidden) + 1)
    return BarlowTwins(encoder.module, layers, encoder.heads)


def has_batch_norms(backbone: nn.Module) -> bool:
    """Whether an image's features depend, in training, on the other images of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in backbone.modules())


def parse_projector(layers: str) -> list[int]:
    """Read "2048-2048-512": the layers' widths, the hidden ones equal."""
    try:
        widths = [int(width) for width in layers.split("-")]
    except ValueError:
        widths = []
    if not widths or min(widths) < 1 or len(set(widths[:-1])) > 1:
        raise UsageError(
            f"--projector {layers}: expected widths such as 2048-2048-512, the hidden layers of one width, all positive"
        )
    return widths


def checkpoint_activations(backbone: nn.Module) -> None:
    """Keep of every residual block its input alone, and compute the rest again in the backward.

    Raises:
        UsageError: the encoder has no residual blocks.
    """
    blocks = [block for layer in ("layer1", "layer2", "layer3", "layer4") for block in getattr(backbone, layer, ())]
    if not blocks:
        raise UsageError("--checkpoint-activations: expected a ResNet, whose residual blocks are computed twice")
    for block in blocks:
        block.forward = computed_twice(block)


def computed_twice(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's forward, of which only input and output are kept, and the rest is computed again in the backward."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(module)

    return partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """A second pass over the same images is no second look at them: what batch norms keep must not move again."""
    kept = [
        (module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
