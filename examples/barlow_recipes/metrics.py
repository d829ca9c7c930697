"""A run's history: metrics.jsonl always, TensorBoard and Weights & Biases beside it where they are asked for."""

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

HISTORY = ("baseline", "step", "epoch", "collapse", "profile", "event")  # kinds that a resumed run keeps
Row = dict[str, Any]


class Mirror(Protocol):  # a second place for the metrics
    def add(self, kind: str, row: Mapping[str, Any]) -> None: ...


class Metrics:
    """The run's history: JSON objects, one a line, and the same in memory and in the mirrors.

    ``kind`` tells them apart: settings, baseline, step, epoch, collapse, profile, event, evaluation, report.
    A number that is not finite is null. Without a folder they are kept in memory only.
    """

    def __init__(
        self, folder: Path | None, resumed: Path | None = None, step: int = 0, mirrors: Sequence[Mirror] = ()
    ) -> None:
        """With ``resumed`` and ``step``, keep what its run had written up to the checkpoint."""
        self.path = folder / METRICS if folder else None
        self.mirrors = mirrors
        past = read_rows(resumed.with_name(METRICS)) if resumed else []
        past = [row for row in past if row["kind"] in HISTORY and isinstance(row.get("step"), int)]
        self.rows = [row for row in past if row["step"] <= step]
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

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file; a line that a crash has cut off, or that is another's, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row]


class TensorBoard:
    """A mirror of the numbers with a step: ``tensorboard --logdir runs`` shows them while the run trains."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """``folder`` is the run's. What is there of the steps after ``resumed_step``, a checkpoint's, is void."""
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
    """A mirror of the settings and of the numbers with a step, in the project WANDB_PROJECT or "barlow-twins".

    A resumed run goes on in its W&B run, which keeps what it had of the steps after the checkpoint.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """``folder`` is the run's: it gets ``wandb.id`` and ``wandb/``. UsageError where nobody is logged in."""
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
    numbers = {name: value for name, value in row.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {f"{prefix}/{name}": value for name, value in numbers.items() if "step" in row and name != "step"}
