"""An encoder in files of its own, and what other programs make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow_recipes import checkpoint
from barlow_recipes.encoders import SMALL_ARCHS, TIMM, Encoder, resnets
from barlow_recipes.errors import Aborted, require
from barlow_recipes.reporting import replacing
from barlow_recipes.weights import load_encoder

SAFETENSORS, CARD = "backbone.safetensors", "README.md"
SIDES = {"digits-cnn": (1, 8), "small-cnn": (3, 28)}  # channels and pixels of what else is not a photograph
PHOTOGRAPH = 3, 224


def file_names(encoder: Encoder) -> list[str]:
    """What :func:`write_files` writes, and the card."""
    return [SAFETENSORS, *([f"{_name(encoder)}.pth"] if _is_of_a_library(encoder) else []), CARD]


def _name(encoder: Encoder) -> str:
    return encoder.arch.removeprefix(TIMM)


def _is_of_a_library(encoder: Encoder) -> bool:
    """Whether torchvision or timm builds this encoder by its name alone."""
    return encoder.arch not in SMALL_ARCHS and encoder.stem == "imagenet"


def write_files(encoder: Encoder, folder: Path) -> list[Path]:
    """The encoder as safetensors and, where a library has its architecture, as that library's state_dict.

    Raises:
        Aborted: a file cannot be written.
    """
    library: Any = require("safetensors.torch", SAFETENSORS)
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.module.state_dict().items()}
    metadata = {"format": "pt", "arch": encoder.arch, "stem": encoder.stem}
    path = folder / SAFETENSORS
    with replacing(path) as temporary:
        temporary.write_bytes(library.save(state, metadata))
    if not _is_of_a_library(encoder):
        return [path]
    other = folder / f"{_name(encoder)}.pth"
    checkpoint.save(other, state)
    return [path, other]


def check(encoder: Encoder, path: Path) -> list[str]:
    """Load the file by every way that the card names, and compare the features of random images.

    Returns:
        The ways.

    Raises:
        Aborted: one of them gives other features.
    """
    images = torch.rand(2, *example_shape(encoder), generator=torch.Generator().manual_seed(0))
    expected = _features(encoder.module, images)
    ways = {"this program": lambda: load_encoder(path, encoder.arch, encoder.stem).module} | _libraries(encoder, path)
    for way, load in ways.items():
        if not torch.equal(_features(load(), images), expected):
            raise Aborted(f"{path}: loaded by {way}, the encoder has other features than the one that was exported")
    return list(ways)


def example_shape(encoder: Encoder) -> tuple[int, int, int]:
    """(C, H, W) of the images that the encoder is for."""
    if encoder.arch.startswith(TIMM):  # some take images of one size alone
        channels, height, width = encoder.module.default_cfg["input_size"]  # type: ignore[union-attr,index]
        return channels, height, width
    channels, side = SIDES.get(encoder.arch, PHOTOGRAPH)
    return channels, side, side


@torch.no_grad()
def _features(module: nn.Module, images: Tensor) -> Tensor:
    return module.cpu().eval()(images)


def _libraries(encoder: Encoder, path: Path) -> dict[str, Callable[[], nn.Module]]:
    """The libraries that build this architecture: each is given the file and nothing of this program."""
    if not _is_of_a_library(encoder):
        return {}
    name, of_timm = _name(encoder), encoder.arch.startswith(TIMM)
    ways: dict[str, Callable[[], nn.Module]] = {}
    if not of_timm:
        ways["torchvision"] = lambda: _by_torchvision(name, encoder.heads, path)
    if of_timm or name in resnets():  # whose names and layers are the same in both
        timm: Any = require("timm", "exporting for timm")
        if timm.is_model(name):
            ways["timm"] = lambda: _by_timm(timm, name, path)
    return ways


def _by_torchvision(name: str, heads: tuple[str, ...], path: Path) -> nn.Module:
    models: Any = require("torchvision.models", "exporting for torchvision")
    model: nn.Module = models.get_model(name, weights=None)
    for head in heads:
        model.set_submodule(head, nn.Identity())
    model.load_state_dict(_read(path))
    return model


def _by_timm(timm: Any, name: str, path: Path) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=0)
    model.load_state_dict(_read(path))
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        library: Any = require("safetensors.torch", path.name)
        return library.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
