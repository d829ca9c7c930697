"""How cost grows along a line of the grid: fitted exponents, and the largest D in a budget of working memory."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from baselines import FFT, OURS, TEXTBOOK, build, entry
from machine import all_cores
from memory import watched_step
from timing import interleave, spread
from workload import Cell, step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from timing import Turn

    Record = dict[str, Any]
    Points = list[tuple[int, Record]]

SAMPLES, FEATURES = 256, 2048  # where the lines of the grid cross
BUDGET_BYTES = 2_000_000_000
STEP_FEATURES = 64  # largest D is a multiple of it
INPUTS_AND_GRADIENTS = 4 * 4  # bytes for every sample and feature: two of each, in float32
LEAST_SIZES = 3
ROUNDS, ROUNDS_SECONDS = 9, 8
MEASURED = (OURS, TEXTBOOK, FFT)


def growth(cells: list[Record], budget: int = BUDGET_BYTES) -> Record:
    """Exponents of time in D and in N, and the largest D, of every contender that was measured at enough sizes.

    ``cells`` are the records of ``compare``; of several thread counts the first is taken. Between two cells minutes
    pass, and the machine may be slower or faster by then: that is in the exponents of the others. The sizes of ours
    take turns once more, and its exponent is the median over the rounds. ``budget`` is in bytes.
    """
    torch.set_num_threads(cells[0]["threads"])
    one = [cell for cell in cells if cell["threads"] == cells[0]["threads"]]
    across, along = _lines(one, n=SAMPLES, along="d"), _lines(one, d=FEATURES, along="n")
    return {
        "features": {"n": SAMPLES, "contenders": _fits("d", across)},
        "samples": {"d": FEATURES, "contenders": _fits("n", along)},
        "budget": {
            "n": SAMPLES,
            "bytes": budget,
            "contenders": {name: _largest(name, points, budget) for name, points in across.items()},
        },
    }


def _lines(cells: Iterable[Record], along: str, **fixed: int) -> dict[str, Points]:
    """(size, record), by size, of every contender that was measured often enough on a line of the grid."""
    lines: dict[str, Points] = {}
    for cell in sorted(cells, key=lambda cell: int(cell[along])):
        if all(cell[axis] == value for axis, value in fixed.items()):
            for name, record in cell["contenders"].items():
                lines.setdefault(name, []).append((cell[along], record))
    return {name: points for name, points in lines.items() if len(points) >= LEAST_SIZES}


def _fits(axis: str, lines: dict[str, Points]) -> Record:
    fits = {name: _fitted(axis, points) for name, points in lines.items()}
    if OURS in lines:
        fits[OURS] = _fitted_in_turns(axis, [size for size, _ in lines[OURS]])
    return fits


def _fitted(axis: str, points: Points) -> Record:
    sizes, seconds = [size for size, _ in points], [record["seconds"]["median"] for _, record in points]
    return {axis: sizes, "seconds": seconds, "exponent": _slope(sizes, seconds)}


def _fitted_in_turns(axis: str, sizes: list[int]) -> Record:
    """Ours at all sizes round by round: the median of each round's exponent."""
    cells = [Cell(SAMPLES, size) if axis == "d" else Cell(size, FEATURES) for size in sizes]
    turns: dict[str, Turn] = {str(cell): partial(step, build(OURS, cell.d), *cell.views()) for cell in cells}
    for turn in turns.values():
        turn()
    rounds = list(zip(*interleave(turns, ROUNDS, ROUNDS_SECONDS).values(), strict=True))
    exponents = spread([_slope(sizes, seconds) for seconds in rounds])
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    return {axis: sizes, "seconds": medians, "exponent": exponents["median"], "exponents": exponents}


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of log time against log size, by least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in seconds]).slope


def _largest(name: str, points: Points, budget: int) -> Record:
    """The largest D whose step works in the budget, by the polynomial through the largest measured ones.

    ``features_in_all`` is the one with which inputs and gradients fit in the budget as well.

    Working memory is a polynomial of D, to the byte, wherever the same code runs: a line for what is linear in D, else
    a parabola. Three contenders take that step for real, and a smaller one if it does not fit.
    """
    degree = 1 if entry(name).linear else 2
    known = [(d, record["working_bytes"]) for d, record in points[-degree - 1 :]]
    in_all = [(d, size + INPUTS_AND_GRADIENTS * SAMPLES * d) for d, size in known]
    features, measured = _multiple(_reaching(budget, known)), name in MEASURED
    if measured:
        features = _multiple(0.99 * features)  # a step that fits at the first attempt, and is as large within 1 %
    found = _measured(name, features) if measured else round(_interpolated(known, features))
    while found > budget:
        features = _multiple(features * budget / found)
        found = _measured(name, features)
    return {
        "features": features,
        "working_bytes": found,
        "measured": measured,
        "features_in_all": _multiple(_reaching(budget, in_all)),
    }


def _multiple(features: float) -> int:
    return int(features) // STEP_FEATURES * STEP_FEATURES


def _measured(name: str, features: int) -> int:
    z1, z2 = torch.rand(2, SAMPLES, features)  # whatever is in them
    with all_cores():
        return watched_step(build(name, features), z1.requires_grad_(), z2.requires_grad_())[1]


def _interpolated(known: list[tuple[int, int]], x: float) -> float:
    """The value at ``x`` of the polynomial through ``known`` points, in Lagrange's form."""
    total = 0.0
    for i, (xi, yi) in enumerate(known):
        total += yi * math.prod((x - xj) / (xi - xj) for j, (xj, _) in enumerate(known) if j != i)
    return total


def _reaching(value: float, known: list[tuple[int, int]]) -> float:
    """Where that polynomial, which rises, reaches ``value``, by bisection."""
    low, high = 0.0, float(known[-1][0])
    while _interpolated(known, high) < value:
        high *= 2
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if _interpolated(known, middle) < value else (low, middle)
    return low
