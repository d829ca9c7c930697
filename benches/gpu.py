"""Times the loss on a GPU against the textbook formula and lightly, beside the model of model.py.

Six contenders take turns, forward and backward, each step timed by events around it with the L2 cache overwritten
before. What is further from float64 of the same views than ``allowed`` is reported and not timed; so is what ran out of
memory, or is not installed. Settings: "fp32" (views and products in float32, precision "highest") and "bf16 autocast"
(bfloat16 views, as a linear layer under autocast gives them, and the loss under ``torch.autocast``).

    python benches/gpu.py                      the whole grid into results/gpu.json and gpu.md
    python benches/gpu.py --grid 256x8192 --out /tmp/gpu
    python benches/gpu.py --smoke              no GPU: runs this program on tiny CPU tensors; its figures mean nothing
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import contenders
import measure
import model
from barlow_loss import BarlowTwinsLoss
from measure import OTHERS_ALLOWED, OURS_ALLOWED, RESULTS, Cell, Errors, cells, ratios, spread, step, wall
from model import AUTOCAST, COMPILED, CONTENDERS, EAGER, FLOAT32, GRAPH, LIGHTLY, SETTINGS, TEXTBOOK, TRITON, Chip
from render import figure, paragraphs, plain, shape, shown, table
from render import spread as told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from measure import Answer, Record, Turn
    from model import Setting

    Step = Callable[[], Answer]

OURS = (EAGER, TRITON, GRAPH)
# The cells of the stated goals first, in case the budget does not last.
SMALL, LARGE = cells("256x8192", "2048x8192")
ORDER = (LARGE, SMALL, *cells("256x2048", "1024x8192", "4096x8192", "2048x32768"))
SMOKE_GRID = cells("16x64", "24x96")
COMPILE_SECONDS = 20  # kept in reserve for a compilation; without it the compiled contender is left out
CELL_SECONDS = 4
ROUNDS = 7
WARM_UPS = 3
SQUARE, COPIED_BYTES, LAUNCHES = 8192, 2**30, 500

PRODUCTS = "products of the dual alone"
COLUMNS = (
    ("N × D", "", shape),
    ("contender", "name", str),
    ("predicted, ms", "predicted", str),
    ("ms", "seconds", lambda seconds: told({key: 1e3 * value for key, value in seconds.items()})),
    ("ms back to back", "back_to_back", 1e3),
    ("× floor", "over_floor", 1.0),
    *((f"× {name}", f"times/{name}/median", 1.0) for name in OURS),
    ("MB with gradients", "peak_bytes", 1e-6),
    ("loss error", "loss_error", 1.0),
    ("gradient error", "gradient_error", 1.0),
    ("instead of a time", "instead", lambda why: why.replace("|", "/")),
)
# In bf16 autocast, by the columns.
GOALS = (
    (LARGE, TRITON, "× floor", "≤ 1.35"),
    (LARGE, TEXTBOOK, f"× {TRITON}", "≥ 5"),
    (LARGE, COMPILED, f"× {TRITON}", "≥ 3"),
    (LARGE, TRITON, "MB with gradients", "≤ 220"),
    (SMALL, GRAPH, "ms", "≤ 0.06"),
    (SMALL, TEXTBOOK, f"× {GRAPH}", "≥ 20"),
    (SMALL, COMPILED, f"× {GRAPH}", "≥ 6"),
    (SMALL, TRITON, "MB with gradients", "≤ 25"),
)
NOTES = """\
Time: forward and backward to the gradients of both views, by events, the L2 cache overwritten before each step; median
and quartiles over rounds in which the contenders take turns; ratios are taken within a round. *Back to back*: steps in
a row, the host's share included. A predicted range is without and with a second pass over operands just read, which
the L2 cache serves where they fit there. *Floor*: the larger of FLOPs of the dual over the rate of a large product and
of views read once and gradients written once over the rate of a copy. *MB with gradients*: the rise of the memory
during a step, beyond the views. Errors: relative distance to float64 on the same views, of the loss and of both
gradients by norm. What was measured is the code of that day; predictions are those of the model as it is now. What has
none is no contender any more.
"""


class Events:
    """The clock of a GPU: an event before and after each step, its inputs in memory as after a large network.

    The L2 cache is overwritten before each. The host issues the step while that runs, so its own launch gaps show only
    where the host needs longer than the overwriting and the step together; ``in_a_row`` leaves the overwriting out.
    """

    LEAST_FLUSH = 256 * 2**20
    MOST_CALLS = 300  # in a turn: the overwriting takes longer than a small step

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._other = torch.empty(max(4 * cache, self.LEAST_FLUSH), dtype=torch.int8, device=device)

    def __call__(self, turn: Turn, calls: int) -> float:
        pairs = []
        for _ in range(min(calls, self.MOST_CALLS)):
            self._other.zero_()
            pairs.append(self._around(turn, 1))
        torch.cuda.synchronize()
        milliseconds: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / 1e3

    def in_a_row(self, turn: Turn, calls: int) -> float:
        """Seconds per call of ``calls`` in a row: with the host's share, and inputs in the cache where they fit."""
        torch.cuda.synchronize()
        start, end = self._around(turn, calls)
        torch.cuda.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds / calls

    def _around(self, turn: Turn, calls: int) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            turn()
        end.record()
        return start, end


class Wall:
    """In its place on the CPU, where the program is tried out."""

    device = torch.device("cpu")
    __call__ = in_a_row = staticmethod(wall)


class Graphed:
    """Forward and backward captured once on static views and replayed: one launch for the host.

    Warmed up and captured on one side stream, whose cuBLAS workspace then exists before the capture, so that ``peak``,
    the rise of the allocated memory during it, holds what the step needs. The graph keeps that memory until it dies.
    """

    def __init__(self, turn: Step) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                turn()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._answer = turn()
        self.peak: int = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> Answer:
        self._graph.replay()
        return self._answer


def missing(name: str, clock: Events | Wall, deadline: float) -> str | None:
    if name == COMPILED and time.monotonic() + COMPILE_SECONDS > deadline:
        return "the budget was spent"
    if name == LIGHTLY and not contenders.installed(contenders.LIGHTLY):
        return "not installed"
    if name in (TRITON, GRAPH) and clock.device.type == "cpu":
        return "needs a GPU"
    return "triton is not installed" if name in (TRITON, GRAPH, COMPILED) and find_spec("triton") is None else None


def build(name: str, cell: Cell, setting: Setting, clock: Events | Wall, *views: Tensor) -> Step:
    """A step of the contender ``name``: forward under the setting's autocast, backward outside of it."""
    if name in OURS:
        loss: Any = BarlowTwinsLoss(
            contenders.LAMBD, eps=contenders.EPS, backend="eager" if name == EAGER else "triton"
        )
    else:
        loss = contenders.build(contenders.LIGHTLY, cell.d) if name == LIGHTLY else contenders.Textbook(cell.d)
    loss = loss.to(clock.device)
    if name == COMPILED:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)

    def forward(*z: Tensor) -> Tensor:
        with torch.autocast(clock.device.type, torch.bfloat16) if setting == AUTOCAST else nullcontext():
            value: Tensor = loss(*z)
            return value

    turn = partial(step, forward, *views)
    return Graphed(turn) if name == GRAPH else turn


def allowed(name: str, setting: Setting) -> Errors:
    """Errors above which a time means nothing: ours to its promise, the others to what D×D matrices in 16 bits give.

    16 bits, ours: float16 operands, 2⁻¹⁰, in the loss, and two of them and the rounding to bfloat16, 2⁻⁸, in the
    gradient.
    """
    if name in OURS:
        return OURS_ALLOWED if setting == FLOAT32 else Errors(2**-10, 2**-9 + 2**-8)
    return OTHERS_ALLOWED if setting == FLOAT32 else Errors(0.05, 0.5)


def measured(cell: Cell, setting: Setting, clock: Events | Wall, rounds: int, deadline: float) -> Record:
    torch.compiler.reset()  # generated code is for one shape and dtype
    views = cell.views(device=clock.device, dtype=setting.dtype)
    right = measure.truth(*views)
    records: dict[str, Record] = {}
    turns: dict[str, Step] = {}
    for name in CONTENDERS:
        if reason := missing(name, clock, deadline):
            records[name] = {"left_out": reason}
            continue
        records[name], turn = _try(name, cell, setting, clock, right, views)
        if turn is not None:
            turns[name] = turn
    del right
    half = setting == AUTOCAST and clock.device.type != "cpu"  # the dtype that ours takes
    products = measure.gemms(cell, clock.device, torch.float16 if half else torch.float32)
    timed: dict[str, Turn] = {**turns, "products": products}
    times = measure.interleave(timed, rounds, CELL_SECONDS, clock)
    alone = times.pop("products")
    for over in filter(turns.__contains__, OURS):
        for name, ratio in ratios(times, over).items():
            records[name].setdefault("times", {})[over] = ratio
    for name, turn in turns.items():
        records[name]["seconds"] = spread(times[name])
        calls = max(3, math.ceil(0.02 / records[name]["seconds"]["median"]))
        records[name]["back_to_back"] = statistics.median(clock.in_a_row(turn, calls) for _ in range(3))
    found = {"rounds": len(alone), "contenders": records, "products": spread(alone)}
    return {"n": cell.n, "d": cell.d, "setting": setting.name, **found}


def _try(
    name: str, cell: Cell, setting: Setting, clock: Events | Wall, right: Answer, views: tuple[Tensor, ...]
) -> tuple[Record, Step | None]:
    """What is known of a contender before it is timed, and its turn if it is to be."""
    try:
        turn = build(name, cell, setting, clock, *views)
        found = measure.errors(turn(), right)
        peak = _peak(turn, clock)
    except Exception as error:  # a contender that breaks must not take the others with it
        _release(clock)
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}, None
    record: Record = {"loss_error": found.loss, "gradient_error": found.gradient, "peak_bytes": peak}
    limit = allowed(name, setting)
    if not (found.loss <= limit.loss and found.gradient <= limit.gradient):
        return record | {"failed": f"wrong: errors of at most {limit.loss:.1e} and {limit.gradient:.1e} expected"}, None
    return record, turn


def _peak(turn: Step, clock: Events | Wall) -> int | None:
    """Bytes by which the allocated memory rises during a step, its gradients among them."""
    gc.collect()
    if clock.device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    turn()
    torch.cuda.synchronize()
    rise: int = turn.peak if isinstance(turn, Graphed) else torch.cuda.max_memory_allocated() - before
    return rise


def ceilings(clock: Events | Wall) -> dict[str, float]:
    """Bandwidth of a copy, rates of large products, seconds per tiny kernel: issued by the host, and from a graph."""
    if clock.device.type == "cpu":
        rates = dict.fromkeys(("copy_bytes_per_second", "float16_flops", "float32_flops"), 1e10)
        return rates | {"host_seconds": 1e-5, "launch_seconds": 1e-5}

    def median(turn: Turn) -> float:
        clock.in_a_row(turn, 2)
        return statistics.median(clock.in_a_row(turn, 1) for _ in range(11))

    source = torch.randn(COPIED_BYTES // 4, device=clock.device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_second": 2 * COPIED_BYTES / median(partial(target.copy_, source))}
    for dtype in (torch.float16, torch.float32):
        factors = torch.randn(2, SQUARE, SQUARE, device=clock.device).to(dtype)
        found[f"{str(dtype).removeprefix('torch.')}_flops"] = 2 * SQUARE**3 / median(partial(torch.mm, *factors))
    one = torch.zeros(1, device=clock.device)

    def many() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    found["host_seconds"] = median(many) / LAUNCHES
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return found | {"launch_seconds": median(graph.replay) / LAUNCHES}


def run(clock: Events | Wall, grid: Sequence[Cell], deadline: float, out: Path) -> Record:
    """All cells, written after each, so that what was measured is kept whatever comes next."""
    versions = measure.environment("triton", "lightly", device=clock.device)
    smoke = clock.device.type == "cpu"
    results: Record = {
        "environment": versions,
        "ceilings": ceilings(clock),
        "smoke": smoke,
        "cells": [],
        "left_out": [],
    }
    for setting, cell in product(SETTINGS, grid):
        print(f"{cell}, {setting.name}", flush=True)
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the budget was spent")
            results["cells"].append(measured(cell, setting, clock, ROUNDS, deadline))
        except (TimeoutError, torch.OutOfMemoryError) as reason:  # the views and their float64 answer may be too large
            results["left_out"].append(f"{cell}, {setting.name}: left out, {str(reason).partition('. ')[0]}")
        measure.store(results, out / "gpu.json")
        _release(clock)
    return results


def _release(clock: Events | Wall) -> None:
    gc.collect()
    if clock.device.type != "cpu":
        torch.cuda.empty_cache()


def failures(results: Record) -> list[str]:
    return [
        f"{record['n']}×{record['d']}, {record['setting']}, {name}: {record['contenders'][name]['failed']}"
        for record in results["cells"]
        for name in OURS
        if "failed" in record["contenders"].get(name, {})
    ]


def chip(results: Record) -> Chip:
    """The measured ceilings as the model takes them; ours multiplies in float16."""
    found = results["ceilings"]
    rates = found["copy_bytes_per_second"], found["float16_flops"], found["float32_flops"]
    return Chip(results["environment"]["device"], *rates, found["launch_seconds"], found["host_seconds"])


def markdown(results: Record) -> str:
    card, machine = chip(results), results["environment"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    parts = [
        "# CPU smoke: these figures mean nothing" if results["smoke"] else "# The loss on a GPU",
        f"Measured on {machine['device']}, driver {machine['driver']}, CUDA or ROCm {machine['runtime']}, "
        f"{machine['system']}, Python {machine['python']}, {versions}.",
        f"Ceilings measured in the same run: copy {card.bandwidth / 1e12:.2f} TB/s (read and written), products in 16 "
        f"bits {card.half / 1e12:.0f} TFLOP/s, in fp32 {card.single / 1e12:.1f} TFLOP/s, {1e6 * card.launch:.1f} µs a "
        f"launch on the device, {1e6 * card.host:.1f} µs an operation on the host.",
    ]
    for setting in SETTINGS:
        found = sorted(results["cells"], key=lambda record: (record["n"], record["d"]))
        rows = [row for record in found if record["setting"] == setting.name for row in _rows(record, setting, card)]
        parts += ["## Goals, bf16 autocast on an H100", _goals(rows)] if setting == AUTOCAST else []
        parts += [f"## {setting.name}", table(rows, COLUMNS)] if rows else []
    return paragraphs(*parts, *(f"- {reason}" for reason in results["left_out"]), NOTES)


def _rows(record: Record, setting: Setting, card: Chip) -> Iterator[Record]:
    """What was measured at a cell, with what the model says: ranges without and with a second pass."""
    cell = Cell(record["n"], record["d"])
    for name, found in {**record["contenders"], PRODUCTS: {"seconds": record["products"]}}.items():
        row = {"n": cell.n, "d": cell.d, "name": name, "instead": found.get("failed", found.get("left_out")), **found}
        if "seconds" in found:
            row["over_floor"] = found["seconds"]["median"] / model.floor(cell, setting, card)
        if name in model.MODELLED:
            seconds = model.predicted(name, cell, setting, card)
            row["predicted"] = "–".join(dict.fromkeys(plain(1e3 * each) for each in seconds))
        yield row


def _goals(rows: list[Record]) -> str:
    """The figures to reach, beside what was measured."""
    found = {(row["n"], row["d"], row["name"]): row for row in rows}
    shows = {title: (path, show) for title, path, show in COLUMNS}
    goals = []
    for cell, name, title, goal in GOALS:
        path, show = shows[title]
        reached = shown(figure(found.get((cell.n, cell.d, name)), path), show)
        goals.append({"what": f"{cell}: {name}, {title}", "goal": goal, "measured": reached})
    return table(goals, [(head, head, str) for head in ("what", "goal", "measured")])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the loss on a GPU; see the head of this file.")
    parser.add_argument("--smoke", action="store_true", help="run on tiny CPU tensors; the figures mean nothing")
    parser.add_argument("--grid", nargs="+", type=Cell.parse, metavar="NxD", help="cells (default: all of them)")
    parser.add_argument("--budget", type=float, default=230, help="seconds; then no further cell (default: 230)")
    parser.add_argument("--out", type=Path, help="folder (default: benches/results; of --smoke, a temporary one)")
    flags = parser.parse_args()
    if flags.smoke and flags.out is not None and flags.out.resolve() == RESULTS.resolve():
        parser.error(f"--smoke: its figures mean nothing and do not belong into {RESULTS}")
    if not flags.smoke and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU here. The predictions: benches/model.py")
    warnings.filterwarnings("ignore", module="torch")  # about torch.compile's own insides
    out = flags.out or (Path(tempfile.mkdtemp(prefix="barlow-loss-")) if flags.smoke else RESULTS)
    clock = Wall() if flags.smoke else Events(torch.device("cuda"))
    results = run(clock, flags.grid or (SMOKE_GRID if flags.smoke else ORDER), time.monotonic() + flags.budget, out)
    (out / "gpu.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\nWritten to {out}")
    if wrong := failures(results):
        sys.exit("Ours failed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
