"""Checkpoints that are whole or absent, hold no code, and continue a run as if it had not stopped."""

import contextlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from .errors import Aborted, UsageError, first_line
from .models import BarlowTwins


@dataclass
class TrainingState:
    """Everything that changes while training. ``step`` counts the optimiser's steps since the beginning of the run."""

    model: BarlowTwins
    optimizer: optim.Optimizer
    schedule: LambdaLR
    device: torch.device
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "rng": {place: get() for place, (get, _) in self._random_states().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        for place, (_, put) in self._random_states().items():
            if place in state["rng"]:  # not after a change of device
                put(state["rng"][place])

    def _random_states(self) -> dict[str, tuple[Any, Any]]:
        """The views need none (see data.py); these are for a dropout that somebody may add."""
        states = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            states[self.device.type] = (module.get_rng_state, module.set_rng_state)
        return states


def save(path: Path, content: object) -> None:
    """Write to a temporary file beside ``path`` and rename it, so that ``path`` is always old or new, never half.

    Raises:
        Aborted: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        raise Aborted(f"cannot write {path}: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; it can hold tensors and plain values only, and runs nothing.

    Raises:
        UsageError: the file is missing, damaged (its CRC-32 sums are checked), or no checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"--resume {path}: no such file") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise UsageError(f"--resume {path}: not a readable checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or not {"settings", "model", "optimizer", "schedule", "step", "rng"} <= set(state):
        raise UsageError(f"--resume {path}: not a checkpoint of this program")
    return state


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
