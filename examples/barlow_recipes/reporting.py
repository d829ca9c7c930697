"""Where a run's results go."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from barlow_recipes.errors import Aborted, UsageError

METRICS, REPORT, BACKBONE = "metrics.jsonl", "report.html", "backbone.pt"
RESULTS = "results.json"  # of the programs that evaluate and transfer
CHECKPOINTS = CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"  # a run has one, or both
DAMAGED = "checkpoint.damaged.pt"
PICTURES = CURVES, CROSS_CORRELATION = "curves.png", "cross_correlation.png"
TENSORBOARD = "tensorboard"  # a folder of event files


def find_checkpoint(resume: str | None, out: Path | None, default: Path) -> Path | None:
    """The checkpoint that ``--resume`` means: a file, or with "auto" the newest in the output folder, if any.

    Where only the previous one is left of a folder's two, it is still the newest's path that names the pair.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        return path / CHECKPOINT if path.is_dir() else path
    folders = [out] if out is not None else list(_numbered(default))
    found = [folder for folder in folders if any((folder / name).is_file() for name in CHECKPOINTS)]
    return found[-1] / CHECKPOINT if found else None


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
    try:
        continues = resumed is not None and resumed.parent.resolve() == out.resolve()
        if not (continues or overwrite) and any(path.exists() for path in _own_files(out)):
            raise UsageError(f"--out {out}: holds another run. Choose another folder, --overwrite or --resume")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # writable
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return out


def clear(out: Path) -> None:
    """Remove what another run has left in the folder, and nothing else."""
    for path in _own_files(out):
        path.unlink(missing_ok=True)


def _own_files(out: Path) -> list[Path]:
    names = (METRICS, REPORT, BACKBONE, RESULTS, *CHECKPOINTS, DAMAGED, *PICTURES)
    return [*(out / name for name in names), *(out / TENSORBOARD).glob("events.out.tfevents.*")]


def _numbered(default: Path) -> Iterable[Path]:
    """``default``, ``default-2``, ... as far as they exist."""
    for number in count(1):
        folder = default if number == 1 else default.with_name(f"{default.name}-{number}")
        if not folder.exists():
            return
        yield folder


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


def _cannot_write(path: Path, error: OSError) -> Aborted:
    return Aborted(f"cannot write {path}: {error.strerror or error}")
