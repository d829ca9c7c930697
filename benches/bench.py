"""`make bench`: everything that this library claims about speed, memory and exactness, measured on this machine's CPU.

Writes ``<date>-<device>.json``, the same in Markdown, and two plots. Its sections, each a module of its own:

* ``cells`` (compare.py): time, working memory and distance to float64 over N×D, ours in four ways, and seven others.
* ``growth`` (growth.py): how they grow with D and N, and the largest D in 2 GB. Follows from ``cells``.
* ``limits`` (limits.py): ours against the machine's ceilings.
* ``host`` (host.py): what a step costs the host where its numbers cost nothing.
* ``distributed`` (distributed.py): several processes: time, bytes, and who computes the loss of the whole batch.
* ``training`` (training_step.py): the loss's share of a training step, with the textbook's and with ours.

    python benches/bench.py                           about ten minutes on two cores
    python benches/bench.py --plan full               both thread counts, every cell, more rounds (about an hour)
    python benches/bench.py --only cells growth --plan check --out /tmp
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed
import table
import training_step
from baselines import COMPILED, OURS, OURS_COMPILED, PRIMAL, TEXTBOOK, contenders
from compare import compare
from growth import BUDGET_BYTES, growth
from host import host
from limits import CELLS, limits
from machine import RESULTS, device_name, environment, revision
from plots import draw
from promised import SECTIONS, promises
from workload import GRID, LARGE, SLOW, Cell

if TYPE_CHECKING:
    from collections.abc import Callable

    Record = dict[str, Any]

TRAINING_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """How much is measured. After so many seconds a cell ends with the least number of its rounds."""

    cells: tuple[Cell, ...] = GRID + LARGE
    names: tuple[str, ...] = ()
    limits: tuple[Cell, ...] = CELLS
    processes: dict[int, list[Cell]] = field(default_factory=lambda: distributed.GRID)
    training: training_step.Sizes = field(default_factory=training_step.Sizes)
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
        training=training_step.Sizes(batch_size=256),
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
        cells=tuple(map(Cell.parse, ("256x512", "256x1024", "256x2048", "64x32"))),
        limits=(Cell(32, 512),),
        processes={2: [Cell(32, 256)]},
        training=training_step.Sizes(batch_size=8, projector_batch_size=16, image_size=64, width=512, chunk=4),
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
        self.results: Record = {"date": today, "revision": revision(), "environment": environment(), "seconds": {}}
        self._partial = out / f"{self.stem.name}.partial.json"
        self._save(self._partial)  # a folder that cannot be written to is told of now
        self._start = time.perf_counter()

    def measure(self, section: str) -> None:
        """Fills ``results[section]``."""
        self.say(section)
        start = time.perf_counter()
        measures: dict[str, Callable[[], Any]] = {
            "cells": self._cells,
            "growth": self._growth,
            "limits": self._limits,
            "host": self._host,
            "distributed": self._distributed,
            "training": self._training,
        }
        self.results[section] = measures[section]()
        self.results["seconds"][section] = round(time.perf_counter() - start, 1)
        self._save(self._partial)

    def report(self) -> list[Path]:
        """Writes the tables and the plots; the files of this run."""
        written, text = self.stem.with_suffix(".json"), self.stem.with_suffix(".md")
        self._partial.replace(written)
        text.write_text(table.markdown(self.results, written), encoding="utf-8")
        return [written, text, *draw(self.results, written)]

    def _save(self, path: Path) -> None:
        path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def say(self, what: str) -> None:
        """A line with the seconds that have passed."""
        print(f"[{time.perf_counter() - self._start:5.0f} s] {what}", flush=True)

    def _cells(self) -> list[Record]:
        plan, records = self._plan, []
        for cell in plan.cells:
            for threads in plan.threads:
                names = plan.names or contenders()
                record = compare(cell, names, threads, plan.rounds, plan.seconds, patient=plan.patient)
                records.append(record)
                self.say(f"  {table.line(record)}")
        return records

    def _growth(self) -> Record:
        if "cells" not in self.results:
            raise SystemExit("--only: growth follows from cells, name both")
        return growth(self.results["cells"], self._plan.budget)

    def _limits(self) -> list[Record]:
        plan = self._plan
        return [limits(cell, threads, plan.rounds, plan.seconds) for cell in plan.limits for threads in plan.threads]

    def _host(self) -> Record:
        return host(self._plan.rounds, self._plan.seconds)

    def _distributed(self) -> Record:
        return distributed.section(self._plan.processes, self._plan.rounds, self._plan.seconds)

    def _training(self) -> list[Record]:
        return training_step.training(self._plan.training, TRAINING_ROUNDS)


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start and stop
    flags.out.mkdir(parents=True, exist_ok=True)
    run = Run(PLANS[flags.plan], flags.out)
    for section in SECTIONS:
        if section in flags.only:
            run.measure(section)
    files = run.report()
    for promise in promises(run.results):
        verdict = "kept" if promise.kept else "NOT KEPT"
        print(f"{verdict}: {promise.what}: {promise.found:.3g}, promised at most {promise.limit:g}")
    run.say("written: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
