"""Peak working memory of one step: what it allocates beyond its inputs and the gradients that it returns.

Two ways to see it:

* ``live_bytes``: counts the bytes of the tensor storages that PyTorch's operators create, exactly and reproducibly.
  Blind to buffers inside a kernel and to everything in code that ``torch.compile`` generated.
* ``resident_bytes``: how far the resident memory of a fresh process rises above its level before the step (Linux).
  Sees everything, in pages, and counts the returned gradients too if they exist at the peak; malloc is told to hand
  every large buffer back, so that nothing is reused unseen.

Byte model, float32: the dual holds at most 5·N·D + 3·N² elements, the textbook formula about 4·D².

    python benches/memory.py 256x8192 textbook     prints the resident bytes of one contender
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines import build
from workload import Cell, step

if TYPE_CHECKING:
    from baselines import Contender

# glibc raises its threshold for mmap when large buffers come back; fixed, every one of them is returned at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class _Allocations(TorchDispatchMode):
    """Logs the birth (+bytes) and the death (−bytes) of every tensor storage but those of ``known`` tensors."""

    def __init__(self, known: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self._live = {z.untyped_storage()._cdata for z in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.log.append((key, size))
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.log.append((key, -size))


def live_bytes(contender: Contender, cell: Cell) -> int:
    """Peak bytes of the storages alive at once during a step, without inputs and returned gradients."""
    views = cell.views()
    step(contender, *views)  # what the first call sets up is not working memory
    with _Allocations(views) as allocations:
        answer = step(contender, *views)
    results = {tensor.untyped_storage()._cdata for tensor in answer}
    last_birth = {key: i for i, (key, size) in enumerate(allocations.log) if size > 0 and key in results}
    live = peak = 0
    for i, (key, size) in enumerate(allocations.log):
        if last_birth.get(key) != i:
            live += size
            peak = max(peak, live)
    return peak


def resident_bytes(name: str, cell: Cell, threads: int = 1) -> int | None:
    """The rise of the resident memory of a fresh process over one step; None where /proc does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, f"{cell.n}x{cell.d}", name, "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} at {cell} failed in its own process:\n{done.stderr}")
    return int(done.stdout)


def _resident_rise(contender: Contender, cell: Cell) -> int:
    views = cell.views()
    for _ in range(2):
        step(contender, *views)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present level
    before = _status("VmRSS")
    step(contender, *views)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main() -> None:
    parser = argparse.ArgumentParser(description="Resident bytes that one step adds beyond its inputs.")
    parser.add_argument("cell", type=Cell.parse, help="N×D, for example 256x8192")
    parser.add_argument("contender")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(_resident_rise(build(arguments.contender, arguments.cell.d), arguments.cell))


if __name__ == "__main__":
    _main()
