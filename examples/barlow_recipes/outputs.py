"""The names of a run's files, and how one is replaced."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from barlow_recipes.errors import Aborted

METRICS, REPORT, BACKBONE = "metrics.jsonl", "report.html", "backbone.pt"
RESULTS = "results.json"  # of the programs that evaluate and transfer
CHECKPOINTS = CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"  # a run has one, or both
PICTURES = CURVES, CROSS_CORRELATION = "curves.png", "cross_correlation.png"
DAMAGED, WANDB_ID, SETTINGS = "checkpoint.damaged.pt", "wandb.id", "settings.yaml"
TENSORBOARD = "tensorboard"  # a folder of event files


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Aborted(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` at the end: a reader sees old or new, never half.

    Afterwards the file is on the disk, and the old one is ``keep``. Where that fails (Aborted), the old one stays.
    """
    temporary = path.with_name(f".{path.name}.new")  # of that name what a killed process leaves is written over
    try:
        with writing(path):
            yield temporary
            _sync(temporary)
            if keep and path.exists():
                path.replace(keep)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # not every system can open a folder
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
