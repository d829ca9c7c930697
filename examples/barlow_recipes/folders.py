"""The output folder of a run: new, or that of the run that ``--resume`` continues; one process at a time writes there.

    saved = folders.load(folders.find(settings, default))    # None: a new run
    with folders.opened(settings, default, shaping, saved) as (out, metrics):
        if saved:
            state.load_state_dict(saved.content)

All processes call these; they agree about what they do, and rank 0 alone writes.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import torch
import yaml

from barlow_recipes import checkpoint, distributed, outputs
from barlow_recipes.checkpoint import Saved, load  # noqa: F401
from barlow_recipes.command_line import RunSettings, plain
from barlow_recipes.distributed import is_rank_zero, on_rank_zero
from barlow_recipes.errors import UsageError
from barlow_recipes.metrics import Metrics, Mirror
from barlow_recipes.outputs import BACKBONE, CHECKPOINT, CHECKPOINTS, RESULTS, SETTINGS

LOCK = ".lock"
OWN = (*CHECKPOINTS, outputs.DAMAGED, outputs.METRICS, outputs.REPORT, *outputs.PICTURES, outputs.WANDB_ID, SETTINGS)
OWN += (BACKBONE, RESULTS, "model.pt")  # by which a run has ended
OWN_PATTERNS = (f"{outputs.TENSORBOARD}/events.out.tfevents.*", "classifier-*.safetensors")
FOR_THIS_START = ("device", "out", "overwrite", "resume", "show_settings")  # no part of settings.yaml


def find(settings: RunSettings, default: Path) -> Path | None:
    """The checkpoint that ``--resume`` means, the same on every process; its path names the one before it, too."""

    def newest() -> Path | None:
        folders = [settings.out] if settings.out is not None else numbered(default)
        found = [folder for folder in folders if any((folder / name).is_file() for name in CHECKPOINTS)]
        return found[-1] / CHECKPOINT if found else None

    if settings.resume == "auto":
        return on_rank_zero(newest)
    asked = Path(settings.resume) if settings.resume is not None else None
    return on_rank_zero(lambda: asked / CHECKPOINT if asked and asked.is_dir() else asked)


@contextlib.contextmanager
def opened(
    settings: RunSettings,
    default: Path,
    must_match: Mapping[str, Any],
    saved: Saved | None = None,
    *,
    finished: str = RESULTS,
    unit: str = "step",
    agreed: Mapping[str, object] | None = None,
    described: Mapping[str, object] | None = None,
    mirrors: Sequence[Callable[[Path, int | None], Mirror]] = (),
) -> Iterator[tuple[Path, Metrics]]:
    """Make or go back to the output folder, without another run's files, and hold it until the end.

    ``settings`` choose the folder, which without --out is ``default``, with a number where that is taken; they become
    its settings.yaml. ``must_match`` are those that decide about the outcome, in plain values: they are the same as in
    ``saved``, of which the run goes on after so many of ``unit``. ``agreed`` must be the same on all processes, too.
    ``described`` goes into the metrics, which the ``mirrors`` get, too. A run without a checkpoint and without the file
    ``finished``, which it leaves at its end, has nothing to lose: --resume begins anew.
    """
    step, resumed, asked = (saved.content["step"], saved.path, saved.asked) if saved else (None, None, None)
    facts = {
        "the checkpoint": f"{unit} {step} of {resumed}" if saved else "none",
        **(agreed or {}),
        **must_match,
    }
    distributed.require_agreement({name: str(value) for name, value in facts.items()})
    if saved and resumed:
        checkpoint.check_settings(resumed, saved.content["settings"], dict(must_match))
    del saved  # the caller may let go of the memory while the run goes on
    flags = plain(settings, without=FOR_THIS_START)

    def choose() -> Path:
        wanted = settings.out or default
        lost = settings.resume == "auto" and resumed is None and not (wanted / finished).exists()
        overwrite, there = settings.overwrite or lost, wanted / SETTINGS
        if overwrite and there.exists() and yaml.safe_load(there.read_text(encoding="utf-8")).keys() != flags.keys():
            raise UsageError(f"--out {wanted}: holds a run of another program. Choose another folder")
        return make_output_folder(settings.out, default, overwrite=overwrite, resumed=resumed)

    out = on_rank_zero(choose)
    with locked(out) if is_rank_zero() else contextlib.nullcontext():
        if is_rank_zero():
            for path in own_files(out) if not _is_in(resumed, out) else ():
                path.unlink(missing_ok=True)
            with outputs.replacing(out / SETTINGS) as temporary:
                temporary.write_text(yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")
        opened_mirrors = [mirror(out, step) for mirror in mirrors] if is_rank_zero() else []
        metrics = Metrics(out, resumed, step or 0, opened_mirrors) if is_rank_zero() else Metrics(None)
        place = {"command": sys.argv[1:], "processes": distributed.world_size(), "torch": torch.__version__}
        metrics.add("settings", {**must_match, **place, **(described or {})})
        if resumed:
            print(f"continuing from {resumed}, after {unit} {step}")
        if asked and resumed != asked:
            text = f"{asked} is damaged or missing: going on from {resumed}, the one before it"
            metrics.add("event", {"step": step, "text": text})
            if is_rank_zero():
                print(f"warning: {text}", file=sys.stderr)
                if _is_in(asked, out) and asked.exists():  # or the next one would take it for its previous generation
                    asked.replace(out / outputs.DAMAGED)
        yield out, metrics


def make_output_folder(out: Path | None, default: Path, *, overwrite: bool, resumed: Path | None) -> Path:
    """``out``; without it the resumed run's own, or ``default``, or ``default-2``, ... if that is taken."""
    if out is None and resumed is not None:
        out = resumed.parent
    if out is None:
        taken = [] if overwrite else numbered(default)
        out = default.with_name(f"{default.name}-{len(taken) + 1}") if taken else default
    try:
        if not (_is_in(resumed, out) or overwrite) and any(path.exists() for path in own_files(out)):
            raise UsageError(f"--out {out}: holds another run. Choose another folder, --overwrite or --resume")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # writable
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return out


def _is_in(path: Path | None, folder: Path) -> bool:
    return path is not None and path.parent.resolve() == folder.resolve()


def own_files(out: Path) -> list[Path]:
    return [*(out / name for name in OWN), *(path for pattern in OWN_PATTERNS for path in out.glob(pattern))]


def numbered(default: Path) -> list[Path]:
    """``default``, ``default-2``, ... as far as they exist."""
    folders = chain([default], (default.with_name(f"{default.name}-{number}") for number in count(2)))
    return [*takewhile(Path.exists, folders)]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, however it ends: a requeued run can begin before the old one has died."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no child inherits it
        except (BlockingIOError, PermissionError):
            raise UsageError(f"--out {folder}: another run is writing there. Wait for its end, or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
