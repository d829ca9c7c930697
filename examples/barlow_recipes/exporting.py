"""An encoder in files of its own, what other programs make of them, and where they are published."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow_recipes import checkpoint
from barlow_recipes.encoders import SMALL_ARCHS, TIMM, Encoder, resnets
from barlow_recipes.errors import Aborted, UsageError, first_line, require
from barlow_recipes.outputs import replacing
from barlow_recipes.weights import load_encoder

SAFETENSORS, CARD = "backbone.safetensors", "README.md"


def file_names(encoder: Encoder) -> list[str]:
    """What :func:`write_files` writes, and the card."""
    return [SAFETENSORS, *([f"{encoder.arch.removeprefix(TIMM)}.pth"] if _libraries(encoder) else []), CARD]


def _libraries(encoder: Encoder) -> dict[str, Callable[[], nn.Module]]:
    """The libraries that build this encoder by its name: how, with nothing of this program."""
    arch, options = encoder.arch, encoder.options
    if arch in SMALL_ARCHS or encoder.stem != "imagenet" or (":" in arch and not arch.startswith(TIMM)):
        return {}
    timm: Any = require("timm", "exporting")
    if arch.startswith(TIMM):
        return {"timm": partial(timm.create_model, arch.removeprefix(TIMM), num_classes=0, **options)}
    if encoder.shape[0] != 3:
        return {}
    ways: dict[str, Callable[[], nn.Module]] = {"torchvision": lambda: _of_torchvision(encoder)}
    if arch in resnets() and timm.is_model(arch):  # whose names and layers are the same in both
        ways["timm"] = partial(timm.create_model, arch, num_classes=0)
    return ways


def _of_torchvision(encoder: Encoder) -> nn.Module:
    models: Any = require("torchvision.models", "exporting")
    model: nn.Module = models.get_model(encoder.arch, weights=None, **encoder.options)
    for head in encoder.heads:
        model.set_submodule(head, nn.Identity())
    return model


def write_files(encoder: Encoder, folder: Path) -> list[Path]:
    """The encoder as safetensors and, where a library has its architecture, as that library's state_dict.

    Raises:
        Aborted: a file cannot be written.
    """
    library: Any = require("safetensors.torch", SAFETENSORS)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in encoder.module.state_dict().items()}
    channels, side, _ = encoder.shape
    facts = {"arch": encoder.arch, "stem": encoder.stem, "channels": str(channels), "image_size": str(side)}
    name, *others, _ = file_names(encoder)
    with replacing(folder / name) as temporary:
        temporary.write_bytes(library.save(state, {"format": "pt"} | facts))
    for other in others:
        checkpoint.save(folder / other, state)
    return [folder / name for name in (name, *others)]


def check(encoder: Encoder, path: Path) -> list[str]:
    """Load the file by every way that the card names, and compare the features of random images.

    Returns:
        The ways.

    Raises:
        Aborted: one of them gives other features.
    """
    images = torch.rand(2, *encoder.shape, generator=torch.Generator().manual_seed(0))
    expected = _features(encoder.module, images)
    loaded = {"this program": load_encoder(path, encoder.arch, encoder.stem, *encoder.shape[:2]).module}
    for way, build in _libraries(encoder).items():
        loaded[way] = build()
        loaded[way].load_state_dict(_read(path))
    for way, module in loaded.items():
        if not torch.equal(_features(module, images), expected):
            raise Aborted(f"{path}: loaded by {way}, the encoder has other features than the one that was exported")
    return list(loaded)


@torch.no_grad()
def _features(module: nn.Module, images: Tensor) -> Tensor:
    return module.cpu().eval()(images)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        library: Any = require("safetensors.torch", path.name)
        return library.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def hub_of(repository: str) -> Any:
    """The Hugging Face Hub, where the user may write.

    Raises:
        UsageError: its package is missing, nobody is logged in, or it cannot be reached.
    """
    hub: Any = require("huggingface_hub", f"--push {repository}")
    api = hub.HfApi()
    try:
        api.whoami()
    except Exception as error:  # of the client below, as well
        reason = f"expected somebody logged in to the Hugging Face Hub ({first_line(error)})"
        raise UsageError(f"--push {repository}: {reason}. Log in with: hf auth login") from None
    return api


def push(api: Any, repository: str, files: Sequence[Path]) -> str:
    """Upload the files of one folder to a repository, which is made if there is none.

    Returns:
        The address.

    Raises:
        Aborted: the hub does not take them.
    """
    try:
        address = api.create_repo(repository, exist_ok=True)
        names = [file.name for file in files]
        api.upload_folder(repo_id=repository, folder_path=files[0].parent, allow_patterns=names)
    except Exception as error:  # of the client below, as well
        raise Aborted(f"--push {repository}: {first_line(error)}; the files are in {files[0].parent}") from None
    return str(address)
