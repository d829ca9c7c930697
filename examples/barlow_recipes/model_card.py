"""The card that goes with an exported encoder: what it is, how to load it, where it comes from, what it is worth."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barlow_loss import __version__
from barlow_recipes.encoders import TIMM, Encoder
from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.exporting import CARD, SAFETENSORS, example_shape
from barlow_recipes.metrics import Row
from barlow_recipes.reporting import BACKBONE, METRICS, RESULTS, replacing
from barlow_recipes.tables import accuracy_cells
from barlow_recipes.weights import OFFICIAL, OURS, digest, read_weights

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
RECIPE = {  # settings that the card shows, by what they are called there
    "images": "training images, without their labels",
    "epochs": "epochs",
    "batch_size": "batch size, of all processes together",
    "processes": "world size",
    "device": "device",
    "precision": "precision",
    "optimizer": "optimiser",
    "learning_rate_weights": "learning rate of the weights, per 256 images",
    "learning_rate_biases": "learning rate of biases and norms, per 256 images",
    "weight_decay": "weight decay",
    "warmup_epochs": "warm-up epochs",
    "lambd": "λ",
    "projector": "projector, not part of these files",
    "image_size": "side of a view in pixels",
    "crop_scale": "least area of a crop",
    "color_jitter": "jitter of brightness, contrast, saturation, hue",
    "grayscale": "greyscale, probability",
    "blur": "blur, probability in each view",
    "solarize": "solarization, probability in each view",
    "seed": "seed",
    "init": "initial weights",
    "barlow-loss": "barlow-loss",
    "torch": "torch",
    "torchvision": "torchvision",
    "Python": "Python",
}
MEASURED = "--weights"  # in the settings of results: the digest of what was evaluated
OF_PHOTOGRAPHS = {"image_size", "crop_scale", "color_jitter", "grayscale", "blur", "solarize"}  # not of digits' views


@dataclass(frozen=True)
class Record:
    """What is known of a pretraining run, and of the evaluations of its encoder."""

    settings: dict[str, Any]  # empty where the weights are not from a run of this program
    step: int | None
    epoch: int | None  # the last whole one
    accuracies: dict[str, dict[str, float]]
    collapse: Row | None
    evaluations: dict[str, dict[str, Any]]  # results.json by folder
    layout: str


def read_record(weights: Path, evaluations: Sequence[Path]) -> Record:
    """All that a run has written about itself, and the results of evaluations.

    Raises:
        UsageError: an evaluation's folder has no results that can be read.
    """
    found = {str(folder): _read_results(folder) for folder in evaluations}
    file = read_weights(weights)
    own = file.layout == OURS or file.path.name == BACKBONE  # which is beside its run's metrics
    step = file.content.get("step") if file.layout == OURS else None
    rows = _rows(file.path.parent / METRICS) if own else []
    rows = [row for row in rows if step is None or row.get("step", 0) <= step]
    newest = {row["kind"]: row for row in rows}
    epoch = file.content["epoch"] if file.layout == OFFICIAL else newest.get("epoch", {}).get("epoch")
    evaluated = [row for row in rows if row["kind"] == "evaluation" and "representation" in row]
    return Record(
        settings=newest.get("settings") or dict(file.content.get("settings", {})),
        step=step,
        epoch=epoch,
        accuracies={row["representation"]: row for row in evaluated},
        collapse=newest.get("report"),
        evaluations=found,
        layout=file.layout,
    )


def _rows(path: Path) -> list[Row]:
    """The rows of a metrics file; a line that a crash has cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row]


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--evaluation {folder}: expected {RESULTS} of an evaluation ({first_line(error)})") from None
    if not isinstance(content, dict) or not {"protocols", "scores"} & set(content):
        raise UsageError(f"--evaluation {folder}: {path} has neither protocols nor scores")
    try:
        _protocols(content), _detections(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--evaluation {folder}: {path} is not of an evaluation or a transfer ({type(error).__name__}: {error})"
        ) from None
    return content


def check_evaluations(encoder: Encoder, record: Record) -> None:
    """Refuse to say of an encoder what was measured of another one.

    Raises:
        UsageError: the results are of other weights.
    """
    own = digest(encoder.module)
    for folder, results in record.evaluations.items():
        measured = results["settings"].get(MEASURED) if isinstance(results.get("settings"), dict) else None
        if measured not in (None, own):
            raise UsageError(f"--evaluation {folder}: its results are of other weights ({results.get('weights')})")


def write_card(path: Path, encoder: Encoder, files: Sequence[Path], record: Record) -> str:
    """Write the card.

    Returns:
        In words, where it is and what it could not be filled with.
    """
    jinja2: Any = require("jinja2", CARD)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=encoder.arch.removeprefix(TIMM),
        of_timm=encoder.arch.startswith(TIMM),
        encoder=encoder,
        layout=record.layout,
        shape=example_shape(encoder),
        parameters=sum(parameter.numel() for parameter in encoder.module.parameters()),
        data=record.settings.get("data"),
        recipe=_recipe(record.settings),
        step=record.step,
        epoch=record.epoch,
        command=" ".join(record.settings.get("command") or []),
        accuracies=accuracy_cells(record.accuracies) if record.accuracies else [],
        collapse=record.collapse,
        protocols=[cells for results in record.evaluations.values() for cells in _protocols(results)],
        detections=[cells for results in record.evaluations.values() for cells in _detections(results)],
        files={file.name: (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files},
        safetensors=SAFETENSORS,
        other=next((file.name for file in files if file.name != SAFETENSORS), None),
        version=__version__,
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    missing = [] if record.settings else ["how it was pretrained"]
    missing += [] if record.accuracies or record.evaluations else ["what it is worth (--evaluation)"]
    return f"{path}: the model card" + (f"; it does not say {' nor '.join(missing)}" if missing else "")


def _recipe(settings: dict[str, Any]) -> list[tuple[str, str]]:
    left_out = OF_PHOTOGRAPHS if settings.get("arch") == "digits-cnn" else set()
    known = {key: settings[key] for key in RECIPE if key not in left_out and settings.get(key) is not None}
    return [(RECIPE[key], _plain(value)) for key, value in known.items()]


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _protocols(results: dict[str, Any]) -> list[list[str]]:
    """Of classification: data, protocol, labels, top-1 and top-5 of the last epoch."""
    return [
        [str(results.get("data")), name, str(found["labels"]), f"{found['top1']:.2f}", f"{found['top5']:.2f}"]
        for name, found in results.get("protocols", {}).items()
    ]


def _detections(results: dict[str, Any]) -> list[list[str]]:
    """Of detection: data, what is found, AP, AP50 and AP75 after the last iteration."""
    data = str(results.get("data", "detection"))
    return [
        [data, kind, *("–" if scores[name] is None else f"{scores[name]:.1f}" for name in ("AP", "AP50", "AP75"))]
        for kind, scores in results.get("scores", {}).items()
    ]
