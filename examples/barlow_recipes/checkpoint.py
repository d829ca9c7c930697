"""Checkpoints that are whole or absent, hold no code, and continue a run as if it had not stopped.

A checkpoint is a file of ``torch.save``, which is a zip archive, and in the archive's comment stands the SHA-256 of all
that precedes it; ``torch.load`` reads it as ever. Beside the newest lies the one before it.
"""

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes.errors import UsageError, first_line
from barlow_recipes.models import BarlowTwins
from barlow_recipes.outputs import replacing

LABEL = b"sha256:"
COMMENT = len(LABEL) + 2 * hashlib.sha256().digest_size  # its length in bytes
PARTS = {"settings", "model", "optimizer", "schedule", "scaler", "step", "rng"}


@dataclass
class TrainingState:
    """Everything that changes while training. ``step`` counts the optimiser's steps since the beginning of the run."""

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
            "rng": {place: get() for place, (get, _) in self._random_states().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        for place, (_, put) in self._random_states().items():
            if place in state["rng"]:  # not after a change of device
                put(state["rng"][place])

    def _random_states(self) -> dict[str, tuple[Any, Any]]:
        """The views need none (see data.py); these are for a dropout that somebody may add."""
        states = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            put = partial(module.set_rng_state, device=self.device)
            states[self.device.type] = (partial(module.get_rng_state, self.device), put)
        return states


def previous(path: Path) -> Path:
    """Where the generation before ``path`` lies."""
    return path.with_suffix(f".previous{path.suffix}")


def save(path: Path, content: object, *, keep_previous: bool = False) -> None:
    """Write, as :func:`~barlow_recipes.outputs.replacing`; ``keep_previous``: the old one becomes :func:`previous`.

    Raises:
        Aborted: the disk is full or the folder cannot be written. What was there before stays.
    """
    keep = previous(path) if keep_previous else None
    with replacing(path, keep) as temporary, temporary.open("wb") as file:
        _write(file, content)


def _write(file: BinaryIO, content: object) -> None:
    """By way of the memory: torch.save does not tell why a file cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()[:-2]  # without the length of its comment, which is 0
    comment = LABEL + hashlib.sha256(archive).hexdigest().encode()
    file.write(archive)
    file.write(len(comment).to_bytes(2, "little") + comment)


def is_ours(path: Path) -> bool:
    """Whether a file ends like one of :func:`save`: it may still be damaged.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - COMMENT))
        return file.read().startswith(LABEL)


def read(path: Path) -> Any:
    """What :func:`save` wrote, on the CPU; tensors and plain values only, and nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not, to the bit, what was written.
    """
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


def load(path: Path, parts: Collection[str] = PARTS) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint with these parts, or the one before it where that one is damaged or missing.

    Returns:
        Its content, and the file it comes from.

    Raises:
        UsageError: neither is there, whole, and a checkpoint of this program.
    """
    reasons = []
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
            return state, candidate
    raise UsageError("--resume " + "; ".join(reasons if previous(path).exists() else reasons[:1]))


def set_aside(path: Path) -> None:
    """Move a damaged checkpoint out of the way of the next one, which would take it for the previous generation."""
    if path.exists():
        path.replace(path.with_suffix(f".damaged{path.suffix}"))


def check_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        UsageError: naming every setting that differs.
    """
    differences = [
        f"{name} was {saved.get(name)} and is now {current.get(name)}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise UsageError(f"--resume {path}: {'; '.join(differences)}. Give the same, or begin a new run")
