"""Calls of pytest on a copy of the working tree, forked from a process that has imported torch and not the library."""

import ctypes
import importlib
import importlib.util
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

IMPORTED_BEFORE = ("torch", "torch.distributed", "hypothesis", "pytest")  # not triton: it interprets or compiles
SET_CHILD_SUBREAPER = 36  # of prctl(2)


def prepare() -> None:
    """Import what every run needs, and become the parent of all that a run leaves behind."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in IMPORTED_BEFORE:
        importlib.import_module(module)
    assert not {"barlow_loss", "triton"} & set(sys.modules)
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_pytest(
    arguments: Sequence[str], root: Path, output: Path, environment: dict[str, str], limit: float
) -> int | None:
    """Call pytest in the copy, with its package; the exit status, None where it did not end in ``limit`` seconds."""
    try:
        return _ended(_fork(arguments, root, output, environment), limit)
    finally:
        _end_descendants()


def _fork(arguments: Sequence[str], root: Path, output: Path, environment: dict[str, str]) -> int:
    """Start ``python -m pytest`` in a child; its number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
            os.dup2(source, target)
        os.chdir(root)
        # No bytecode outlives its source: two bugs of one length, planted within a second, would share a file of it.
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | environment
        sys.path[0], sys.argv = str(root), ["pytest", *arguments]
        package = importlib.util.find_spec("barlow_loss")
        assert package is not None and Path(str(package.origin)).is_relative_to(root), package  # noqa: PT018
        runpy.run_module("pytest", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(pid: int, limit: float) -> int | None:
    """The exit status of a child, None if it has not ended in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def _end_descendants() -> None:
    """Kill a run and all that it has left behind: a process whose parent has ended becomes a child of this one."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while below := children.read_text().split():
        for pid in map(int, below):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
