"""The machine and the versions that figures belong to, and where results lie.

A run writes its results beside the committed ones. Until they are added to the repository they are nobody's reference:
README and the regression gate go by those that git knows. Outside of a repository all count.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import barlow_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PATTERN = "20??-??-??-*.json"


def environment(*packages: str, device: torch.device | None = None) -> Record:
    """What stands at the head of every file of results; of a GPU where ``device`` is one."""
    own = {"barlow-loss": barlow_loss.__version__, "torch": torch.__version__}
    return {
        **(_of_cpu() if device is None else _of_gpu(device)),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": own | {package: _version(package) for package in packages},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _of_cpu() -> Record:
    return {"cpu": _cpu(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": cores()}


def _of_gpu(device: torch.device) -> Record:
    name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    driver = (
        _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else None
    )
    runtime = torch.version.hip or torch.version.cuda
    return {"device": name, "driver": driver.splitlines()[0] if driver else None, "runtime": runtime}


def device_name() -> str:
    """The processor, as part of a file's name."""
    words = re.sub(r"\(.*?\)|@.*|[^a-z0-9]+", "-", f"{_cpu()} {torch.backends.cpu.get_cpu_capability()}".lower())
    return re.sub(r"-+", "-", words).strip("-")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores() -> Iterator[None]:
    """For what is not timed on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def revision() -> str | None:
    """The commit that was measured, marked where the tree differs from it; None outside of a repository."""
    return (_said("git", "describe", "--always", "--dirty", "--abbrev=12") or "").strip() or None


def newest(folder: Path = RESULTS) -> Path:
    """The newest results in ``folder``, by the date that begins their name.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise FileNotFoundError(f"{folder}: expected results named {PATTERN}, found none: run make bench")
    return found[-1]


def tracked(folder: Path = RESULTS) -> Path:
    """The newest results in ``folder`` that git tracks, as they lie there now."""
    listed = _said("git", "ls-files", ".", folder=folder) or ""
    found = sorted(name for name in listed.splitlines() if fnmatch(name, PATTERN))
    return folder / found[-1] if found else newest(folder)


def baseline(folder: Path = RESULTS) -> tuple[str, Record]:
    """Name and content of the newest results of the last commit, whatever a later run has written over them."""
    path = tracked(folder)
    content = _said("git", "show", f"HEAD:./{path.name}", folder=folder)
    return path.name, json.loads(content) if content else load(path)


def load(path: Path) -> Record:
    """The results in a file."""
    results: Record = json.loads(path.read_text(encoding="utf-8"))
    return results


def store(results: Record, path: Path) -> None:
    """Write results to a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _said(*command: str, folder: Path = RESULTS) -> str | None:
    """What a program says in ``folder``, or None where it fails, is missing, or there is no such folder."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
