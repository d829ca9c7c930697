"""Give a pretrained encoder away: in files that plain torchvision and timm load, with a card that says what it is.

    python examples/export_backbone.py --weights runs/imagenet-resnet50 --out to-publish

The folder gets ``backbone.safetensors``; where torchvision or timm has the architecture, ``NAME.pth``, a state_dict for
it; and ``README.md``, the model card, filled from the run's own records. Each file is read back, and the encoder in it
compared bit for bit with the one that was exported. --push uploads them. Of others' weights the card says less.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from barlow_loss import __version__
from barlow_recipes import checkpoint
from barlow_recipes.command_line import read
from barlow_recipes.encoders import SMALL_ARCHS, TIMM, Encoder, is_own
from barlow_recipes.errors import Aborted, UsageError, first_line, require
from barlow_recipes.metrics import accuracies_of, accuracy_cells, read_rows
from barlow_recipes.outputs import BACKBONE, METRICS, replacing, writing
from barlow_recipes.program import exit_status, start
from barlow_recipes.weights import OFFICIAL, OURS, digest, load_encoder, read_weights, save_safetensors

SAFETENSORS, CARD = "backbone.safetensors", "README.md"
TEMPLATE = """
# {name}, pretrained with Barlow Twins{data}

An encoder: it takes images of shape {shape} to {features} features. It has {parameters:,} parameters.
It was trained without labels to give two distorted views of an image features that agree and do not repeat each other
(Zbontar et al., *Barlow Twins: Self-Supervised Learning via Redundancy Reduction*, ICML 2021, arXiv 2103.03230).

## Loading it

```python
{loading}
features = model.eval()(images)  # (N, {features})
```

## Pretraining

From {layout}; how it was made, and its images normalised:

```yaml
{settings}```

## What it is worth

Held-out images of the pretraining data, frozen features, top-1:

{worth}

What has not been measured: how well it does on images unlike those it has seen, and for whom it does worse.

The terms under which the images and these weights may be used are for whoever publishes them to add here.
Written by barlow-loss {version}.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    weights: Path  # a run's folder, or a file of weights
    arch: str | None = None  # architecture: of torchvision, timm/NAME or module:callable; without it as the file says
    stem: str | None = None  # first layers of a ResNet: imagenet or cifar; without it as the file says
    out: Path | None = None  # folder for the files; without it export/ in the run's folder, or beside the file
    overwrite: bool = False  # replace the files there
    push: str | None = None  # repository of the Hugging Face Hub, such as NAME/resnet50-barlow, to which to upload them


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read(Settings, argv, __doc__ or "")))


def run(settings: Settings) -> None:
    """Load, write, read back, describe, upload."""
    hub = hub_of(settings.push) if settings.push else None  # now, not after the work
    encoder = load_encoder(settings.weights, settings.arch, settings.stem)
    record = read_record(settings.weights)
    out = settings.out or (settings.weights if settings.weights.is_dir() else settings.weights.parent) / "export"
    taken = [name for name in file_names(encoder) if (out / name).exists()]
    if taken and not settings.overwrite:
        raise UsageError(f"--out {out}: holds {taken[0]}. Choose another folder, or --overwrite")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    files = write_files(encoder, out)
    print(f"{encoder.arch} of {encoder.source}")
    for file in files:
        loaders = check(encoder, file)
        print(f"{file}: the same bits when loaded by {' and '.join(loaders)}")
    card = write_card(encoder, files, record)
    print(f"{card}: the model card" + ("" if record["settings"] else "; it does not say how it was pretrained"))
    if hub and settings.push:
        print(f"uploaded to {push(hub, settings.push, [*files, card])}")


def file_names(encoder: Encoder) -> list[str]:
    """What :func:`write_files` writes, and the card."""
    return [SAFETENSORS, *([f"{encoder.arch.removeprefix(TIMM)}.pth"] if building_code(encoder) else []), CARD]


def building_code(encoder: Encoder) -> str:
    """That builds ``model`` by the library that has the architecture, with nothing of this program; "" if none has."""
    name, of_timm = encoder.arch.removeprefix(TIMM), encoder.arch.startswith(TIMM)
    ours = name in SMALL_ARCHS or is_own(encoder.arch) or encoder.stem != "imagenet"
    if ours or (encoder.shape[0] != 3 and not of_timm):
        return ""
    options = "".join(f", {key}={value!r}" for key, value in encoder.options.items())
    if of_timm:
        return f"import timm, torch\n\nmodel = timm.create_model({name!r}, num_classes=0{options})\n"
    code = f"import torch, torchvision\n\nmodel = torchvision.models.get_model({name!r}{options})\n"
    return code + "".join(f"model.set_submodule({head!r}, torch.nn.Identity())\n" for head in encoder.heads)


def write_files(encoder: Encoder, folder: Path) -> list[Path]:
    """The encoder as safetensors and, where a library has its architecture, as that library's state_dict (Aborted)."""
    paths = [folder / name for name in file_names(encoder)[:-1]]
    state = encoder.module.state_dict()
    pixels = {name: json.dumps([*values]) for name, values in encoder.pixels.items()}
    save_safetensors(paths[0], state, encoder, channels=str(encoder.shape[0]), **pixels)
    for path in paths[1:]:
        checkpoint.save(path, {name: value.cpu().contiguous().clone() for name, value in state.items()})
    return paths


@torch.no_grad()
def check(encoder: Encoder, path: Path) -> list[str]:
    """Load the file by every way that the card names, and compare weights and features bit for bit (Aborted)."""
    images = torch.rand(2, *encoder.shape, generator=torch.Generator().manual_seed(0))
    expected = encoder.module.cpu().eval()(images)
    loaded = {"this program": load_encoder(path, encoder.arch, encoder.stem, *encoder.shape[:2]).module}
    if code := building_code(encoder):
        exec(code, names := {})
        library: Any = require("safetensors.torch", path.name)
        of_torch = path.suffix == ".pth"
        state = torch.load(path, map_location="cpu", weights_only=True) if of_torch else library.load_file(path)
        names["model"].load_state_dict(state)
        loaded["timm" if encoder.arch.startswith(TIMM) else "torchvision"] = names["model"]
    for way, module in loaded.items():
        if digest(module) != digest(encoder.module) or not torch.equal(module.eval()(images), expected):
            raise Aborted(f"{path}: loaded by {way}, the encoder is not the one that was exported")
    return list(loaded)


def read_record(weights: Path) -> dict[str, Any]:
    """All that a run has written about itself up to these weights: its settings, and what it has measured."""
    file = read_weights(weights)
    step = file.content.get("step") if file.layout == OURS else None
    of_a_run = file.layout == OURS or file.path.name == BACKBONE  # beside which its metrics lie, too
    rows = read_rows(file.path.with_name(METRICS)) if of_a_run else []
    rows = [row for row in rows if step is None or row.get("step", 0) <= step]
    newest = {row["kind"]: row for row in rows}
    epoch = file.content["epoch"] if file.layout == OFFICIAL else newest.get("epoch", {}).get("epoch")
    settings = newest.get("settings") or file.content.get("settings", {})
    command = " ".join(settings.get("command", [])) or None
    described = {**settings, "command": command, "steps done": step, "epochs done": epoch}
    return {
        "layout": file.layout,
        "settings": {key: value for key, value in described.items() if value is not None and key != "kind"},
        "accuracies": {row["representation"]: row for row in rows if row["kind"] == "evaluation"},
    }


def write_card(encoder: Encoder, files: Sequence[Path], record: dict[str, Any]) -> Path:
    """Write the card beside the files that it describes."""
    hub: Any = require("huggingface_hub", CARD)
    path, library = files[0].with_name(CARD), "timm" if encoder.arch.startswith(TIMM) else "torchvision"
    settings, code = {**encoder.pixels, **record["settings"]}, building_code(encoder)
    if code:
        loading = f"{code}model.load_state_dict(torch.load({files[1].name!r}, weights_only=True))"
    else:
        arch = f', arch="{encoder.arch}"' if is_own(encoder.arch) else ""
        call = f'torch.hub.load("PATH/TO/barlow-loss", "encoder", "{SAFETENSORS}"{arch}, source="local")'
        loading = f"import torch\n\nmodel = {call}"
    measured = any(map(accuracies_of, record["accuracies"].values()))
    worth = accuracy_cells(record["accuracies"]) if measured else [["Not measured"]]
    worth.insert(1, ["---"] * len(worth[0]))
    text = TEMPLATE.format(
        name=encoder.arch.removeprefix(TIMM),
        data=f" on {settings['data']}" if settings.get("data") else "",
        shape="×".join(map(str, encoder.shape)),
        features=encoder.features,
        parameters=sum(parameter.numel() for parameter in encoder.module.parameters()),
        loading=loading,
        layout=record["layout"],
        settings=yaml.safe_dump(settings, allow_unicode=True) if settings else "# The file does not say.\n",
        worth="\n".join(f"| {' | '.join(row)} |" for row in worth),
        version=__version__,
    )
    about = {"pipeline_tag": "image-feature-extraction", "tags": ["barlow-twins", "self-supervised-learning"]}
    data = hub.ModelCardData(library_name=library, **about)
    with replacing(path) as temporary:
        hub.ModelCard(f"---\n{data}\n---\n{text}").save(temporary)
    return path


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


if __name__ == "__main__":
    start(main)
