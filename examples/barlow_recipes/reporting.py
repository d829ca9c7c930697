"""Where a run's results go, what is written while it trains, and the table at the end."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from barlow_recipes.errors import Aborted

METRICS, REPORT, BACKBONE = "metrics.jsonl", "report.html", "backbone.pt"
RESULTS = "results.json"  # of the programs that evaluate and transfer
CHECKPOINTS = CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"  # a run has one, or both
DAMAGED = "checkpoint.damaged.pt"
PICTURES = CURVES, CROSS_CORRELATION = "curves.png", "cross_correlation.png"
TENSORBOARD = "tensorboard"  # a folder of event files
HISTORY = ("baseline", "step", "epoch", "collapse", "profile", "event", "test")  # kinds that a resumed run keeps
# Of tqdm's bar: with what `progress` says in at most 100 columns, also in a run of millions of steps and many days.
BAR = "{bar} {n_fmt}/{total_fmt} [{remaining}{postfix}]"
Row = dict[str, Any]


def __getattr__(name: str) -> Any:
    """What has moved to folders, for callers that still look for it here."""
    if name not in ("find_checkpoint", "make_output_folder", "clear"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from barlow_recipes import folders  # it imports this module

    return getattr(folders, name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` at the end: a reader sees old or new, never half.

    Raises:
        Aborted: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


class Mirror(Protocol):
    """A second place for the metrics."""

    def add(self, kind: str, row: Mapping[str, Any]) -> None: ...


class Metrics:
    """The run's history: JSON objects, one a line, and the same in memory and in the mirrors.

    ``kind`` tells them apart: settings, baseline, step, epoch, collapse, profile, event, evaluation, report;
    of a detector test. A number that is not finite is null. Without a folder they are kept in memory only.
    """

    def __init__(
        self, folder: Path | None, resumed: Path | None = None, step: int = 0, mirrors: Sequence[Mirror] = ()
    ) -> None:
        """With ``resumed`` and ``step``, keep what its run had written up to the checkpoint."""
        self.path = folder / METRICS if folder else None
        self.mirrors = mirrors
        self.rows: list[Row] = []
        if resumed is not None:
            past = _read(resumed.parent / METRICS)
            self.rows = [row for row in past if row["kind"] in HISTORY and row["step"] <= step]
        if self.path is not None:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(map(_line, self.rows)), encoding="utf-8")

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        row = {"kind": kind} | {name: _finite(value) for name, value in values.items()}
        self.rows.append(row)
        if self.path is not None:
            self._append(self.path, row)
        for mirror in self.mirrors:
            mirror.add(kind, {name: value for name, value in row.items() if name != "kind"})

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def _append(self, path: Path, row: Row) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise _cannot_write(path, error) from None


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _cannot_write(path: Path, error: OSError) -> Aborted:
    return Aborted(f"cannot write {path}: {error.strerror or error}")


def _read(path: Path) -> list[Row]:
    """The rows with a step of a metrics file; a line that a crash has cut off, or that is another's, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
            rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def accuracies_of(row: Mapping[str, Any]) -> list[str]:
    """The names of the accuracies in a row, in their order."""
    return [name for name in row if name == "knn" or name.startswith("linear_")]


def label_of(accuracy: str) -> str:
    """How an accuracy is called where people read it."""
    size = accuracy.removeprefix("linear_")
    if size.isdigit():
        return f"{size} label{'s' * (size != '1')}/class"
    return {"knn": "10-NN", "linear_all": "all labels"}[accuracy]


def accuracy_cells(rows: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The accuracies of several representations, in percent, as the cells of a table with a head.

    Args:
        rows: for each representation what :func:`probes.evaluate` returned; not all need have the same accuracies.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in accuracies_of(row)))
    head = ["", *map(label_of, columns)]
    return [head, *([label, *(_percent(row.get(name)) for name in columns)] for label, row in rows.items())]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """:func:`accuracy_cells` as aligned columns, without a line break at their end."""
    return aligned(accuracy_cells(rows))


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """The cells of a table with a head, in columns; the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    lines.insert(1, "─" * max(map(len, lines)))
    return "\n".join(lines)


def progress(row: Mapping[str, float]) -> str:
    """What the progress bar says of a step: at most 70 columns."""
    parts = [
        f"loss {_short(row['loss'])}",
        f"on-diag {_short(row['on_diagonal'])}",
        f"off-diag {_short(row['off_diagonal'])}",
        f"rank {_short(row['effective_rank'])}",
        f"{row['images_per_second']:,.0f} img/s",
    ]
    return ", ".join(parts)


def _short(value: float) -> str:
    """Four digits, and a letter for the thousands of what has more: 54.57, 1342, 15.59k, 2.123M."""
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def epoch_line(row: Row, epochs: int) -> str:
    """What stays on the terminal of an epoch."""
    accuracies = [f"{label_of(name)} {row[name]:.1f} %" for name in accuracies_of(row)]
    speed = f"{row['images_per_second']:,.0f} images/s"
    count = row["unreadable"]
    unreadable = [f"{count} unreadable image{'s' * (count > 1)} replaced"] if count else []
    return f"epoch {row['epoch']}/{epochs}: " + ", ".join([*accuracies, speed, *unreadable])
