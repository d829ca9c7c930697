"""How gpu.py takes time and memory, and the ceilings of the card: one class for GPUs, one that stands in on the CPU.

A step is timed by two events around it, after the L2 cache has been overwritten: its inputs then come from memory, as
after a large network. The host issues the step while that runs, so a step's own launch gaps show only where the host
needs longer than the overwriting and the step together; ``back_to_back`` times many steps in a row without it, which
shows what the host costs, with the inputs in the cache where they fit there.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gpu_contenders import Graphed
from gpu_model import Chip

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_contenders import Turn

_LEAST_FLUSH = 256 * 2**20
_SQUARE = 8192
_COPY_BYTES = 2**30
_LAUNCHES = 500
_MOST_CALLS = 300  # in a turn: each has the cache overwritten before it, which takes longer than a small step


class Clock(Protocol):
    """What gpu.py needs to know of a machine."""

    device: torch.device

    def cold(self, turn: Callable[[], object], calls: int) -> float:
        """Seconds of a step whose inputs are not in the cache, the median of at most ``calls``."""
        ...

    def back_to_back(self, turn: Callable[[], object], calls: int) -> float:
        """Seconds per step of ``calls`` in a row."""
        ...

    def peak(self, turn: Turn) -> tuple[int | None, int]:
        """Bytes by which the allocated memory rises during a step; those of the gradients that it returns."""
        ...

    def ceilings(self) -> dict[str, float]:
        """Bandwidth of a copy, rates of large products, costs of launches."""
        ...


class Gpu:
    """CUDA and ROCm, and XPU as far as its module offers the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        cache = getattr(self._module.get_device_properties(device), "L2_cache_size", 0)
        self._other = torch.empty(max(4 * cache, _LEAST_FLUSH), dtype=torch.int8, device=device)

    def cold(self, turn: Callable[[], object], calls: int) -> float:
        pairs = [(self._event(), self._event()) for _ in range(min(calls, _MOST_CALLS))]
        for start, end in pairs:
            self._other.zero_()
            start.record()
            turn()
            end.record()
        self._module.synchronize()
        milliseconds: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / 1e3

    def back_to_back(self, turn: Callable[[], object], calls: int) -> float:
        start, end = self._event(), self._event()
        self._module.synchronize()
        start.record()
        for _ in range(calls):
            turn()
        end.record()
        self._module.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds / calls

    def peak(self, turn: Turn) -> tuple[int | None, int]:
        gc.collect()
        self._module.synchronize()
        self._module.reset_peak_memory_stats()
        before = self._module.memory_allocated()
        answer = turn()
        self._module.synchronize()
        rise: int = turn.peak if isinstance(turn, Graphed) else self._module.max_memory_allocated() - before
        return rise, sum(gradient.nbytes for gradient in answer[1:])

    def ceilings(self) -> dict[str, float]:
        found = {"copy_bytes_per_second": self._copy()}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            found[f"{str(dtype).removeprefix('torch.')}_flops"] = self._product(dtype)
        return found | self._launches()

    def _copy(self) -> float:
        source = torch.randn(_COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * _COPY_BYTES / self._median(lambda: target.copy_(source))

    def _product(self, dtype: torch.dtype) -> float:
        a, b = (torch.randn(_SQUARE, _SQUARE, device=self.device).to(dtype) for _ in range(2))
        return 2 * _SQUARE**3 / self._median(lambda: torch.mm(a, b))

    def _launches(self) -> dict[str, float]:
        """Seconds per tiny kernel, issued by the host, and replayed from a graph."""
        x = torch.zeros(1, device=self.device)

        def many() -> None:
            for _ in range(_LAUNCHES):
                x.add_(1)

        found = {"host_seconds": self._median(many) / _LAUNCHES}
        if hasattr(self._module, "CUDAGraph"):
            graph = self._module.CUDAGraph()
            with self._module.graph(graph):
                many()
            found["launch_seconds"] = self._median(graph.replay) / _LAUNCHES
        return found

    def _median(self, turn: Callable[[], object]) -> float:
        """The median of eleven, after two to warm up."""
        self.back_to_back(turn, 2)
        return statistics.median(self.back_to_back(turn, 1) for _ in range(11))

    def _event(self) -> Any:
        return self._module.Event(enable_timing=True)


class Host:
    """Lets the whole program run where there is no GPU; its figures mean nothing."""

    device = torch.device("cpu")

    def cold(self, turn: Callable[[], object], calls: int) -> float:
        return self.back_to_back(turn, calls)

    def back_to_back(self, turn: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            turn()
        return (time.perf_counter() - start) / calls

    def peak(self, turn: Turn) -> tuple[int | None, int]:
        return None, sum(gradient.nbytes for gradient in turn()[1:])

    def ceilings(self) -> dict[str, float]:
        rates = dict.fromkeys(("float16_flops", "bfloat16_flops", "float32_flops"), 1e10)
        return {"copy_bytes_per_second": 1e10, "host_seconds": 1e-5, "launch_seconds": 1e-5, **rates}


def chip(name: str, ceilings: dict[str, float]) -> Chip:
    """The measured ceilings as the model takes them; ours multiplies in float16."""
    launch = ceilings.get("launch_seconds", ceilings["host_seconds"])
    rates = ceilings["float16_flops"], ceilings["float32_flops"]
    return Chip(name, ceilings["copy_bytes_per_second"], *rates, launch, ceilings["host_seconds"])
