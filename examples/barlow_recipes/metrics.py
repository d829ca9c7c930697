"""A run's history: metrics.jsonl, TensorBoard and Weights & Biases beside it, and tables for people."""

import importlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.outputs import METRICS, TENSORBOARD, WANDB_ID, replacing, writing

HISTORY = ("baseline", "step", "epoch", "profile", "event")  # kinds that a resumed run keeps
NO_ACCURACY = "no accuracy, since no held-out image, or none to compare it with, can be read"
BAR = "{bar} {n_fmt}/{total_fmt} [{remaining}{postfix}]"  # of tqdm


class Mirror(Protocol):  # a second place for the metrics
    def add(self, kind: str, row: Mapping[str, Any]) -> None: ...


class Metrics:
    """The run's history: JSON objects, one a line, and the same in memory and in the mirrors.

    ``kind`` tells them apart: settings, baseline, step, epoch, profile, event, evaluation, report.
    A number that is not finite is null. Without a folder they are kept in memory only.
    """

    def __init__(
        self, folder: Path | None, resumed: Path | None = None, step: int = 0, mirrors: Sequence[Mirror] = ()
    ) -> None:
        """With ``resumed`` and ``step``, keep what its run had written up to the checkpoint."""
        self.path, self.mirrors = folder / METRICS if folder else None, mirrors
        past = [row for row in (read_rows(resumed.with_name(METRICS)) if resumed else []) if row["kind"] in HISTORY]
        self.rows = [row for row in past if isinstance(row.get("step"), int) and row["step"] <= step]
        if self.path:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        infinite = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        row = {**values, **dict.fromkeys(infinite)}
        self.rows.append({"kind": kind, **row})
        if self.path:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        for mirror in self.mirrors:
            mirror.add(kind, row)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line that a crash has cut off, or that is another's, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row]


class TensorBoard:
    """A mirror of the numbers with a step: ``tensorboard --logdir runs`` shows them while the run trains."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """What is there of the steps after ``resumed_step``, a checkpoint's, is void."""
        require("tensorboard", "--tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.folder = folder / TENSORBOARD
        with writing(self.folder):
            self.writer = writer(str(self.folder), purge_step=None if resumed_step is None else resumed_step + 1)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        with writing(self.folder):
            for name, value in _numbers(kind, row).items():
                self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()  # with it a row takes 0.2 ms, and a crash loses nothing


class WeightsAndBiases:
    """A mirror in the project WANDB_PROJECT or "barlow-twins"; ``wandb.id`` is the W&B run that goes on on resume."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        wandb: Any = require("wandb", "--wandb")
        kept, project = folder / WANDB_ID, os.environ.get("WANDB_PROJECT", "barlow-twins")
        name = kept.read_text() if resumed_step is not None and kept.is_file() else uuid.uuid4().hex[:8]
        try:
            self.run = wandb.init(project=project, name=folder.name, dir=folder, id=name, resume="allow", reinit=True)
        except wandb.Error as error:
            raise UsageError(f"--wandb: {first_line(error).rstrip('.')}. WANDB_MODE=offline needs no account") from None
        with replacing(kept) as temporary:
            temporary.write_text(name)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        if kind == "settings":
            self.run.config.update(dict(row), allow_val_change=True)
        elif numbers := _numbers(kind, row):
            self.run.log(numbers, step=row["step"])


def _numbers(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that has a step, as ``kind/name`` or ``kind/representation/name``."""
    prefix = f"{kind}/{row['representation']}" if "representation" in row else kind
    numbers = {name: value for name, value in row.items() if isinstance(value, Real) and name != "step"}
    return {f"{prefix}/{name}": value for name, value in numbers.items()} if "step" in row else {}


def accuracies_of(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name == "knn" or name.startswith("linear_")]


def label_of(accuracy: str) -> str:
    size = accuracy.removeprefix("linear_")
    if size.isdigit():
        return f"{size} label{'s' * (size != '1')}/class"
    return {"knn": "10-NN", "linear_all": "all labels"}[accuracy]


def accuracy_cells(rows: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """What :func:`probes.evaluate` returned for each representation, as the cells of a table with a head."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in accuracies_of(row)))
    lines = [
        [label, *(f"{row[name]:.1f} %" if name in row else "–" for name in columns)] for label, row in rows.items()
    ]
    return [["", *map(label_of, columns)], *lines]


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """For people to read; a sentence in its place if there was no image to measure on."""
    return aligned(accuracy_cells(rows)) if any(map(accuracies_of, rows.values())) else NO_ACCURACY


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """The cells of a table with a head, in columns; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    parts = [f"{label_of(name)} {row[name]:.1f} %" for name in accuracies_of(row)]
    if "unreadable_in_probe" in row and not parts:
        parts.append(NO_ACCURACY)
    parts.append(f"{row['images_per_second']:,.0f} images/s, {row['waiting']:.0%} of the time waiting for them")
    if count := row["unreadable"]:
        parts.append(f"{count} unreadable image{'s' * (count > 1)} replaced")
    return f"epoch {row['epoch']}/{epochs}: " + ", ".join(parts)
