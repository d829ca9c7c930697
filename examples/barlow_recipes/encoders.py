"""Encoders of any architecture: those that pretraining knows, and torchvision's and timm's without their classifier."""

from typing import Any, NamedTuple

from torch import nn

from barlow_recipes.errors import UsageError, require
from barlow_recipes.models import SMALL_ARCHS, build_backbone, resnets

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
