"""Checkpoints that are whole or absent, hold no code, and continue a run as if it had not stopped.

A checkpoint is a file of ``torch.save``, which is a zip archive, and in the archive's comment stands the SHA-256 of all
that precedes it; ``torch.load`` reads it as ever. Beside the newest lies the one before it.
"""

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes.errors import UsageError, first_line
from barlow_recipes.models import BarlowTwins
from barlow_recipes.outputs import replacing

LABEL = b"sha256:"
COMMENT = len(LABEL) + 2 * hashlib.sha256().digest_size  # its length in bytes
PARTS = {"settings", "model", "optimizer", "schedule", "scaler", "step"}


@dataclass
class TrainingState:
    """Everything that changes while training. ``step`` counts the optimiser's steps since the beginning of the run.

    No state of a random generator: what is drawn is a function of the step (see data.py and steps.py).
    """

    model: BarlowTwins
    optimizer: optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler  # type: ignore[attr-defined]
    device: torch.device
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


class Saved(NamedTuple):
    content: dict[str, Any]
    path: Path  # the file that it comes from
    asked: Path  # the file that was asked for: another one, where that is damaged or missing


def previous(path: Path) -> Path:
    return path.with_suffix(f".previous{path.suffix}")


def save(path: Path, content: object, *, keep_previous: bool = False) -> None:
    """``keep_previous``: the old one becomes :func:`previous`."""
    with replacing(path, previous(path) if keep_previous else None) as temporary, temporary.open("wb") as file:
        _write(file, content)


def _write(file: BinaryIO, content: object) -> None:
    buffer = io.BytesIO()  # torch.save itself does not tell why a file cannot be written
    torch.save(content, buffer)
    archive = buffer.getbuffer()[:-2]  # without the length of its comment, which is 0
    comment = LABEL + hashlib.sha256(archive).hexdigest().encode()
    file.write(archive)
    file.write(len(comment).to_bytes(2, "little") + comment)


def is_ours(path: Path) -> bool:
    """Whether a file ends like one of :func:`save`: it may still be damaged. FileNotFoundError where there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - COMMENT))
        return file.read().startswith(LABEL)


def read(path: Path) -> Any:
    """What :func:`save` wrote, to the bit, or ValueError; tensors and plain values only, and nothing in it is run."""
    data = path.read_bytes()
    archive, length, comment = data[: -COMMENT - 2], data[-COMMENT - 2 : -COMMENT], data[-COMMENT:]
    if comment[: len(LABEL)] != LABEL or int.from_bytes(length, "little") != COMMENT:
        raise ValueError("it does not end with a checksum")
    if hashlib.sha256(archive).hexdigest().encode() != comment[len(LABEL) :]:
        raise ValueError("its checksum is wrong")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle raises
        raise ValueError(first_line(error)) from None


def load(path: Path | None, parts: Collection[str] = PARTS) -> Saved | None:
    """Read a checkpoint with these parts, or the one before it where that one is damaged or missing; of None, None."""
    reasons: list[str] = []
    if path is None:
        return None
    for candidate in (path, previous(path)):
        try:
            state = read(candidate)
        except FileNotFoundError:
            reasons.append(f"{candidate}: no such file")
        except (OSError, ValueError) as error:
            reasons.append(f"{candidate}: not a readable checkpoint ({first_line(error)})")
        else:
            if not isinstance(state, dict) or not set(state) >= set(parts):
                raise UsageError(f"--resume {candidate}: not a checkpoint of this program")
            return Saved(state, candidate, path)
    raise UsageError("--resume " + "; ".join(reasons if previous(path).exists() else reasons[:1]))


def check_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings, and name all that differ."""
    both = {name: (saved.get(name), current.get(name)) for name in sorted(saved.keys() | current.keys())}
    if differences := [f"{name} was {old} and is now {new}" for name, (old, new) in both.items() if old != new]:
        raise UsageError(f"--resume {path}: {'; '.join(differences)}. Give the same, or begin a new run")
