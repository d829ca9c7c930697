"""The encoder, and the projector that is thrown away after pretraining."""

from typing import cast

from torch import Tensor, nn

from barlow_loss import Projector

from .errors import UsageError, require

DIGITS_ARCH = "digits-cnn"


class BarlowTwins(nn.Module):
    """backbone: images to representations, which one keeps; projector: representations to embeddings, for the loss."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.projector(self.backbone(images)))


def build_model(arch: str, projector: str) -> BarlowTwins:
    """Build an encoder by name and a projector by its layers, such as "8192-8192-8192".

    Raises:
        UsageError: an unknown ``arch``, or torchvision is needed and missing.
    """
    backbone, features = _digits_encoder() if arch == DIGITS_ARCH else _resnet(arch)
    *hidden, out_features = parse_projector(projector)
    hidden_features = hidden[0] if hidden else out_features
    return BarlowTwins(backbone, Projector(features, hidden_features, out_features, num_layers=len(hidden) + 1))


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


def _digits_encoder(width: int = 24) -> tuple[nn.Module, int]:
    """Four 3×3 convolutions for 1×8×8 images."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [*block(1, width), *block(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*block(2 * width, 4 * width), *block(4 * width, 4 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4 * width


def _resnet(arch: str) -> tuple[nn.Module, int]:
    """torchvision's ResNet family without the classifier; residual branches start at 0 (``zero_init_residual``)."""
    models = require("torchvision.models", f"--arch {arch}")
    known = [name for name in models.list_models(module=models) if "resne" in name]
    if arch not in known:
        raise UsageError(f"--arch {arch}: expected one of {', '.join(known)}")
    backbone = models.get_model(arch, weights=None, zero_init_residual=True)
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone, features
