"""`make bench`: everything that this library claims about speed, memory and exactness, measured on this machine's CPU.

Writes ``<date>-<device>.json``, the same in Markdown, and two pictures. What is timed is forward and backward, down to
the gradients of both views, on one thread. Its sections, besides those of distributed.py and training.py:

**cells**: everyone over N×D: time, working memory, distance to float64. Contenders take turns, one of ours right before
each of the others; a ratio is that of a pair. Where ours chooses the dual, ``barlow_loss, dual`` runs the same code:
its ratio shows the noise. FLOP model: dual, for N ≤ D/2, 4 GEMMs of 2·N²·D; primal and textbook 3 GEMMs of 2·N·D². Byte
model, float32: some dozens of passes over N×D matrices, and 39 over a D×D matrix by the textbook and lightly.

**growth**: exponents fitted to the times of the cells, and the largest D in a budget of working memory.

**limits**: ours against ceilings measured in the same turns: torch.mm of its products, and a copy too large for the
caches. Parts are a profile's: matrix products; other operators; Python and autograd.

**host**: the processor time of a step where its numbers cost nothing: eager, beside the textbook; and Triton on a
pretended GPU (tests/kernels/compiled/fake_driver.py), which records each launch and runs none, beside an
autograd.Function that computes nothing. And how many operations a step dispatches, the same on every machine.

    python benches/bench.py                           about eight minutes on two cores
    python benches/bench.py --only cells growth --plan check --out /tmp
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import math
import os
import statistics
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import distributed
import measure
import render
from barlow_loss import BarlowTwinsLoss, _plan
from check import SECTIONS, verdicts
from contenders import COMPILED, FFT, OURS, OURS_COMPILED, PRIMAL, SOLO, TEXTBOOK, build, contenders, entry
from measure import Cell, Work, beside, cells, checked_turns, errors, interleave, ratios, spread, step, wall, watched
from training import Sizes, training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from measure import Record, Turn

    Points = list[tuple[int, Record]]

# Two lines, N = 256 and D = 2048, on which costs are seen to grow, and the shape of a primal: everyone.
GRID = cells("64x2048", "256x2048", "1024x2048", "256x4096", "256x8192", "4096x512")
# Where a D×D matrix takes seconds, or does not fit: three of them, and the textbook as long as it can.
LARGE = cells("2048x2048", "128x8192", "1024x8192", "256x16384", "256x32768")
PRESENT_AT_LARGE = (OURS, TEXTBOOK, FFT)
LARGEST = {TEXTBOOK: 8192, SOLO: 4096}  # features; solo-learn's masks take 3 s a step at 256×4096 on an EPYC

SAMPLES, FEATURES = 256, 2048  # where the lines of the grid cross
BUDGET_BYTES = 2_000_000_000
STEP_FEATURES = 64  # largest D is a multiple of it
INPUTS_AND_GRADIENTS = 4 * 4  # bytes for every sample and feature: two of each, in float32
LEAST_SIZES = 3
FIT_ROUNDS, FIT_SECONDS = 9, 8
TAKEN = (OURS, TEXTBOOK, FFT)  # their largest D is a step that was taken

LIMITS = cells("256x2048", "256x8192", "1024x8192", "4096x512")
COPIED_BYTES, PROFILED_STEPS = 2**28, 3

EAGER, TRITON, NOTHING = "eager", "Triton on a pretended GPU", "an empty autograd.Function"
EAGER_CELL, TRITON_CELL = cells("4x16", "16x32")
COUNTED = cells("4x16", "64x2048")
DRIVER = Path(__file__).parents[1] / "tests" / "kernels" / "compiled"
WARM_UPS, TRAINING_ROUNDS = 10, 3


class Plan(NamedTuple):
    """How much is measured. After so many seconds a cell ends with the least number of its rounds."""

    cells: tuple[Cell, ...] = GRID + LARGE
    names: tuple[str, ...] = contenders()
    limits: tuple[Cell, ...] = LIMITS
    processes: dict[int, list[Cell]] = distributed.GRID
    training: Sizes = Sizes()
    rounds: int = 15
    seconds: float = 5
    budget: int = BUDGET_BYTES


PLANS = {
    "usual": Plan(),
    "check": Plan(
        cells=tuple(cell for cell in GRID + LARGE if cell.n in (256, 1024, 4096)),
        names=(OURS, PRIMAL, OURS_COMPILED, TEXTBOOK, COMPILED),
    ),
    "smoke": Plan(
        cells=cells("256x512", "256x1024", "256x2048", "64x32"),
        limits=cells("32x512"),
        processes={2: [Cell(32, 256)]},
        training=Sizes(batch_size=8, projector_batch_size=16, image_size=64, width=512, chunk=4),
        rounds=2,
        seconds=1,
        budget=50_000_000,
    ),
}


def present(cell: Cell, names: tuple[str, ...]) -> tuple[str, ...]:
    at_cell = PRESENT_AT_LARGE if cell in LARGE else names
    return tuple(name for name in names if name in at_cell and cell.d <= LARGEST.get(name, cell.d))


def compare(cell: Cell, names: tuple[str, ...], rounds: int, seconds: float) -> Record:
    """Errors, working memory, times and ratios of those that are present at ``cell``; raises where one is wrong."""
    torch.compiler.reset()  # generated code is for one shape
    views = cell.views()
    right = measure.truth(*views)
    found: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name in present(cell, names):
        turns[name] = turn = partial(step, build(name, cell.d), *views)
        if entry(name).compiled:
            turn()
        torch.manual_seed(measure.SEED)
        answer, size = watched(turn)
        own, of_paper = measure.error_of_own(name, answer, right, *views), errors(answer, right)
        measure.check(name, cell, own)
        found[name] = {
            "definition": entry(name).definition,
            "loss_error": of_paper.loss,
            "gradient_error": of_paper.gradient,
            "error_of_own": own._asdict(),
            "working_bytes": size,
        }
    times, over_ours = beside(turns, OURS, rounds, seconds)
    for name, record in found.items():
        record |= {"seconds": spread(times[name]), "times_ours": spread(over_ours[name])}
    factors = ", ".join(f"{name} {record['times_ours']['median']:.2g}×" for name, record in found.items())
    print(f"  {cell}, {cell.algorithm}: {1e3 * found[OURS]['seconds']['median']:.3g} ms; {factors}", flush=True)
    return {**_where(cell, len(over_ours[OURS])), "contenders": found}


def _where(cell: Cell, rounds: int) -> Record:
    threads = torch.get_num_threads()
    return {"n": cell.n, "d": cell.d, "threads": threads, "algorithm": cell.algorithm, "rounds": rounds}


def growth(records: list[Record], budget: int = BUDGET_BYTES) -> Record:
    """Exponents of time in D and in N, and the largest D, of every contender that was measured at enough sizes.

    Between two cells minutes pass, and the machine may be slower or faster by then: that is in the exponents of the
    others. The sizes of ours take turns once more, and its exponent is the median over the rounds.
    """
    across = _lines([record for record in records if record["n"] == SAMPLES], "d")
    along = _lines([record for record in records if record["d"] == FEATURES], "n")
    largest = {name: _largest(name, points, budget) for name, points in across.items()}
    return {
        "features": {"n": SAMPLES, "contenders": _fits("d", across)},
        "samples": {"d": FEATURES, "contenders": _fits("n", along)},
        "budget": {"n": SAMPLES, "bytes": budget, "contenders": largest},
    }


def _lines(records: list[Record], axis: str) -> dict[str, Points]:
    lines: dict[str, Points] = {}
    for record in sorted(records, key=lambda record: int(record[axis])):
        for name, found in record["contenders"].items():
            lines.setdefault(name, []).append((record[axis], found))
    return {name: points for name, points in lines.items() if len(points) >= LEAST_SIZES}


def _fits(axis: str, lines: dict[str, Points]) -> Record:
    fits: Record = {}
    for name, points in lines.items():
        sizes, seconds = [size for size, _ in points], [found["seconds"]["median"] for _, found in points]
        fits[name] = {axis: sizes, "seconds": seconds, "exponent": _slope(sizes, seconds)}
    if OURS in fits:
        sizes = fits[OURS][axis]
        line = [Cell(SAMPLES, size) if axis == "d" else Cell(size, FEATURES) for size in sizes]
        turns: dict[Any, Turn] = {cell: partial(step, build(OURS, cell.d), *cell.views()) for cell in line}
        times = interleave(turns, FIT_ROUNDS, FIT_SECONDS)
        exponents = spread([_slope(sizes, seconds) for seconds in zip(*times.values(), strict=True)])
        medians = [statistics.median(seconds) for seconds in times.values()]
        fits[OURS] |= {"seconds": medians, "exponent": exponents["median"], "exponents": exponents}
    return fits


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in seconds]).slope


def _largest(name: str, points: Points, budget: int) -> Record:
    """The largest D whose step works in the budget; ``features_in_all`` with inputs and gradients in it as well.

    Working memory is a polynomial of D, to the byte, wherever the same code runs: a line for what is linear in D, else
    a parabola. Three contenders take that step for real, and a smaller one if it does not fit.
    """
    degree = 1 if entry(name).linear else 2
    sizes, working = zip(*((d, found["working_bytes"]) for d, found in points[-degree - 1 :]), strict=True)
    memory, taken = Polynomial.fit(sizes, working, degree).convert(), name in TAKEN
    features = _reaching(budget, memory)
    if taken:
        features = _multiple(0.99 * features)  # a step that fits at the first attempt, and is as large within 1 %
    found = _taken(name, features) if taken else round(memory(features))
    while found > budget:
        features = _multiple(features * budget / found)
        found = _taken(name, features)
    in_all = _reaching(budget, memory + Polynomial([0, INPUTS_AND_GRADIENTS * SAMPLES]))
    return {"features": features, "working_bytes": found, "measured": taken, "features_in_all": in_all}


def _multiple(features: float) -> int:
    return int(features) // STEP_FEATURES * STEP_FEATURES


def _reaching(value: float, memory: Polynomial) -> int:
    """The largest D below where a polynomial first reaches ``value``."""
    return _multiple(min(root for root in (memory - value).roots().real if root > 0))


def _taken(name: str, features: int) -> int:
    views = [z.requires_grad_() for z in torch.rand(2, SAMPLES, features)]  # whatever is in them
    with measure.all_cores():
        return watched(partial(step, build(name, features), *views))[1]


def limits(cell: Cell, rounds: int, seconds: float) -> Record:
    turn, products = partial(step, build(OURS, cell.d), *cell.views()), measure.gemms(cell)
    source, target = torch.ones(2, COPIED_BYTES // 4)
    times = interleave({"step": turn, "products": products, "copy": partial(target.copy_, source)}, rounds, seconds)
    taken, alone, done = spread(times["step"]), spread(times["products"]), Work(turn)
    flops = Work(products).flops / alone["median"]
    copied = 2 * COPIED_BYTES / statistics.median(times["copy"])  # read and written
    return {
        **_where(cell, len(times["step"])),
        "seconds": taken,
        "gemms": {"seconds": alone},
        "ours_over_gemms": ratios(times, "products")["step"],
        "ceilings": {"flops_per_second": flops, "bytes_per_second": copied},
        "flops": done.flops,
        "bytes": done.bytes,
        "model_seconds": done.flops / flops + done.bytes / copied,
        "parts": _parts(turn, taken["median"]),
    }


def _parts(turn: Turn, seconds: float) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = PROFILED_STEPS * wall(turn, PROFILED_STEPS)
    parts = {"products": 0.0, "elementwise": 0.0}
    for operator in profiler.key_averages():
        if operator.key.startswith("aten::"):
            part = "products" if operator.key in ("aten::mm", "aten::bmm", "aten::addmm") else "elementwise"
            parts[part] += operator.self_cpu_time_total / 1e6
    parts["rest"] = whole - sum(parts.values())
    return {part: seconds * own / whole for part, own in parts.items()}


def host(rounds: int, seconds: float) -> Record:
    reason, cell = obstacle(), EAGER_CELL
    timed = _timed(checked_turns(cell, (OURS, TEXTBOOK), *cell.views()), rounds, seconds)
    steps = [{"what": EAGER, "n": cell.n, "d": cell.d, "dtype": "float32", **timed}]
    steps += [] if reason else [_on_pretended_gpu(rounds, seconds)]
    return {
        "steps": steps,
        "left_out": {TRITON: reason} if reason else {},
        "operations": [{"n": cell.n, "d": cell.d, "operations": operations(cell)} for cell in COUNTED],
    }


def operations(cell: Cell) -> int:
    return Work(partial(step, build(OURS, cell.d), *cell.views())).operations


def _on_pretended_gpu(rounds: int, seconds: float) -> Record:
    cell = TRITON_CELL
    views = cell.views(dtype=torch.bfloat16)
    ours = BarlowTwinsLoss(algorithm="dual", backend="triton")
    turns: dict[str, Turn] = {OURS: partial(step, ours, *views)}
    turns[NOTHING] = partial(step, lambda *z: _Nothing.apply(*z)[0], *views)
    with pretended_gpu() as gpu:
        turns[OURS]()
        launches = [launch.kernel for launch in gpu.launches]
        gpu.launches = deque(maxlen=1)  # of millions
        timed = _timed(turns, rounds, seconds)
    return {"what": TRITON, "n": cell.n, "d": cell.d, "dtype": "bfloat16", "launches": launches, **timed}


def _timed(turns: dict[str, Turn], rounds: int, seconds: float) -> Record:
    for turn in WARM_UPS * list(turns.values()):
        turn()
    times = interleave(turns, rounds, seconds, measure.processor)
    ours, reference = times
    return {
        "reference": reference,
        "rounds": len(times[ours]),
        "seconds": spread(times[ours]),
        "reference_seconds": spread(times[reference]),
        "over_reference": ratios(times, reference)[ours],
    }


def obstacle() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton interprets kernels here"
    version, known = importlib.import_module("triton").__version__, _from_tests("fake_driver").KNOWN_TRITON
    return None if version.startswith(known) else f"triton {version} is not among {', '.join(known)}"


@contextmanager
def pretended_gpu() -> Iterator[Any]:
    """CPU tensors are launched as on an H100 that is not there, with the backend and the products that it would get."""
    forget = _plan._remembered.cache_clear
    forget()
    try:
        with (
            _from_tests("fake_driver").pretended(_from_tests("chips").CHIPS["sm_90"]) as gpu,
            mock.patch.object(_plan, "choose_backend", return_value="triton"),
            mock.patch.object(_plan, "_FLOAT16_MATMUL_DEVICES", ("cpu",)),
        ):
            yield gpu
    finally:
        forget()


def _from_tests(module: str) -> Any:
    if str(DRIVER) not in sys.path:
        sys.path.append(str(DRIVER))
    return importlib.import_module(module)


class _Nothing(torch.autograd.Function):
    """Three outputs, two saved tensors, two fresh gradients: the least that a loss with two terms asks of autograd."""

    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z1, z2)
        return tuple(z1.new_empty((), dtype=torch.float32) for _ in range(3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def run(plan: Plan, sections: Sequence[str], out: Path) -> Path:
    """Measures section by section, and keeps what there is after each in a partial file; where the results lie."""
    effort = plan.rounds, plan.seconds
    measures: dict[str, Callable[[], Any]] = {
        "cells": lambda: [compare(cell, plan.names, *effort) for cell in plan.cells],
        "growth": lambda: growth(results["cells"], plan.budget),
        "limits": lambda: [limits(cell, *effort) for cell in plan.limits],
        "host": lambda: host(*effort),
        "distributed": lambda: distributed.section(plan.processes, *effort),
        "training": lambda: training(plan.training, TRAINING_ROUNDS),
    }
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    revision = measure.said("git", "describe", "--always", "--dirty", "--abbrev=12").strip() or None
    versions = measure.environment("lightly", "stable-pretraining")
    results: Record = {"date": today, "revision": revision, "environment": versions, "seconds": {}}
    path = out / f"{today}-{measure.device_name()}.json"
    unfinished = path.with_suffix(".partial.json")
    measure.store(results, unfinished)  # a folder that cannot be written to is told of now
    torch.set_num_threads(1)
    for section in filter(sections.__contains__, SECTIONS):
        print(section, flush=True)
        start = time.perf_counter()
        results[section] = measures[section]()
        results["seconds"][section] = round(time.perf_counter() - start, 1)
        measure.store(results, unfinished)
    return unfinished.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the loss against the others; see the head of this file.")
    parser.add_argument("--plan", choices=PLANS, default="usual", help="how much is measured (default: usual)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder (default: benches/results; for a part, runs/bench)")
    flags = parser.parse_args()
    whole = flags.only is None and flags.plan == "usual"  # what README may be made of
    flags.out = flags.out or (measure.RESULTS if whole else Path("runs/bench"))
    flags.only = flags.only or SECTIONS
    if "growth" in flags.only and "cells" not in flags.only:
        parser.error("--only: growth follows from cells, name both")
    return flags


def main() -> None:
    flags = arguments()
    warnings.filterwarnings("ignore", module="torch")  # about torch.compile's own insides
    path = run(PLANS[flags.plan], flags.only, flags.out)
    results, text = measure.load(path), path.with_suffix(".md")
    render.write({text: render.page(results, path)}, path)
    print("\n".join([*verdicts(results), f"written: {path}, {text.name}, and pictures"]))


if __name__ == "__main__":
    main()
