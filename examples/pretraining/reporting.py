"""Where a run's results go, what is written while it trains, and the table at the end."""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from .errors import Aborted, UsageError

METRICS, CHECKPOINT, BACKBONE = "metrics.jsonl", "checkpoint.pt", "backbone.pt"
PICTURES = CURVES, CROSS_CORRELATION = "curves.png", "cross_correlation.png"
Row = dict[str, Any]


def find_checkpoint(resume: str | None, out: Path | None, default: Path) -> Path | None:
    """The checkpoint that ``--resume`` means: a file, or with "auto" the newest in the output folder, if any."""
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        return path / CHECKPOINT if path.is_dir() else path
    folders = [out] if out is not None else list(_numbered(default))
    found = [folder / CHECKPOINT for folder in folders if (folder / CHECKPOINT).is_file()]
    return found[-1] if found else None


def make_output_folder(out: Path | None, default: Path, *, overwrite: bool, resumed: Path | None) -> Path:
    """Make the folder for this run's files, without touching another run's.

    Without ``out`` it is ``default``, or ``default-2``, ``default-3``, ... if that is taken, or the resumed run's own.

    Raises:
        UsageError: the folder holds another run's files, or cannot be made or written.
    """
    if out is None and resumed is not None:
        out = resumed.parent
    if out is None:
        taken = [] if overwrite else list(_numbered(default))
        out = default.with_name(f"{default.name}-{len(taken) + 1}") if taken else default
    own = [out / name for name in (METRICS, CHECKPOINT, BACKBONE, *PICTURES)]
    try:
        continues = resumed is not None and resumed.parent.resolve() == out.resolve()
        if not (continues or overwrite) and any(path.exists() for path in own):
            raise UsageError(f"--out {out}: holds another run. Choose another folder, --overwrite or --resume")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # writable
        if not continues:
            for path in own:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return out


def _numbered(default: Path) -> Iterable[Path]:
    """``default``, ``default-2``, ... as far as they exist."""
    for number in count(1):
        folder = default if number == 1 else default.with_name(f"{default.name}-{number}")
        if not folder.exists():
            return
        yield folder


class Metrics:
    """The run's history: JSON objects, one a line, and the same in memory.

    ``kind`` tells them apart: settings, step, epoch, evaluation, report. A number that is not finite is null. Without a
    folder they are kept in memory only.
    """

    def __init__(self, folder: Path | None, resumed: Path | None = None, step: int = 0) -> None:
        """With ``resumed`` and ``step``, keep what its run had written up to the checkpoint."""
        self.path = folder / METRICS if folder else None
        self.rows: list[Row] = []
        if resumed is not None:
            past = _read(resumed.parent / METRICS)
            self.rows = [row for row in past if row.get("kind") in ("step", "epoch") and row["step"] <= step]
        self._write("w", self.rows)

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        row = {"kind": kind} | {name: _finite(value) for name, value in values.items()}
        self.rows.append(row)
        self._write("a", [row])

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def _write(self, mode: str, rows: Iterable[Row]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise Aborted(f"cannot write {self.path}: {error.strerror or error}") from None


def _read(path: Path) -> list[Row]:
    """The rows of a metrics file; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = {"knn": "10-NN", "linear_1": "1 label/class", "linear_5": "5 labels/class", "linear_all": "all labels"}


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out the accuracies of several representations, in percent.

    Args:
        rows: for each representation what :func:`probes.evaluate` returned.

    Returns:
        A table of aligned columns, without a line break at its end.
    """
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    cells = [["", *(COLUMNS[name] for name in columns)]]
    cells += [[label, *(f"{row[name]:.1f} %" for name in columns)] for label, row in rows.items()]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    lines.insert(1, "─" * max(map(len, lines)))
    return "\n".join(lines)


def progress(row: Row) -> str:
    """What the progress bar says."""
    names = {"loss": "loss", "on_diagonal": "on-diagonal", "off_diagonal": "off-diagonal", "effective_rank": "rank"}
    return ", ".join(f"{label} {row[name]:.4g}" for name, label in names.items())


def epoch_line(row: Row, epochs: int) -> str:
    """What stays on the terminal of an epoch."""
    accuracies = [f"{label} {row[name]:.1f} %" for name, label in COLUMNS.items() if name in row]
    speed = f"{row['images_per_second']:,.0f} images/s"
    count = row["unreadable"]
    unreadable = [f"{count} unreadable image{'s' * (count > 1)} replaced"] if count else []
    return f"epoch {row['epoch']}/{epochs}: " + ", ".join([*accuracies, speed, *unreadable])
