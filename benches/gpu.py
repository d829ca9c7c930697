"""Times the loss on a GPU against the textbook formula and lightly.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import contenders
import measure
from barlow_loss import BarlowTwinsLoss
from contenders import EPS, LAMBD
from measure import RESULTS, Answer, Cell, Errors, Record, Turn, cells, ratios, spread, step, wall
from render import figure, paragraphs, shape, shown, table
from render import spread as told

Step = Callable[[], Answer]

TEXTBOOK, COMPILED, LIGHTLY = "textbook, eager", "textbook, compiled", "lightly"
EAGER, TRITON, GRAPH = OURS = "ours, eager", "ours, Triton", "ours, CUDA graph"
AUTOCAST, FLOAT32 = "bf16 autocast", "fp32"
SETTINGS = {AUTOCAST: torch.bfloat16, FLOAT32: torch.float32}  # of the views

# The cells of the stated goals first, in case the budget does not last.
SMALL, LARGE = cells("256x8192", "2048x8192")
ORDER = (LARGE, SMALL, *cells("256x2048", "1024x8192", "4096x8192", "2048x32768"))
SMOKE_GRID = cells("16x64", "24x96")
COMPILE_SECONDS = 20  # kept in reserve for a compilation; without it the compiled contender is left out
CELL_SECONDS, ROUNDS, WARM_UPS = 4, 7, 3
SQUARE, COPIED_BYTES = 8192, 2**30

COLUMNS = (
    ("N × D", "", shape),
    ("contender", "name", str),
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
a row, the host's share included. *Floor*: the larger of FLOPs of the dual over the rate of a large product and of views
read once and gradients written once over the rate of a copy. *MB with gradients*: the rise of the memory during a step,
beyond the views. Errors: relative distance to float64 on the same views, of the loss and of both gradients by norm.
What was measured is the code of that day; some of its contenders are none any more.
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
    the rise of the memory during it, holds what the step needs. The graph keeps that memory until it dies.
    """

    def __init__(self, turn: Step) -> None:
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                turn()
        torch.cuda.current_stream().wait_stream(stream)

        def capture() -> None:
            with torch.cuda.graph(self._graph, stream=stream):
                self._answer = turn()

        self.peak = rise(capture)

    def __call__(self) -> Answer:
        self._graph.replay()
        return self._answer


def rise(turn: Turn) -> int:
    """Bytes by which the allocated memory rises during a step, its gradients among them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    turn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def missing(name: str, clock: Events | Wall, deadline: float) -> str | None:
    if name == COMPILED and time.monotonic() + COMPILE_SECONDS > deadline:
        return "the budget was spent"
    if name == LIGHTLY and not contenders.installed(contenders.LIGHTLY):
        return "not installed"
    if name in (TRITON, GRAPH) and clock.device.type == "cpu":
        return "needs a GPU"
    return "triton is not installed" if name in (TRITON, GRAPH, COMPILED) and find_spec("triton") is None else None


def build(name: str, setting: str, clock: Events | Wall, *views: Tensor) -> Step:
    """A step of the contender ``name``: forward under the setting's autocast, backward outside of it."""
    if name in OURS:
        loss: Any = BarlowTwinsLoss(LAMBD, eps=EPS, backend="eager" if name == EAGER else "triton")
    else:
        loss = contenders.build(LIGHTLY if name == LIGHTLY else contenders.TEXTBOOK, views[0].shape[1])
    loss = loss.to(clock.device)
    if name == COMPILED:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)

    def forward(*z: Tensor) -> Tensor:
        with torch.autocast(clock.device.type, torch.bfloat16) if setting == AUTOCAST else nullcontext():
            value: Tensor = loss(*z)
            return value

    turn = partial(step, forward, *views)
    return Graphed(turn) if name == GRAPH else turn


def allowed(name: str, setting: str) -> Errors:
    """Errors above which a time means nothing: ours to its promise, the others to what D×D matrices in 16 bits give.

    16 bits, ours: float16 operands, 2⁻¹⁰, in the loss, and two of them and the rounding to bfloat16, 2⁻⁸, in the
    gradient.
    """
    if name in OURS:
        return measure.OURS_ALLOWED if setting == FLOAT32 else Errors(2**-10, 2**-9 + 2**-8)
    return measure.OTHERS_ALLOWED if setting == FLOAT32 else Errors(0.05, 0.5)


def measured(cell: Cell, setting: str, clock: Events | Wall, rounds: int, deadline: float) -> Record:
    torch.compiler.reset()  # generated code is for one shape and dtype
    views = cell.views(device=clock.device, dtype=SETTINGS[setting])
    right = measure.truth(*views)
    records: dict[str, Record] = {}
    turns: dict[str, Step] = {}
    for name in (TEXTBOOK, COMPILED, LIGHTLY, *OURS):
        if reason := missing(name, clock, deadline):
            records[name] = {"left_out": reason}
        else:
            records[name], own = _tried(name, cell, setting, clock, right, *views)
            turns |= own
    del right
    half = setting == AUTOCAST and clock.device.type != "cpu"  # the dtype that ours takes
    products = measure.gemms(cell, clock.device, torch.float16 if half else torch.float32)
    times = measure.interleave({**turns, "products": products}, rounds, CELL_SECONDS, clock)
    alone = times.pop("products")
    for over in filter(turns.__contains__, OURS):
        for name, ratio in ratios(times, over).items():
            records[name].setdefault("times", {})[over] = ratio
    for name, turn in turns.items():
        records[name]["seconds"] = spread(times[name])
        calls = max(3, math.ceil(0.02 / records[name]["seconds"]["median"]))
        records[name]["back_to_back"] = statistics.median(clock.in_a_row(turn, calls) for _ in range(3))
    found = {"rounds": len(alone), "contenders": records, "products": spread(alone)}
    return {"n": cell.n, "d": cell.d, "setting": setting, **found}


def _tried(
    name: str, cell: Cell, setting: str, clock: Events | Wall, right: Answer, *views: Tensor
) -> tuple[Record, dict[str, Step]]:
    """What is known of a contender before it is timed, and its turn if it is to be."""
    record: Record = {}
    try:
        turn = build(name, setting, clock, *views)
        found = measure.errors(turn(), right)
        gc.collect()
        peak = None if clock.device.type == "cpu" else turn.peak if isinstance(turn, Graphed) else rise(turn)
        record |= {"loss_error": found.loss, "gradient_error": found.gradient, "peak_bytes": peak}
        measure.check(name, cell, found, allowed(name, setting))
        return record, {name: turn}
    except Exception as error:  # a contender that breaks must not take the others with it
        _release()
        return record | {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}, {}


def ceilings(clock: Events | Wall) -> dict[str, float]:
    """Bandwidth of a copy, and rates of large products."""
    if clock.device.type == "cpu":
        return dict.fromkeys(("copy_bytes_per_second", "float16_flops", "float32_flops"), 1e10)

    def median(turn: Turn) -> float:
        clock.in_a_row(turn, 2)
        return statistics.median(clock.in_a_row(turn, 1) for _ in range(11))

    source = torch.randn(COPIED_BYTES // 4, device=clock.device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_second": 2 * COPIED_BYTES / median(partial(target.copy_, source))}
    for dtype in (torch.float16, torch.float32):
        factors = torch.randn(2, SQUARE, SQUARE, device=clock.device).to(dtype)
        found[f"{str(dtype).removeprefix('torch.')}_flops"] = 2 * SQUARE**3 / median(partial(torch.mm, *factors))
    return found


def floor(cell: Cell, setting: str, rates: dict[str, float]) -> float:
    """Seconds that no dual without symmetry can go below: FLOPs, or views read once and gradients written once."""
    flops = rates["float32_flops" if setting == FLOAT32 else "float16_flops"]  # ours multiplies in float16
    least_bytes = 4 * cell.n * cell.d * SETTINGS[setting].itemsize
    return max(8 * cell.n**2 * cell.d / flops, least_bytes / rates["copy_bytes_per_second"])


def run(clock: Events | Wall, grid: Sequence[Cell], deadline: float, out: Path) -> Record:
    """All cells, written after each, so that what was measured is kept whatever comes next."""
    versions, smoke = measure.environment("triton", "lightly", device=clock.device), clock.device.type == "cpu"
    results: Record = {"environment": versions, "ceilings": ceilings(clock), "smoke": smoke}
    results |= {"cells": [], "left_out": []}
    for setting, cell in product(SETTINGS, grid):
        print(f"{cell}, {setting}", flush=True)
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the budget was spent")
            results["cells"].append(measured(cell, setting, clock, ROUNDS, deadline))
        except (TimeoutError, torch.OutOfMemoryError) as reason:  # the views and their float64 answer may be too large
            results["left_out"].append(f"{cell}, {setting}: left out, {str(reason).partition('. ')[0]}")
        measure.store(results, out / "gpu.json")
        _release()
    return results


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def failures(results: Record) -> list[str]:
    return [
        f"{record['n']}×{record['d']}, {record['setting']}, {name}: {record['contenders'][name]['failed']}"
        for record in results["cells"]
        for name in OURS
        if "failed" in record["contenders"].get(name, {})
    ]


def markdown(results: Record) -> str:
    rates, machine = results["ceilings"], results["environment"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    parts = [
        "# CPU smoke: these figures mean nothing" if results["smoke"] else "# The loss on a GPU",
        f"Measured on {machine['device']}, driver {machine['driver']}, CUDA or ROCm {machine['runtime']}, "
        f"{machine['system']}, Python {machine['python']}, {versions}.",
        f"Ceilings measured in the same run: copy {rates['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written), "
        f"products in 16 bits {rates['float16_flops'] / 1e12:.0f} TFLOP/s, in fp32 "
        f"{rates['float32_flops'] / 1e12:.1f} TFLOP/s.",
    ]
    found = sorted(results["cells"], key=lambda record: (record["n"], record["d"]))
    for setting in SETTINGS:
        rows = [row for record in found if record["setting"] == setting for row in _rows(record, rates)]
        parts += ["## Goals, bf16 autocast on an H100", _goals(rows)] if setting == AUTOCAST else []
        parts += [f"## {setting}", table(rows, COLUMNS)] if rows else []
    return paragraphs(*parts, *(f"- {reason}" for reason in results["left_out"]), NOTES)


def _rows(record: Record, rates: dict[str, float]) -> Iterator[Record]:
    where = {"n": record["n"], "d": record["d"]}
    least = floor(Cell(**where), record["setting"], rates)
    alone = {"products of the dual alone": {"seconds": record["products"]}}
    for name, found in (record["contenders"] | alone).items():
        row = {**where, "name": name, "instead": found.get("failed", found.get("left_out")), **found}
        yield row | ({"over_floor": found["seconds"]["median"] / least} if "seconds" in found else {})


def _goals(rows: list[Record]) -> str:
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
        sys.exit(f"torch {torch.__version__} finds no GPU here")
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
