"""An encoder in files of its own, what other programs make of them, and where they are published."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from barlow_recipes import checkpoint
from barlow_recipes.encoders import SMALL_ARCHS, TIMM, Encoder, is_own, resnets
from barlow_recipes.errors import Aborted, UsageError, first_line, require
from barlow_recipes.outputs import replacing
from barlow_recipes.weights import digest, load_encoder

SAFETENSORS, CARD = "backbone.safetensors", "README.md"


def file_names(encoder: Encoder) -> list[str]:
    """What :func:`write_files` writes, and the card."""
    return [SAFETENSORS, *([f"{encoder.arch.removeprefix(TIMM)}.pth"] if building_code(encoder) else []), CARD]


def building_code(encoder: Encoder) -> dict[str, str]:
    """Of each library that has the architecture: code that builds ``model`` with nothing of this program."""
    name, of_timm = encoder.arch.removeprefix(TIMM), encoder.arch.startswith(TIMM)
    ours = name in SMALL_ARCHS or is_own(encoder.arch) or encoder.stem != "imagenet"
    if ours or (encoder.shape[0] != 3 and not of_timm):
        return {}
    require("timm", "exporting")
    options = "".join(f", {key}={value!r}" for key, value in encoder.options.items())
    by_timm = f"import timm, torch\n\nmodel = timm.create_model({name!r}, num_classes=0{options})\n"
    if of_timm:
        return {"timm": by_timm}
    by_torchvision = f"import torch, torchvision\n\nmodel = torchvision.models.get_model({name!r}{options})\n"
    by_torchvision += "".join(f"model.set_submodule({head!r}, torch.nn.Identity())\n" for head in encoder.heads)
    # The ResNets have the same names and layers in both.
    return {"torchvision": by_torchvision} | ({"timm": by_timm} if name in resnets() else {})


def write_files(encoder: Encoder, folder: Path) -> list[Path]:
    """The encoder as safetensors and, where a library has its architecture, as that library's state_dict (Aborted)."""
    library: Any = require("safetensors.torch", SAFETENSORS)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in encoder.module.state_dict().items()}
    channels, side, _ = encoder.shape
    facts = {"arch": encoder.arch, "stem": encoder.stem, "channels": str(channels), "image_size": str(side)}
    facts |= {name: json.dumps([*values]) for name, values in encoder.pixels.items()}
    name, *others, _ = file_names(encoder)
    with replacing(folder / name) as temporary:
        temporary.write_bytes(library.save(state, {"format": "pt"} | facts))
    for other in others:
        checkpoint.save(folder / other, state)
    return [folder / name for name in (name, *others)]


@torch.no_grad()
def check(encoder: Encoder, path: Path) -> list[str]:
    """Load the file by every way that the card names, and compare weights and features bit for bit (Aborted)."""
    images = torch.rand(2, *encoder.shape, generator=torch.Generator().manual_seed(0))
    expected = encoder.module.cpu().eval()(images)
    loaded = {"this program": load_encoder(path, encoder.arch, encoder.stem, *encoder.shape[:2]).module}
    library: Any = require("safetensors.torch", path.name)
    of_torch = path.suffix == ".pth"
    state = torch.load(path, map_location="cpu", weights_only=True) if of_torch else library.load_file(path)
    for way, code in building_code(encoder).items():
        exec(code, names := {})
        loaded[way] = names["model"]
        loaded[way].load_state_dict(state)
    for way, module in loaded.items():
        if digest(module) != digest(encoder.module) or not torch.equal(module.eval()(images), expected):
            raise Aborted(f"{path}: loaded by {way}, the encoder is not the one that was exported")
    return list(loaded)


def hub_of(repository: str) -> Any:
    """The Hugging Face Hub, where the user may write (UsageError)."""
    hub: Any = require("huggingface_hub", f"--push {repository}")
    api = hub.HfApi()
    try:
        api.whoami()
    except Exception as error:  # of the client below, as well
        reason = f"expected somebody logged in to the Hugging Face Hub ({first_line(error)})"
        raise UsageError(f"--push {repository}: {reason}. Log in with: hf auth login") from None
    return api


def push(api: Any, repository: str, files: Sequence[Path]) -> str:
    """Upload the files of one folder to a repository, new or not; its address (Aborted)."""
    folder, names = files[0].parent, [file.name for file in files]
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)
    except Exception as error:  # of the client below, as well
        raise Aborted(f"--push {repository}: {first_line(error)}; the files are in {folder}") from None
    return str(address)
