"""The output folder of a run: new, or that of the run that ``--resume`` continues; one process at a time writes there.

    saved = folders.load(folders.find(settings, default))    # None: a new run
    with folders.opened(settings, default, shaping, saved) as (out, metrics):
        if saved:
            state.load_state_dict(saved.content)

All processes call these; they agree about what they do, and rank 0 alone writes. Within the ``with`` the folder is
locked, empty of another run's files, and has the run's ``settings.yaml`` and its metrics.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from barlow_recipes import checkpoint, distributed, outputs
from barlow_recipes.command_line import RunSettings, plain
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.errors import UsageError
from barlow_recipes.metrics import Metrics, Mirror
from barlow_recipes.outputs import BACKBONE, CHECKPOINT, CHECKPOINTS, RESULTS

LOCK = ".lock"
SETTINGS = "settings.yaml"  # the flags, for --settings
OF_PRETRAINING = (outputs.REPORT, BACKBONE, *outputs.PICTURES)
OWN = (*OF_PRETRAINING, *CHECKPOINTS, outputs.DAMAGED, outputs.METRICS, RESULTS, SETTINGS, "model.pt", outputs.WANDB_ID)
OWN_PATTERNS = (f"{outputs.TENSORBOARD}/events.out.tfevents.*", "classifier-*.safetensors")


class Saved(NamedTuple):
    """A checkpoint that a run goes on from."""

    content: dict[str, Any]
    path: Path  # the file that it comes from
    asked: Path  # the file that was asked for: another one, where that is damaged or missing


def find(settings: RunSettings, default: Path) -> Path | None:
    """The checkpoint that ``--resume`` means, the same on every process; see :func:`find_checkpoint`."""
    return from_main(lambda: find_checkpoint(settings.resume, settings.out, default))


def load(path: Path | None, parts: Collection[str] = checkpoint.PARTS) -> Saved | None:
    """Read the checkpoint, or the one before it where that one is damaged or missing; of no path, nothing.

    Raises:
        UsageError: neither is there, whole, and with these parts.
    """
    return Saved(*checkpoint.load(path, parts), path) if path else None


@contextlib.contextmanager
def opened(
    settings: RunSettings,
    default: Path,
    shaping: Mapping[str, Any],
    saved: Saved | None = None,
    *,
    finished: str = RESULTS,
    unit: str = "step",
    agreed: Mapping[str, object] | None = None,
    told: Mapping[str, object] | None = None,
    mirrors: Callable[[Path, int | None], list[Mirror]] = lambda folder, step: [],
) -> Iterator[tuple[Path, Metrics]]:
    """Make or go back to the output folder, and hold it until the end.

    Args:
        settings: the flags, for settings.yaml; ``out``, ``overwrite`` and ``resume`` choose the folder.
        default: the folder without ``out``; a number is added where it is taken.
        shaping: what decides about the outcome, in plain values: the same as in ``saved.content["settings"]``.
        saved: what the run goes on from: its ``content["step"]``, in ``unit``, says which metrics stay.
        finished: the file that a run of this program leaves at its end: ``--resume auto`` without a checkpoint begins
            anew where it is not there yet. A folder with a pretraining run is for another one (BACKBONE) alone.
        unit: what ``step`` counts, in words.
        agreed: what must be the same on all processes, beside ``shaping``.
        told: goes into the metrics, beside ``shaping``.
        mirrors: makes other places for the metrics, of the folder and the step that a run goes on from.

    Raises:
        UsageError: the processes, or run and checkpoint, do not agree; the folder is taken or cannot be written.
    """
    step, resumed, asked = (saved.content["step"], saved.path, saved.asked) if saved else (None, None, None)
    facts = {"the checkpoint": f"{unit} {step} of {resumed}" if saved else "none", **(agreed or {}), **shaping}
    distributed.require_agreement({name: str(value) for name, value in facts.items()})
    if saved and resumed:
        checkpoint.check_settings(resumed, saved.content["settings"], dict(shaping))
    del saved  # the caller may let go of the memory while the run goes on
    out = from_main(lambda: output_folder(settings, default, resumed, finished))
    with locked(out) if is_main() else contextlib.nullcontext():
        if is_main():
            if not _is_in(resumed, out):
                clear(out)
            flags = plain(settings, without=("device", "out", "overwrite", "resume"))
            with outputs.replacing(out / SETTINGS) as temporary:
                temporary.write_text(yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")
        metrics = Metrics(out, resumed, step or 0, mirrors(out, step)) if is_main() else Metrics(None)
        place = {"command": sys.argv[1:], "processes": distributed.world_size(), "torch": torch.__version__}
        metrics.add("settings", {**shaping, **place, **(told or {})})
        if resumed:
            print(f"continuing from {resumed}, after {unit} {step}")
        if asked and resumed != asked:
            text = f"{asked} is damaged or missing: going on from {resumed}, the one before it"
            metrics.add("event", {"step": step, "text": text})
            if is_main():
                print(f"warning: {text}", file=sys.stderr)
                if _is_in(asked, out):
                    checkpoint.set_aside(asked)
        yield out, metrics


def output_folder(settings: RunSettings, default: Path, resumed: Path | None, finished: str = RESULTS) -> Path:
    """Make the folder, as :func:`make_output_folder`; see :func:`opened` about ``finished``.

    A run that ended before its first checkpoint has nothing to resume, and nothing to lose.
    """
    asked = settings.out or default
    lost = settings.resume == "auto" and resumed is None and not (asked / finished).exists()
    overwrite = settings.overwrite or lost
    if overwrite and finished != BACKBONE and _is_of_pretraining(asked):
        raise UsageError(f"--out {asked}: holds a pretraining run. Choose another folder")
    return make_output_folder(settings.out, default, overwrite=overwrite, resumed=resumed)


def _is_of_pretraining(folder: Path) -> bool:
    """By the files that it ends with or, if it was stopped, by its flags."""
    ended = any((folder / name).exists() for name in OF_PRETRAINING)
    return ended or ((folder / SETTINGS).exists() and "projector:" in (folder / SETTINGS).read_text(encoding="utf-8"))


def find_checkpoint(resume: str | None, out: Path | None, default: Path) -> Path | None:
    """The checkpoint that ``--resume`` means: a file, or with "auto" the newest in the output folder, if any.

    Where only the previous one is left of a folder's two, it is still the newest's path that names the pair.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        return path / CHECKPOINT if path.is_dir() else path
    folders = [out] if out is not None else numbered(default)
    found = [folder for folder in folders if any((folder / name).is_file() for name in CHECKPOINTS)]
    return found[-1] / CHECKPOINT if found else None


def make_output_folder(out: Path | None, default: Path, *, overwrite: bool, resumed: Path | None) -> Path:
    """``out``; without it the resumed run's own, or ``default``, or ``default-2``, ``default-3``, ... if that is taken.

    Raises:
        UsageError: the folder holds another run's files, or cannot be made or written.
    """
    if out is None and resumed is not None:
        out = resumed.parent
    if out is None:
        taken = [] if overwrite else numbered(default)
        out = default.with_name(f"{default.name}-{len(taken) + 1}") if taken else default
    try:
        if not (_is_in(resumed, out) or overwrite) and any(path.exists() for path in _own_files(out)):
            raise UsageError(f"--out {out}: holds another run. Choose another folder, --overwrite or --resume")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # writable
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return out


def _is_in(path: Path | None, folder: Path) -> bool:
    return path is not None and path.parent.resolve() == folder.resolve()


def clear(out: Path) -> None:
    """Remove what another run has left in the folder, and nothing else."""
    for path in _own_files(out):
        path.unlink(missing_ok=True)


def _own_files(out: Path) -> list[Path]:
    return [*(out / name for name in OWN), *(path for pattern in OWN_PATTERNS for path in out.glob(pattern))]


def numbered(default: Path) -> list[Path]:
    """``default``, ``default-2``, ... as far as they exist."""
    folders = chain([default], (default.with_name(f"{default.name}-{number}") for number in count(2)))
    return [*takewhile(Path.exists, folders)]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, which lets go of it however it ends; no child inherits the lock.

    A restarted or requeued run can begin before the old one has died, and two would spoil each other's files.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(f"--out {folder}: another run is writing there. Wait for its end, or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
