"""The machine and the versions that figures belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import barlow_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What stands at the head of every file of results."""
    packages = ("lightly", "stable-pretraining")
    versions = {"barlow-loss": barlow_loss.__version__, "torch": torch.__version__}
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions | {package: _version(package) for package in packages},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name() -> str:
    """The processor, as part of a file's name."""
    words = re.sub(r"\(.*?\)|@.*|[^a-z0-9]+", "-", f"{_cpu()} {torch.backends.cpu.get_cpu_capability()}".lower())
    return re.sub(r"-+", "-", words).strip("-")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def revision() -> str | None:
    """The commit that was measured, marked where the tree differs from it; None outside of a repository."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


@contextmanager
def all_cores() -> Iterator[None]:
    """For what is not timed on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
