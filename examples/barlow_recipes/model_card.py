"""The card that goes with an exported encoder: what it is, how to load it, where it comes from, what it is worth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barlow_loss import __version__
from barlow_recipes.encoders import TIMM, Encoder, is_own
from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.exporting import CARD, SAFETENSORS, building_code
from barlow_recipes.metrics import accuracy_cells, read_rows
from barlow_recipes.outputs import BACKBONE, METRICS, RESULTS, replacing
from barlow_recipes.pixels import MEAN, STD
from barlow_recipes.weights import OFFICIAL, OURS, digest, read_weights

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MEASURED = "--weights"  # in the settings of results: the digest of what was evaluated


def read_results(folders: Sequence[Path], encoder: Encoder) -> list[list[str]]:
    """Of every protocol of evaluations and transfers: the data, its name, and its numbers in words.

    UsageError where a folder has no results, or those of other weights than the encoder's.
    """
    rows, weights = [], digest(encoder.module)
    for folder in folders:
        path = folder / RESULTS if folder.is_dir() else folder
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {**content.get("protocols", {}), **content.get("scores", {})}  # of classification, of detection
            measured = content.get("settings", {}).get(MEASURED, weights)
            rows += [[str(content.get("data", "")), name, _numbers(scores)] for name, scores in found.items()]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            reason = f"expected {RESULTS} of an evaluation or a transfer ({first_line(error)})"
            raise UsageError(f"--evaluation {folder}: {reason}") from None
        if not {"protocols", "scores"} & set(content):
            raise UsageError(f"--evaluation {folder}: {path} has neither protocols nor scores")
        if measured != weights:
            raise UsageError(f"--evaluation {folder}: its results are of other weights ({content.get('weights')})")
    return rows


def _numbers(scores: dict[str, Any]) -> str:
    plain = {name: value for name, value in scores.items() if isinstance(value, (int, float, str))}
    return ", ".join(f"{name} {_plain(value)}" for name, value in plain.items())


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def read_record(weights: Path) -> dict[str, Any]:
    """All that a run has written about itself up to these weights, as the card's template takes it."""
    file = read_weights(weights)
    step = file.content.get("step") if file.layout == OURS else None
    # Beside backbone.pt lie its run's metrics, too.
    rows = read_rows(file.path.with_name(METRICS)) if file.layout == OURS or file.path.name == BACKBONE else []
    rows = [row for row in rows if step is None or row.get("step", 0) <= step]
    newest = {row["kind"]: row for row in rows}
    epoch = file.content["epoch"] if file.layout == OFFICIAL else newest.get("epoch", {}).get("epoch")
    settings = newest.get("settings") or file.content.get("settings", {})
    accuracies = {row["representation"]: row for row in rows if row["kind"] == "evaluation" and "representation" in row}
    recipe = {key: value for key, value in sorted(settings.items()) if key != "kind"}
    if recipe:
        command = " ".join(settings.get("command", []))
        recipe |= {"command": f"`{command}`", "done, steps": step, "done, whole epochs": epoch}
    return {
        "settings": settings,
        "data": settings.get("data"),
        "recipe": {key: _plain(value) for key, value in recipe.items() if value is not None},
        "epoch": epoch,
        "layout": file.layout,
        "accuracies": accuracy_cells(accuracies) if accuracies else [],
    }


def write_card(encoder: Encoder, files: Sequence[Path], record: dict[str, Any], results: list[list[str]]) -> Path:
    """Write the card beside the files that it describes."""
    hub: Any = require("huggingface_hub", CARD)
    path, library = files[0].with_name(CARD), "timm" if encoder.arch.startswith(TIMM) else "torchvision"
    facts = {
        "name": encoder.arch.removeprefix(TIMM),
        "encoder": encoder,
        "parameters": sum(parameter.numel() for parameter in encoder.module.parameters()),
        "loading": _loading(encoder, [file.name for file in files if file.name != SAFETENSORS]),
        "pixels": _pixels(encoder, record["settings"]),
        "results": results,
        "version": __version__,
    }
    about = {"pipeline_tag": "image-feature-extraction", "tags": ["barlow-twins", "self-supervised-learning"]}
    data = hub.ModelCardData(library_name=library, **about)
    with replacing(path) as temporary:
        hub.ModelCard.from_template(data, template_path=str(TEMPLATE), **facts, **record).save(temporary)
    return path


def _loading(encoder: Encoder, others: Sequence[str]) -> str:
    """Code that builds ``model``: by the library that has the encoder, or by PyTorch Hub."""
    if others:
        (code, *_) = building_code(encoder).values()
        return f"{code}model.load_state_dict(torch.load({others[0]!r}, weights_only=True))"
    arch = f', arch="{encoder.arch}"' if is_own(encoder.arch) else ""
    call = f'torch.hub.load("PATH/TO/barlow-loss", "encoder", "{SAFETENSORS}"{arch}, source="local")'
    return f"import torch\n\nmodel = {call}"


def _pixels(encoder: Encoder, settings: dict[str, Any]) -> str:
    if encoder.arch == "digits-cnn":
        return "The images are grey, with values from 0 to 1."
    known = encoder.pixels or settings
    if not known.get("mean"):
        usual = f"ImageNet's, {_plain(MEAN)} and {_plain(STD)}, are usual"
        return f"The file does not say by which mean and standard deviation its images were normalised; {usual}."
    mean, std = known["mean"], known["std"]
    span = f", where {_plain(known['value_range'])} are 0 and 1" if known.get("value_range") else ""
    return f"The images are normalised by mean {_plain(mean)} and standard deviation {_plain(std)}{span}."
