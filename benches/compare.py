"""Times the loss against the others and measures its working memory: the figures of the README.

One process; the contenders take turns, round by round (A B C D, A B C D, …), so that whatever else the machine does
falls on all of them; each ratio is taken within a round, and the median over the rounds is reported with its quartiles.
A turn repeats a fast step until it lasts 50 ms. Each contender's loss and gradient are compared with float64 before
it is timed. What is timed is one step's share of the loss: forward and backward, down to the gradients of both views.

FLOP model, forward + backward, N samples, D features:

* dual: 4 GEMMs of 2·N²·D: K1 = ẑ1 ẑ1ᵀ, K2 = ẑ2 ẑ2ᵀ, K2 ẑ1, K1 ẑ2. Chosen for N ≤ D/2.
* primal: 3 GEMMs of 2·N·D²: C = ẑ1ᵀ ẑ2, ẑ2 Mᵀ, ẑ1 M. The textbook formula does the same three at every shape.

Byte model, float32: all pass some dozens of times over N×D matrices, 4·N·D bytes each; the textbook formula and lightly
read or write a D×D matrix 39 times besides, 4·D² bytes each.

``GEMMs alone`` in the results is the time of the algorithm's own GEMMs through torch.mm: the cost of the step if
everything else were free. Our Gram matrices use their symmetry, so that the step can come out below it.

    python benches/compare.py                      the whole grid, 1 and 2 threads (about 40 minutes)
    python benches/compare.py --quick              without the two slowest cells, three rounds (under ten minutes)
    python benches/compare.py --grid 256x8192 --threads 1 --rounds 9
    python benches/compare.py --grid 64x2048 --no-growth --update      measures a cell anew, keeps the others
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import barlow_loss
import table
from baselines import COMPILED, OURS, TEXTBOOK, build, contenders
from memory import live_bytes, resident_bytes
from workload import GRID, Cell, check, errors, step, truth

if TYPE_CHECKING:
    from collections.abc import Callable

    Turn = Callable[[], object]
    Clock = Callable[[Turn, int], float]

TURN_SECONDS = 0.05
LEAST_ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


def time_calls(turn: Turn, calls: int) -> float:
    """Seconds per call of ``turn``."""
    start = time.perf_counter()
    for _ in range(calls):
        turn()
    return (time.perf_counter() - start) / calls


def interleave(
    turns: dict[str, Turn], rounds: int, seconds: float, clock: Clock = time_calls
) -> dict[str, list[float]]:
    """Seconds per call of each of ``turns``, round by round; after ``seconds`` only the least number of rounds.

    All have run before, so that nothing is set up here; a fast one is repeated until its turn lasts.
    """
    calls = {name: max(1, math.ceil(TURN_SECONDS / clock(turn, 1))) for name, turn in turns.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    spent = 0.0
    gc.disable()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and spent > seconds:
            break
        for name, turn in turns.items():
            times[name].append(clock(turn, calls[name]))
            spent += calls[name] * times[name][-1]
    gc.enable()
    return times


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


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Each contender's time over that of ``over``, taken within each round."""
    return {name: spread([t / base for t, base in zip(own, times[over], strict=True)]) for name, own in times.items()}


def compare(cell: Cell, names: list[str], threads: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One record for each number of threads: errors, times and ratios at ``cell``."""
    views = cell.views()
    right = truth(*views)
    shapes, limit = gemms(cell)
    records = []
    for count in threads:
        torch.set_num_threads(count)
        torch.compiler.reset()  # generated code is for one shape and one number of threads
        turns: dict[str, Turn] = {}
        found = {}
        for name in names:
            contender = build(name, cell.d)
            found[name] = errors(step(contender, *views), right)
            check(name, cell, found[name])
            turns[name] = partial(step, contender, *views)
        limit()
        times = interleave(turns | {"gemms": limit}, rounds, seconds)
        over_ours = ratios(times, OURS)
        records.append(
            {
                "n": cell.n,
                "d": cell.d,
                "threads": count,
                "algorithm": cell.algorithm,
                "rounds": len(times[OURS]),
                "contenders": {
                    name: {
                        "seconds": spread(times[name]),
                        "times_ours": over_ours[name],
                        "loss_error": found[name].loss,
                        "gradient_error": found[name].gradient,
                    }
                    for name in names
                },
                "gemms": {
                    "shapes": shapes,
                    "seconds": spread(times["gemms"]),
                    "ours_over_gemms": ratios(times, "gemms")[OURS],
                },
            }
        )
    return records


def growth(small: Cell, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """How the time of a step grows when D doubles and N stays, ours and the textbook's."""
    large = Cell(small.n, 2 * small.d)
    torch.set_num_threads(threads)
    turns: dict[str, Turn] = {}
    for cell in (small, large):
        views = cell.views()
        answers = {}
        for name in (OURS, TEXTBOOK):
            contender = build(name, cell.d)
            answers[name] = step(contender, *views)
            turns[f"{name} {cell}"] = partial(step, contender, *views)
        check(TEXTBOOK, cell, errors(answers[TEXTBOOK], answers[OURS]))
    times = interleave(turns, rounds, seconds)
    return {
        "n": small.n,
        "d": [small.d, large.d],
        "threads": threads,
        "rounds": len(next(iter(times.values()))),
        "contenders": {
            name: {
                "seconds": [spread(times[f"{name} {cell}"]) for cell in (small, large)],
                "growth": ratios(times, f"{name} {small}")[f"{name} {large}"],
            }
            for name in (OURS, TEXTBOOK)
        },
    }


def memory(cell: Cell, names: list[str], *, resident: bool) -> dict[str, Any]:
    """Peak working memory of each contender at ``cell``; operators are invisible in what torch.compile generated."""
    torch.set_num_threads(1)
    return {
        "n": cell.n,
        "d": cell.d,
        "contenders": {
            name: {
                "live_bytes": None if name == COMPILED else live_bytes(build(name, cell.d), cell),
                "resident_bytes": resident_bytes(name, cell) if resident or name == COMPILED else None,
            }
            for name in names
        },
    }


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The records of ``old``, each replaced by the one of ``new`` for the same cell, threads and processes."""
    if old["environment"] != new["environment"]:
        raise SystemExit("--update: the old figures belong to another machine or other versions; measure all cells")

    def merged(field: str) -> list[Any]:
        found = {_place(record): record for record in new[field]}
        return [found.get(_place(record), record) for record in old[field]]

    return {field: value if field == "environment" else merged(field) for field, value in old.items()}


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["n"], str(record["d"]), record.get("threads"), record.get("processes")


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    versions = {"barlow-loss": barlow_loss.__version__, "torch": torch.__version__, "lightly": _version("lightly")}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the loss against the others; see the head of this file.")
    parser.add_argument("--grid", nargs="+", type=Cell.parse, metavar="NxD", help="cells (default: all of them)")
    parser.add_argument("--contenders", nargs="+", default=list(contenders()), choices=contenders())
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25, help="at most so many rounds for a cell (default: 25)")
    parser.add_argument("--seconds", type=float, default=60, help="after that, stop at three rounds (default: 60)")
    parser.add_argument("--growth", type=Cell.parse, default=Cell(256, 8192), metavar="NxD", help="and at twice D")
    parser.add_argument("--no-growth", dest="growth", action="store_const", const=None)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quick", action="store_true", help="three rounds, without the cells that take seconds a step")
    parser.add_argument("--update", action="store_true", help="keep what NAME.json says of other cells, and its growth")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.json and NAME.md")
    parser.add_argument("--name", help="default: compare, or quick")
    arguments = parser.parse_args()
    arguments.grid = arguments.grid or [cell for cell in GRID if not (arguments.quick and cell.n * cell.d > 4_194_304)]
    arguments.name = arguments.name or ("quick" if arguments.quick else "compare")
    if arguments.quick:
        arguments.rounds = LEAST_ROUNDS
    if OURS not in arguments.contenders:
        parser.error(f"--contenders: {OURS} must be among them, the ratios are to it")
    return arguments


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore", module="torch")  # about torch.compile's own insides
    results: dict[str, Any] = {"environment": environment(), "cells": [], "growth": [], "memory": []}
    limits = arguments.rounds, arguments.seconds
    for cell in arguments.grid:
        for record in compare(cell, arguments.contenders, arguments.threads, *limits):
            results["cells"].append(record)
            print(table.line(record), flush=True)
    if arguments.growth:
        counts = arguments.threads[:1] if arguments.quick else arguments.threads
        results["growth"] = [growth(arguments.growth, count, *limits) for count in counts]
    if arguments.memory:
        torch.compiler.reset()
        results["memory"] = [memory(c, arguments.contenders, resident=not arguments.quick) for c in arguments.grid]
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.update:
        results = updated(json.loads((arguments.out / f"{arguments.name}.json").read_text()), results)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table.markdown(results)
    (arguments.out / f"{arguments.name}.md").write_text(text)
    print(f"\n{text}\nWritten to {arguments.out / arguments.name}.json and .md")


if __name__ == "__main__":
    main()
