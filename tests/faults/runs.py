"""Runs of the program: how the faults start, watch and end them, and read what they leave."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import start
import torch
from outcomes import differences
from start import Change

from programs import PATIENCE, Nursery, Program, Wrong, children, until


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


class Training(Program):
    """A run of the program; its results go to ``out`` in its folder."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def step(self) -> int:
        """The last that is logged."""
        return max((row["step"] for row in rows(self.out, "step")), default=0)

    def ended(self) -> bool:
        return self.status is not None

    def reach(self, step: int) -> None:
        """Wait until a step is logged, before the run's end."""
        self.until(lambda: self.step >= step, f"step {step}")
        expect(not self.ended(), f"ended before the fault, with status {self.status}: {self.errors[-500:]}")

    def succeed(self) -> "Training":
        expect(self.wait() == 0, f"status {self.status}, not 0: {self.errors[-800:]}")
        return self

    def fail(self, status: int, *patterns: str, seconds: float = PATIENCE) -> "Training":
        """End with this status and with one line, in which every pattern is found."""
        expect(self.wait(seconds) == status, f"status {self.status}, not {status}: {self.errors[-800:]}")
        told = "\n".join(self.told)
        expect(self.errors == f"{told}\n" and len(self.told) == 1, f"not one line: {self.errors[-800:]}")
        for pattern in patterns:
            expect(re.search(pattern, told), f"{pattern!r} is not in {told!r}")
        return self

    def workers(self, count: int) -> list[int]:
        """The processes that it has started."""
        return until(lambda: found if len(found := children(self.pid)) == count else [], f"{count} workers")

    def rank(self, number: int) -> int:
        """Of torchrun, the process of a rank."""
        return self.until(lambda: rank_of(self.pid, number), f"rank {number}")


class Trainings:
    """Starts runs, in forks of one process. ``changes`` are made in all of them; see start.py."""

    def __init__(self, nursery: Nursery, changes: Sequence[Change] = ()) -> None:
        self.nursery = nursery
        self.changes = list(changes)

    def start(self, folder: Path, *flags: object, changes: Sequence[Change] = (("quick",),)) -> Training:
        """Start the program in a folder."""
        return self.nursery.start(self._arguments(changes, flags), folder, Training)

    def ranks(
        self, size: int, folder: Path, *flags: object, changes: Sequence[Change] = (("quick",),)
    ) -> list[Training]:
        """Start the processes of one run without torchrun, each with its number."""
        return self.nursery.ranks(size, self._arguments(changes, flags), folder, Training)

    def torchrun(self, folder: Path, *flags: object, launcher: Sequence[str] = ()) -> Training:
        """Start two processes as a user does."""
        options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher)
        return self.nursery.start([*options, *self._arguments([["quick"]], flags)], folder, Training)

    def _arguments(self, changes: Sequence[Change], flags: Sequence[object]) -> list[object]:
        return [start.__file__, json.dumps([*self.changes, *changes]), *flags]


def rank_of(pid: int, number: int) -> int | None:
    """The process of a rank that torchrun has started."""
    for child in children(pid):
        with suppress(psutil.Error):
            if psutil.Process(child).environ().get("RANK") == f"{number}":
                return child
    return None


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    """Of metrics.jsonl, while it is written, too."""
    path = out / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [row for row in found if row["kind"] == kind]


def trace(out: Path) -> dict[int, dict[str, Any]]:
    """What is logged of every step, apart from the time it took."""
    kept = [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows(out, "step")]
    return {row["step"]: row for row in kept}


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def expect_same_steps(out: Path, reference: Path) -> None:
    """What is logged of every step is, to the bit, what the other run has logged of it."""
    here, there = trace(out), trace(reference)
    other = [step for step, row in here.items() if row != there.get(step)]
    expect(not other, f"steps {other} are not those of the uninterrupted run")


def expect_same_end(out: Path, reference: Path) -> None:
    """All steps are the same, and the last checkpoint too."""
    expect(trace(out).keys() == trace(reference).keys(), f"steps are missing: {sorted(trace(out))}")
    expect_same_steps(out, reference)
    places = differences(state(out), state(reference))
    expect(not places, f"the last checkpoint differs in {places[:3]}")


def send(pid: int, number: signal.Signals) -> float:
    """Send a signal, and tell when."""
    os.kill(pid, number)
    return time.monotonic()
