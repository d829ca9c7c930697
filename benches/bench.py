"""`make bench`: everything that this library claims about speed, memory and exactness, measured on this machine's CPU.

Writes ``<date>-<device>.json``, the same in Markdown, and two plots. Its sections:

* ``cells`` (sections.py): time, working memory and distance to float64 over N×D, ours in four ways, and seven others.
* ``growth`` (sections.py): how they grow with D and N, and the largest D in 2 GB. Follows from ``cells``.
* ``limits`` (sections.py): ours against the machine's ceilings.
* ``host`` (sections.py): what a step costs the host where its numbers cost nothing.
* ``distributed`` (distributed.py): several processes: time, bytes, and who computes the loss of the whole batch.
* ``training`` (training.py): the loss's share of a training step, with the textbook's and with ours.

    python benches/bench.py                           about ten minutes on two cores
    python benches/bench.py --plan full               both thread counts, every cell, more rounds (about an hour)
    python benches/bench.py --only cells growth --plan check --out /tmp
"""

from __future__ import annotations

import argparse
import datetime as dt
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import distributed
import render
import tables
from contenders import COMPILED, OURS, OURS_COMPILED, PRIMAL, TEXTBOOK, contenders
from machine import RESULTS, device_name, environment, revision, store
from measure import Cell, cells
from pictures import draw
from sections import BUDGET_BYTES, GRID, LARGE, LIMITS, SAMPLES, SLOW, compare, growth, host, limits
from training import WHOLE, Sizes, training

if TYPE_CHECKING:
    from collections.abc import Callable

    from machine import Record

SECTIONS = ("cells", "growth", "limits", "host", "distributed", "training")
TRAINING_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """How much is measured. After so many seconds a cell ends with the least number of its rounds."""

    cells: tuple[Cell, ...] = GRID + LARGE
    names: tuple[str, ...] = ()
    limits: tuple[Cell, ...] = LIMITS
    processes: dict[int, list[Cell]] = field(default_factory=lambda: distributed.GRID)
    training: Sizes = field(default_factory=Sizes)
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    seconds: float = 5
    patient: bool = False
    budget: int = BUDGET_BYTES


PLANS = {
    "usual": Plan(),
    "full": Plan(
        cells=GRID + LARGE + SLOW,
        processes=distributed.FULL,
        training=Sizes(batch_size=256),
        threads=(1, 2),
        rounds=25,
        seconds=60,
        patient=True,
    ),
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


class Run:
    """One run: measures section by section, and keeps what there is after each in a partial file."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self._plan = plan
        today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
        self.stem = out / f"{today}-{device_name()}"
        versions = environment("lightly", "stable-pretraining")
        self.results: Record = {"date": today, "revision": revision(), "environment": versions, "seconds": {}}
        self._partial = out / f"{self.stem.name}.partial.json"
        store(self.results, self._partial)  # a folder that cannot be written to is told of now
        self._start = time.perf_counter()

    def measure(self, section: str) -> None:
        """Fills ``results[section]``."""
        self.say(section)
        start, plan = time.perf_counter(), self._plan
        effort = plan.rounds, plan.seconds
        measures: dict[str, Callable[[], Any]] = {
            "cells": self._cells,
            "growth": self._growth,
            "limits": lambda: [limits(cell, threads, *effort) for cell in plan.limits for threads in plan.threads],
            "host": lambda: host(*effort),
            "distributed": lambda: distributed.section(plan.processes, *effort),
            "training": lambda: training(plan.training, TRAINING_ROUNDS),
        }
        self.results[section] = measures[section]()
        self.results["seconds"][section] = round(time.perf_counter() - start, 1)
        store(self.results, self._partial)

    def report(self) -> list[Path]:
        """Writes the tables and the plots; the files of this run."""
        written, text = self.stem.with_suffix(".json"), self.stem.with_suffix(".md")
        self._partial.replace(written)
        text.write_text(render.markdown(self.results, written), encoding="utf-8")
        return [written, text, *draw(self.results, written)]

    def say(self, what: str) -> None:
        """A line with the seconds that have passed."""
        print(f"[{time.perf_counter() - self._start:5.0f} s] {what}", flush=True)

    def _cells(self) -> list[Record]:
        plan, records = self._plan, []
        for cell in plan.cells:
            for threads in plan.threads:
                names = plan.names or contenders()
                records.append(compare(cell, names, threads, plan.rounds, plan.seconds, patient=plan.patient))
                self.say(f"  {tables.line(records[-1])}")
        return records

    def _growth(self) -> Record:
        if "cells" not in self.results:
            raise SystemExit("--only: growth follows from cells, name both")
        return growth(self.results["cells"], self._plan.budget)


class Promise(NamedTuple):
    """What is promised to be at most so much, and where results tell it."""

    what: str
    at_most: float
    found: Callable[[Record], list[float]]


def _of(results: Record, section: str, **where: Any) -> list[Record]:
    """The records of a section at a place."""
    return [r for r in results.get(section, []) if all(r[key] == value for key, value in where.items())]


def _over_gemms(n: int, d: int) -> Callable[[Record], list[float]]:
    return lambda results: [r["ours_over_gemms"]["median"] for r in _of(results, "limits", n=n, d=d, threads=1)]


def _exponent(results: Record) -> list[float]:
    fits = results.get("growth", {}).get("features", {}).get("contenders", {})
    return [fits[OURS]["exponent"]] if OURS in fits else []


# What this library promises about its cost on a CPU. Machines differ: a promise that another one does not keep is worth
# an issue, so it is said, and is no failure.
PROMISES = (
    Promise(f"exponent of time in D, N = {SAMPLES}", 1.15, _exponent),
    Promise(
        "working memory over a D×D matrix, 256 × 4096",
        0.25,
        lambda results: [
            cell["contenders"][OURS]["working_bytes"] / (4 * cell["d"] ** 2)
            for cell in _of(results, "cells", n=256, d=4096)
        ],
    ),
    Promise("a step over torch.mm of its own products, 256 × 8192, one thread", 1.7, _over_gemms(256, 8192)),
    Promise("a step over torch.mm of its own products, 1024 × 8192, one thread", 1.5, _over_gemms(1024, 8192)),
    Promise(
        f"the loss's share of a step of {WHOLE}",
        0.03,
        lambda results: [record["shares"][OURS] for record in _of(results, "training", what=WHOLE)],
    ),
    Promise(
        "seconds that all sections took, on two cores",
        600,
        lambda results: [sum(found.values())] if len(found := results.get("seconds", {})) == len(SECTIONS) else [],
    ),
)


def verdicts(results: Record) -> list[str]:
    """A line for each promise that these results can tell of."""
    return [
        f"{'kept' if found <= promise.at_most else 'NOT KEPT'}: {promise.what}: {found:.3g}, "
        f"promised at most {promise.at_most:g}"
        for promise in PROMISES
        for found in promise.found(results)
    ]


def arguments() -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(description="Measure the loss against the others; see the head of this file.")
    parser.add_argument("--plan", choices=PLANS, default="usual", help="how much is measured (default: usual)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder (default: benches/results; for a part, runs/bench)")
    flags = parser.parse_args()
    whole = flags.only is None and flags.plan in ("usual", "full")  # what README may be made of
    flags.out = flags.out or (RESULTS if whole else Path("runs/bench"))
    flags.only = flags.only or SECTIONS
    return flags


def main() -> None:
    """Measures, writes, and says what was promised."""
    flags = arguments()
    warnings.filterwarnings("ignore", module="torch")  # about torch.compile's own insides
    run = Run(PLANS[flags.plan], flags.out)
    for section in SECTIONS:
        if section in flags.only:
            run.measure(section)
    files = run.report()
    print("\n".join(verdicts(run.results)))
    run.say("written: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
