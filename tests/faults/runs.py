"""Runs of the program: how the faults start, watch and end them, and read what they leave."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import start
import torch
from nursery import children, kill_tree
from outcomes import differences, environment
from start import PROGRAM, Change

T = TypeVar("T")
PATIENCE = 90.0  # seconds that anything may take on a busy machine, where the fault says nothing else
TICK = 0.005  # seconds between two looks


class Wrong(Exception):
    """Something is not as it must be."""


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Wait for a true value, and get it. A hang is wrong."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        expect(time.monotonic() < deadline, f"not within {seconds:g} seconds: {what}")
        time.sleep(TICK)
    return value


class Training:
    """A process that has been started in a folder; its results go to ``out`` there."""

    def __init__(self, nursery: "Nursery", folder: Path, pid: int, output: Path, errors: Path) -> None:
        self.nursery, self.folder, self.pid = nursery, folder, pid
        self._output, self._errors = output, errors
        self.status: int | None = None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def told(self) -> list[str]:
        """What the program says of itself; torchrun adds a page of its own."""
        return [line for line in self.errors.splitlines() if line.startswith(("error: ", "warning: "))]

    @property
    def step(self) -> int:
        """The last that is logged."""
        return max((row["step"] for row in rows(self.out, "step")), default=0)

    def ended(self) -> bool:
        if self.status is None:
            self.status = self.nursery.ask({"poll": self.pid})
        return self.status is not None

    def reach(self, step: int) -> None:
        """Wait until a step is logged, before the run's end."""
        until(lambda: self.step >= step or self.ended(), PATIENCE, f"step {step}")
        expect(not self.ended(), f"ended before the fault, with status {self.status}: {self.errors[-500:]}")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Get the exit status."""
        try:
            until(self.ended, seconds, "its end")
        except Wrong as hang:
            kill_tree(self.pid)
            raise Wrong(f"{hang}; it said {self.errors[-500:]!r}") from None
        assert self.status is not None
        return self.status

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
        return until(lambda: found if len(found := children(self.pid)) == count else [], PATIENCE, f"{count} workers")

    def rank(self, number: int) -> int:
        """Of torchrun, the process of a rank."""

        def find() -> int | None:
            expect(not self.ended(), f"torchrun has ended: {self.errors[-500:]}")
            for pid in children(self.pid):
                with suppress(OSError):
                    if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        return pid
            return None

        return until(find, PATIENCE, f"rank {number}") or 0


class Nursery:
    """Starts runs, in forks of one process; see nursery.py. ``changes`` are made in all of them."""

    def __init__(self, changes: Sequence[Change] = ()) -> None:
        self.changes = list(changes)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
        )  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        *flags: object,
        changes: Sequence[Change] = (("quick",),),
        program: str = str(PROGRAM),
        variables: dict[str, str] | None = None,
    ) -> Training:
        """Start the program, or another one, in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.stdout")))
        output, errors = folder / f"{number}.stdout", folder / f"{number}.stderr"
        output.touch()
        errors.touch()
        request = {
            "folder": str(folder),
            "output": str(output),
            "errors": str(errors),
            "environment": variables or {},
            "changes": [*self.changes, *changes],
            "program": program,
            "flags": [*map(str, flags)],
        }
        return Training(self, folder, self.ask(request), output, errors)

    def ranks(self, size: int, folder: Path, *flags: object, **options: Any) -> list[Training]:
        """Start the processes of one run without torchrun, each with its number."""
        if size == 1:
            return [self.start(folder, *flags, **options)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.start(folder, *flags, variables=shared | number, **options) for number in numbers]

    def torchrun(self, folder: Path, *flags: object, launcher: Sequence[str] = ()) -> Training:
        """Start two processes as a user does."""
        changes = json.dumps([*self.changes, ["quick"]])
        arguments = ["--standalone", "--nproc-per-node", "2", *launcher, start.__file__, changes, *flags]
        return self.start(folder, *arguments, changes=(), program="torch.distributed.run")


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
