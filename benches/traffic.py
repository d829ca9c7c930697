"""Bytes that one rank sends in one step: by a model, by the collectives that it calls, by the loopback's own counter.

The model is that of ring algorithms over W ranks. To gather what each of them has, a rank sends it, and what comes in,
W − 1 times in all; to sum a tensor over them it sends 2 (W − 1)/W times the tensor. As much arrives.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from workload import Cell


class Cost(NamedTuple):
    """What a step costs one rank: bytes sent of large matrices, bytes sent of vectors of D numbers, and FLOPs."""

    matrices: float
    vectors: float
    flops: float

    @property
    def sent(self) -> float:
        """All bytes."""
        return self.matrices + self.vectors


def gathered(size: float, processes: int) -> float:
    """Bytes that a rank sends to gather ``size`` bytes from each."""
    return size * (processes - 1)


def summed(size: float, processes: int) -> float:
    """Bytes that a rank sends to sum ``size`` bytes over all."""
    return 2 * size * (processes - 1) / processes


def dual(cell: Cell, processes: int, itemsize: int = 4) -> Cost:
    """Ours for N ≤ D/2: û of both views, gathered, four products, and what is per feature, in float64.

    The vectors: the pivot; N, s₁ and s₂ of both views; C_ii, ‖C‖² and q of both views. Besides, the header's three
    integers, and two float32 in backward.
    """
    n, d = cell.n, cell.d
    vectors = sum(summed(8 * numbers, processes) for numbers in (2 * d, 1 + 4 * d, 1 + 3 * d))
    return Cost(
        matrices=2 * gathered(itemsize * n * d / processes, processes),
        vectors=gathered(3 * 8, processes) + vectors + summed(2 * 4, processes),
        flops=8 * n * n * d / processes,
    )


def textbook(cell: Cell, processes: int) -> Cost:
    """The published program: C summed in float32, three products; the vectors of its batch norm are left out."""
    n, d = cell.n, cell.d
    return Cost(matrices=summed(4 * d * d, processes), vectors=0, flops=6 * n * d * d / processes)


# By operator: which argument holds what a rank puts in, and what it sends for that. Any other one is a KeyError.
_COLLECTIVES: dict[Any, tuple[int, Callable[[float, int], float]]] = {
    torch.ops.c10d.allreduce_.default: (0, summed),
    torch.ops.c10d.allgather_.default: (1, gathered),
}


class Collectives(TorchDispatchMode):
    """Adds up in ``sent`` what the model says of every collective called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            inputs, sends = _COLLECTIVES[func]
            self.sent += sum(sends(t.nbytes, dist.get_world_size()) for t in args[inputs])
        return func(*args, **(kwargs or {}))


def loopback_bytes() -> int | None:
    """What the loopback interface has carried since the machine started; None where the system does not tell."""
    counters = Path("/proc/net/dev")
    if not counters.exists():
        return None
    return next(int(line.split()[1]) for line in counters.read_text().splitlines() if line.split()[0] == "lo:")
