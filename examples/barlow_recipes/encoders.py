"""Encoders of any architecture: our small ones, torchvision's and timm's without their classifier, and the user's."""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow_recipes.errors import UsageError, first_line, require

SMALL_ARCHS = ("digits-cnn", "small-cnn")  # for the digits of 8 pixels, and for Fashion-MNIST
STEMS = ("imagenet", "cifar")
TIMM = "timm/"  # before the name of an architecture of timm
PHOTOGRAPH = 224
REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)  # each architecture has its own way to say no


class Encoder(NamedTuple):
    """``module`` takes images (N, C, H, W) to features (N, ``features``); it was built for (C, H, W) = ``shape``."""

    module: nn.Module
    features: int
    arch: str
    stem: str  # the first layers of a ResNet: "imagenet", or "cifar" for images of 32 pixels
    source: str = "random weights"
    heads: tuple[str, ...] = ()  # names of the classifier that it has no more: a file may have their weights
    shape: tuple[int, int, int] = (3, PHOTOGRAPH, PHOTOGRAPH)
    options: Mapping[str, Any] = {}  # what its library was asked for beside the name
    pixels: Mapping[str, Any] = {}  # the flags of its images when it was trained, if known


def build_encoder(arch: str, stem: str = "imagenet", channels: int = 3, image_size: int | None = None) -> Encoder:
    """An encoder with random weights; UsageError where it, or its package, is missing or cannot take such images.

    ``arch`` is "digits-cnn" (grey), "small-cnn", a classifier of torchvision, such as "resnet50" or "vit_b_16", of
    timm, such as "timm/convnext_tiny", or "module:callable", which gives an nn.Module; where it has arguments
    ``channels`` and ``image_size``, it is told them. ``image_size`` is for those that are built for one.
    """
    if arch in SMALL_ARCHS:
        return _small_encoder(arch, stem, channels)
    if arch in resnets():  # they take images of any size
        return _of_torchvision(arch, stem, channels)
    if stem != "imagenet":
        raise UsageError(f"--stem {stem}: expected a ResNet of torchvision, got --arch {arch}")
    if is_own(arch):
        return _own(arch, channels, image_size)
    options, found = _plan(arch, channels, image_size)
    build = _of_timm if arch.startswith(TIMM) else _of_torchvision
    return build(arch, stem, channels, **options)._replace(**found)


def is_own(arch: str) -> bool:
    """Whether it names code of the user's."""
    return ":" in arch and not arch.startswith(TIMM)


def _small_encoder(arch: str, stem: str, channels: int) -> Encoder:
    """Four 3×3 convolutions and a pooling, for 1×8×8 images, or for C×28×28, of which they see every second pixel."""
    side, stride, widths = (8, 1, (24, 48, 96, 96)) if arch == "digits-cnn" else (28, 2, (16, 32, 64, 128))
    width_before = channels = 1 if arch == "digits-cnn" else channels
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        layers += [nn.MaxPool2d(2)] if number == 2 else []
        convolution = nn.Conv2d(width_before, width, 3, 1 if layers else stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        width_before = width
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Encoder(module, widths[-1], arch, stem, shape=(channels, side, side))


def resnets() -> list[str]:
    """The names of torchvision's ResNet family."""
    models = require("torchvision.models", "--arch")
    return [name for name in models.list_models(module=models) if "resne" in name]


def _of_torchvision(arch: str, stem: str, channels: int, **options: Any) -> Encoder:
    """A classifier without its last layer. Residual branches of a ResNet start at 0 (``zero_init_residual``)."""
    models = require("torchvision.models", f"--arch {arch}")
    if arch not in models.list_models(module=models):
        raise UsageError(
            f"--arch {arch}: expected {', '.join(SMALL_ARCHS)}, a classifier of torchvision (resnet50, vit_b_16, ...) "
            f"or of timm ({TIMM}convnext_tiny, ...), or your own as module:callable"
        )
    start = {"zero_init_residual": True} if arch in resnets() else {}
    module = models.get_model(arch, weights=None, **start, **options)
    module.aux_logits = False  # of GoogLeNet and Inception: else they give a tuple in training
    linear = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise UsageError(f"--arch {arch}: expected a classifier that ends with a linear layer")
    name, layer = linear[-1]
    module.set_submodule(name, nn.Identity())
    if stem == "cifar":
        module.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        module.maxpool = nn.Identity()
    elif channels != 3:  # the new weights are drawn as widely
        first, old = next((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
        how: Any = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups, old.bias is not None)
        new = nn.Conv2d(channels, old.out_channels, *how)
        new.weight = nn.Parameter(torch.randn_like(new.weight) * old.weight.detach().std())
        module.set_submodule(first, new)
    shape = (channels, PHOTOGRAPH, PHOTOGRAPH)
    return Encoder(module, layer.in_features, arch, stem, heads=(name,), shape=shape, options=options)


def _of_timm(arch: str, stem: str, channels: int, **options: Any) -> Encoder:
    timm: Any = require("timm", f"--arch {arch}")
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        alike = timm.list_models(f"*{name}*")[:5]
        raise UsageError(f"--arch {arch}: timm has no model {name}" + (f"; it has {', '.join(alike)}" if alike else ""))
    options |= {} if channels == 3 else {"in_chans": channels}
    module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    heads = module.default_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    shape = (channels, *module.default_cfg["input_size"][1:])
    return Encoder(module, module.num_features, arch, stem, heads=heads, shape=shape, options=options)


@cache
def _plan(arch: str, channels: int, image_size: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a library is to build an encoder for images of this size: found by trying, without memory for its weights.

    Returns what to ask for beside the name, and what was found out of the encoder: its ``features`` and ``shape``.
    """
    of_timm = arch.startswith(TIMM)
    build = _of_timm if of_timm else _of_torchvision
    ways: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}] if of_timm else [{}]
    ways += [{"img_size" if of_timm else "image_size": image_size}] if image_size else []
    given = {"shape": (channels, image_size, image_size)} if image_size else {}
    reasons = []
    for options in ways:
        try:
            with torch.device("meta"):
                encoder = build(arch, "imagenet", channels, **options)._replace(**given)
                return options, given | {"features": _width(encoder)}
        except NotImplementedError:  # RegNets of torchvision need memory, and take images of any size
            return options, given
        except REFUSALS as error:
            reasons += [error] if "unexpected keyword" not in str(error) else []
    raise _refusal(arch, channels, image_size or PHOTOGRAPH, reasons[-1])


def _refusal(arch: str, channels: int, side: int, error: Exception) -> UsageError:
    return UsageError(f"--arch {arch}: cannot take {side} pixels of {channels} channels ({first_line(error)})")


@torch.no_grad()
def _width(encoder: Encoder) -> int:
    """Of the features that it makes of two images; in eval(), as the weights may be those that will be trained."""
    features = encoder.module.eval()(torch.zeros(2, *encoder.shape))
    encoder.module.train()
    if isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2:
        return features.shape[1]
    found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
    raise UsageError(
        f"--arch {encoder.arch}: expected features of shape (2, F) for two images, got {found}. An encoder ends with a "
        "pooling, such as nn.AdaptiveAvgPool2d(1) and nn.Flatten(), and gives nothing else"
    )


def check_local_size(encoder: Encoder, side: int) -> None:
    """UsageError where it makes no features, or others than of whole images, of local crops with so many pixels."""
    channels, whole, _ = encoder.shape
    try:
        if (features := _width(encoder._replace(shape=(channels, side, side)))) == encoder.features:
            return
        reason = f"{features} features in place of {encoder.features}"
    except REFUSALS as error:
        reason = first_line(error)
    remedy = f"give {whole}, or another encoder: ResNets take any size, timm's ViTs multiples of their patch"
    raise UsageError(f"--local-size {side}: --arch {encoder.arch} does not take it ({reason}): {remedy}")


def _own(arch: str, channels: int, image_size: int | None) -> Encoder:
    function, side = imported(arch, "--arch"), image_size or PHOTOGRAPH
    offered = {"channels": channels, "image_size": side}
    module = function(**{name: offered[name] for name in offered if name in inspect.signature(function).parameters})
    if not isinstance(module, nn.Module):
        raise UsageError(f"--arch {arch}: expected a function that gives an nn.Module, got a {type(module).__name__}")
    encoder = Encoder(module, 0, arch, "imagenet", shape=(channels, side, side))
    try:
        return encoder._replace(features=_width(encoder))
    except REFUSALS as error:
        raise _refusal(arch, channels, side, error) from None


def imported(name: str, flag: str) -> Callable[..., Any]:
    """What "module:callable" names (UsageError); the module may lie in the working directory."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the module raises
        raise UsageError(f"{flag} {name}: cannot be imported ({type(error).__name__}: {first_line(error)})") from None
    if not callable(found):
        raise UsageError(f"{flag} {name}: expected a callable, got a {type(found).__name__}")
    return found


def freeze(encoder: nn.Module, names: Sequence[str]) -> None:
    """Let parts of an encoder stand still: their parameters, and what their batch norms keep, also in training.

    ``names`` are submodules or parameters (UsageError), such as "layer1" or "layer4.0.conv1"; "all" is all of it. From
    now on ``encoder.train()`` leaves the batch norms of these parts in evaluation.
    """
    for part in names:
        found = [parameter for name, parameter in encoder.named_parameters() if is_within(name, [part])]
        if not found:
            known = dict.fromkeys(name.partition(".")[0] for name, _ in encoder.named_parameters())
            raise UsageError(
                f"--freeze {part}: the encoder has no such part; expected all, {', '.join(known)} or a part of one"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    encoder.train = partial(_train_the_rest, encoder, tuple(names))  # type: ignore[method-assign]
    encoder.train(encoder.training)


def _train_the_rest(encoder: nn.Module, frozen: Sequence[str], mode: bool = True) -> nn.Module:
    type(encoder).train(encoder, mode)
    for name, module in encoder.named_modules():
        if hasattr(module, "running_mean") and is_within(name, frozen):
            module.eval()
    return encoder


def is_within(name: str, parts: Sequence[str]) -> bool:
    """Whether a name is one of these, or of something inside of one; all are within "all"."""
    return any(part == "all" or name == part or name.startswith(f"{part}.") for part in parts)
