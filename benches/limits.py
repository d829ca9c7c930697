"""How far a step of ours is from what this machine can do, and where the rest goes.

The algorithm's products cannot be faster than ``torch.mm`` of the same shapes, those in turn no faster than one of a
large square, and what passes through memory no faster than a copy too large for the caches. The ceilings are measured
in the same run, the products in turn with the step.

* FLOPs: those of the products that a step executes. The Gram matrices use their symmetry and need less than 2·N²·D.
* Bytes: what all its other operators read and write, counted operator by operator. A block that is still in the cache
  when the next one reads it counts again, so the true traffic is lower, and a step may take less than this model.
* Parts: a profile of the step: inside matrix products; inside other operators, which allocate as well; and neither:
  Python and autograd.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines import OURS, build
from timing import interleave, ratios, spread, time_calls
from workload import Cell, step

if TYPE_CHECKING:
    from timing import Turn

    Record = dict[str, Any]

CELLS = tuple(map(Cell.parse, ("256x2048", "256x8192", "1024x8192", "4096x512")))
COPIED_BYTES = 2**28
SQUARE = 2048
PROFILED_STEPS = 3


def limits(cell: Cell, threads: int, rounds: int, seconds: float) -> Record:
    """A step of ours at ``cell`` beside its products alone, its floor and its parts."""
    torch.set_num_threads(threads)
    views = cell.views()
    turn = partial(step, build(OURS, cell.d), *views)
    shapes, products = gemms(cell)
    for warm_up in (turn, products):
        warm_up()
    times = interleave({"step": turn, "products": products}, rounds, seconds)
    taken, alone = spread(times["step"]), spread(times["products"])
    ceilings = {
        "flops_per_second": work(products).flops / alone["median"],
        "square_flops_per_second": _square_flops_per_second(),
        "bytes_per_second": _copied_bytes_per_second(),
    }
    done = work(turn)
    return {
        "n": cell.n,
        "d": cell.d,
        "threads": threads,
        "algorithm": cell.algorithm,
        "rounds": len(times["step"]),
        "seconds": taken,
        "gemms": {"shapes": shapes, "seconds": alone},
        "ours_over_gemms": ratios(times, "products")["step"],
        "ceilings": ceilings,
        "flops": done.flops,
        "bytes": done.bytes,
        "model_seconds": done.flops / ceilings["flops_per_second"] + done.bytes / ceilings["bytes_per_second"],
        "parts": _parts(turn, taken["median"]),
    }


def gemms(cell: Cell) -> tuple[list[str], Turn]:
    """The shapes of the GEMMs that the algorithm chosen for ``cell`` needs, and a turn that does them alone."""
    n, d = cell.n, cell.d
    a1, a2 = torch.randn(2, n, d)
    if cell.algorithm == "dual":
        k = torch.randn(n, n)
        pairs = [(a1, a1.T), (a2, a2.T), (k, a1), (k, a2)]
    else:
        m = torch.randn(d, d)
        pairs = [(a1.T, a2), (a2, m.T), (a1, m)]
    shapes = ["·".join(f"({'×'.join(map(str, matrix.shape))})" for matrix in pair) for pair in pairs]
    return shapes, lambda: [torch.mm(left, right) for left, right in pairs]


def _square_flops_per_second() -> float:
    """Of a product that suits every machine, so that a shape that does not shows."""
    a, b = torch.randn(2, SQUARE, SQUARE)
    turn = partial(torch.mm, a, b)
    turn()
    return 2 * SQUARE**3 / spread([time_calls(turn) for _ in range(3)])["median"]


def _copied_bytes_per_second() -> float:
    """Bytes read and written, by a copy of 256 MB."""
    source, target = torch.ones(2, COPIED_BYTES // 4)
    turn = partial(target.copy_, source)
    turn()
    return 2 * COPIED_BYTES / spread([time_calls(turn) for _ in range(5)])["median"]


# By operator: where the two factors stand among its arguments.
_PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1}
_OTHER_PRODUCTS = tuple(getattr(torch.ops.aten, name) for name in ("addmv", "baddbmm", "mv"))


def work(turn: Turn) -> Work:
    """The FLOPs, the bytes and the operations of ``turn``."""
    counted = Work()
    with counted:
        turn()
    return counted


class Work(TorchDispatchMode):
    """Adds up the ``flops`` of products, the ``bytes`` that all else but views and allocations reads and writes.

    And counts all ``operations``, views and allocations too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        self.operations += 1
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet] :][:2]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif packet in _OTHER_PRODUCTS:
            raise NotImplementedError(f"work: expected {', '.join(map(str, _PRODUCTS))}, got {packet}; count its FLOPs")
        elif not func.is_view and packet not in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            self.bytes += sum(_elements_bytes(leaf) for leaf in tree_leaves((args, result)))
        return result


def _elements_bytes(leaf: object) -> int:
    """The bytes of a tensor's own elements: one of an expanded dimension counts once."""
    if not isinstance(leaf, torch.Tensor):
        return 0
    count = 1
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * leaf.element_size()


def _parts(turn: Turn, seconds: float) -> dict[str, float]:
    """``seconds`` of a step, divided as a profile of it says."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = PROFILED_STEPS * time_calls(turn, PROFILED_STEPS)
    products = elementwise = 0.0
    for operator in profiler.key_averages():
        if operator.key in ("aten::mm", "aten::bmm", "aten::addmm"):
            products += operator.self_cpu_time_total / 1e6
        elif operator.key.startswith("aten::"):
            elementwise += operator.self_cpu_time_total / 1e6
    rest = whole - products - elementwise
    return {
        "products": seconds * products / whole,
        "elementwise": seconds * elementwise / whole,
        "rest": seconds * rest / whole,
    }
