"""Programs that tests start: watched, asked to stop, and never left running.

What a program prints goes to files, so that it never waits for a reader. It leads a session of its own; at the end of
its ``with`` block it is killed, with all that it has started. A program is a new interpreter, or the fork of a nursery.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
P = TypeVar("P", bound="Program")
ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 150.0  # seconds: ten times what anything here takes on a quiet machine
TICK = 0.005  # seconds between two looks


class Wrong(AssertionError):
    """Something is not as it must be."""


def environment(**variables: str) -> dict[str, str]:
    """Of a process that imports the package from this checkout, on one thread, alone."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | variables


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Wait for a true value, and get it. A hang is wrong."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Wrong(f"not within {seconds:g} seconds: {what}")
        time.sleep(TICK)
    return value


def children(pid: int, recursive: bool = False) -> list[int]:
    """The processes that one has started, or all below it, the oldest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(process.pid for process in psutil.Process(pid).children(recursive))
    return []


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Program:
    """A process that was started in a folder.

    Args:
        pid: the leader of its session.
        poll: tells its exit status, or None.
        folder: where it runs.
        output: the file of what it prints.
        errors: the file of its errors.
    """

    def __init__(self, pid: int, poll: Callable[[], int | None], folder: Path, output: Path, errors: Path) -> None:
        self.pid, self.folder = pid, folder
        self._poll, self._output, self._errors = poll, output, errors
        self._status: int | None = None

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
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        if self._status is None:
            self._status = self._poll()
        return self._status

    def until(self, condition: Callable[[], T], what: str) -> T:
        """Wait for something while the program runs."""

        def look() -> T:
            if not (value := condition()) and self.status is not None:
                raise Wrong(f"ended with {self.status} before {what}: {self.output[-500:]}\n{self.errors[-2000:]}")
            return value

        return until(look, what)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end, and get its exit status."""
        try:
            until(lambda: self.status is not None, "its end", seconds)
        except Wrong as hang:
            self.kill()
            raise Wrong(f"{hang}; it said {self.output[-500:]}\n{self.errors[-2000:]}") from None
        assert self.status is not None
        return self.status

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and all that it has started, in sessions of their own too."""
        alive = [*children(self.pid, recursive=True), *([self.pid] if self.status is None else [])]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        kill(alive)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        until(lambda: self.status is not None, "the end of what was killed")


def start(command: Sequence[object], folder: Path, **variables: str) -> Program:
    """Start a command."""
    output, errors = _files(folder)
    with output.open("a") as out, errors.open("a") as err:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=environment(**variables), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=_as_in_a_terminal,  # noqa: PLW1509
        )  # fmt: skip
    return Program(process.pid, process.poll, folder, output, errors)


def _as_in_a_terminal() -> None:
    """Ctrl-C arrives, though the tests may have been started in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: Sequence[object], folder: Path, **variables: str) -> Program:
    """Start a command, and wait for its end."""
    with start(command, folder, **variables) as program:
        program.wait()
    return program


def _files(folder: Path) -> tuple[Path, Path]:
    """For what a program prints, and for its errors: beside the folder, which may have to be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len([*folder.parent.glob(f"{folder.name}.*.stdout")])
    output, errors = (folder.with_name(f"{folder.name}.{number}.{kind}") for kind in ("stdout", "stderr"))
    output.touch()
    errors.touch()
    return output, errors


class Nursery:
    """Starts Python programs as forks of one process, which has imported these modules; see nursery.py."""

    def __init__(self, *modules: str, path: Sequence[Path] = ()) -> None:
        paths = os.pathsep.join([*map(str, path), environment()["PYTHONPATH"]])
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "nursery.py"), *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(PYTHONPATH=paths), text=True,
        )  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        kill(children(self._process.pid, recursive=True))
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def start(self, arguments: Sequence[object], folder: Path, kind: type[P] = Program, **variables: str) -> P:
        """Start what ``python ARGUMENTS`` runs."""
        output, errors = _files(folder)
        request = {
            "arguments": [*map(str, arguments)],
            "folder": str(folder),
            "output": str(output),
            "errors": str(errors),
            "environment": environment(**variables),
        }
        pid = self._ask(request)
        return kind(pid, lambda: self._ask({"poll": pid}), folder, output, errors)

    def ranks(self, size: int, arguments: Sequence[object], folder: Path, kind: type[P] = Program) -> list[P]:
        """Start the processes of one run without torchrun, each with its number."""
        if size == 1:
            return [self.start(arguments, folder, kind)]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(arguments, folder, kind, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)
        ]

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
