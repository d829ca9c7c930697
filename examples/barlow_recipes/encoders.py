"""Encoders of any architecture: those that pretraining knows, and torchvision's and timm's without their classifier."""

from typing import Any, NamedTuple

from torch import nn

from barlow_recipes.errors import UsageError, require

SMALL_ARCHS = ("digits-cnn", "small-cnn")  # for the digits of 8 pixels, and for Fashion-MNIST
STEMS = ("imagenet", "cifar")
TIMM = "timm/"  # before the name of an architecture of timm
RANDOM = "random weights"


class Encoder(NamedTuple):
    """What makes features of images.

    ``module`` takes images (N, C, H, W) to features (N, ``features``). ``heads`` are the names of the classifier that
    it has no more: a file may have their weights.
    """

    module: nn.Module
    features: int
    arch: str
    stem: str
    source: str = RANDOM
    heads: tuple[str, ...] = ()


def build_encoder(arch: str, stem: str = "imagenet") -> Encoder:
    """An encoder with random weights.

    Args:
        arch: "digits-cnn", "small-cnn", a classifier of torchvision, such as "resnet50" or "vit_b_16", or of timm,
            such as "timm/convnext_tiny".
        stem: the first layers of a ResNet: "imagenet", or "cifar" for images of 32 pixels.

    Raises:
        UsageError: no such architecture, or the package that has it is missing.
    """
    if arch in SMALL_ARCHS:
        return Encoder(*build_backbone(arch), arch, stem)
    if arch.startswith(TIMM):
        return _of_timm(arch, stem)
    if arch in resnets():
        return Encoder(*build_backbone(arch, stem), arch, stem, heads=("fc",))
    return _of_torchvision(arch, stem)


def _of_torchvision(arch: str, stem: str) -> Encoder:
    models = require("torchvision.models", f"--arch {arch}")
    if arch not in models.list_models(module=models):
        raise UsageError(
            f"--arch {arch}: expected {', '.join(SMALL_ARCHS)}, a classifier of torchvision (resnet50, vit_b_16, ...) "
            f"or of timm ({TIMM}convnext_tiny, ...)"
        )
    module = models.get_model(arch, weights=None)
    linear = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise UsageError(f"--arch {arch}: expected a classifier that ends with a linear layer")
    name, layer = linear[-1]
    module.set_submodule(name, nn.Identity())
    return Encoder(module, layer.in_features, arch, stem, heads=(name,))


def _of_timm(arch: str, stem: str) -> Encoder:
    timm: Any = require("timm", f"--arch {arch}")
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        alike = timm.list_models(f"*{name}*")[:5]
        raise UsageError(f"--arch {arch}: timm has no model {name}" + (f"; it has {', '.join(alike)}" if alike else ""))
    module = timm.create_model(name, pretrained=False, num_classes=0)
    heads = module.default_cfg.get("classifier") or ()
    # Some, such as MobileNetV3 and VGG, have a layer of another width between the last feature map and the classifier.
    features = getattr(module, "head_hidden_size", module.num_features)
    return Encoder(module, features, arch, stem, heads=(heads,) if isinstance(heads, str) else tuple(heads))


def build_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """The encoder alone, with random weights, and the width of its features.

    Raises:
        UsageError: an unknown ``arch``, or torchvision is needed and missing.
    """
    return _small_encoder(arch) if arch in SMALL_ARCHS else _resnet(arch, stem)


def _small_encoder(arch: str) -> tuple[nn.Module, int]:
    """Four 3×3 convolutions and a pooling, for 1×8×8 images, or for 3×28×28, of which they see every second pixel."""
    channels, stride, widths = (1, 1, (24, 48, 96, 96)) if arch == "digits-cnn" else (3, 2, (16, 32, 64, 128))
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        layers += [nn.MaxPool2d(2)] if number == 2 else []
        convolution = nn.Conv2d(channels, width, 3, 1 if layers else stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def resnets() -> list[str]:
    """The names of torchvision's ResNet family."""
    models = require("torchvision.models", "--arch")
    return [name for name in models.list_models(module=models) if "resne" in name]


def _resnet(arch: str, stem: str) -> tuple[nn.Module, int]:
    """torchvision's ResNet family without the classifier; residual branches start at 0 (``zero_init_residual``).

    The "cifar" stem is one 3×3 convolution of stride 1 without pooling, for images of 32 pixels.
    """
    models = require("torchvision.models", f"--arch {arch}")
    if arch not in (known := resnets()):
        raise UsageError(f"--arch {arch}: expected one of {', '.join(known)}")
    backbone = models.get_model(arch, weights=None, zero_init_residual=True)
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        backbone.maxpool = nn.Identity()
    return backbone, features
