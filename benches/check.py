"""`make bench-check`: has anything become worse against the others than the committed results say?

Compares ratios, never times: times differ between machines and hours, ratios taken in turns within one run much less.
What comes out worse is measured once more, and named only if it is worse both times. Counts, of the operations that a
step dispatches, are the same everywhere: one more is named.

    python benches/check.py                    measures the cells of bench.py's plan "check"
    python benches/check.py NEW.json           compares a file of results with the newest committed ones
    python benches/check.py NEW.json --against OLD.json --tolerance 0.1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from contenders import OURS, TEXTBOOK, entry
from measure import Record, baseline, load, newest
from render import figure, table

BENCH = Path(__file__).with_name("bench.py")
ROWS = 12  # of the table at least, if there are as many
SECTIONS = ("cells", "growth", "limits", "host", "distributed", "training")
OPERATIONS = "operations of a step"
CELL, PROCESSES = "{n}×{d}, threads {threads}", "{n}×{d} on {processes} processes"
SENT = "contenders/{}/sent/collectives"


class Key(NamedTuple):
    """Which ratio: the section that measures it, where in it, and of what."""

    section: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.what}, {self.place}"


class Figure(NamedTuple):
    """A ratio, the larger the worse; an exponent with the span of sizes it was fitted over; or a count."""

    value: float
    span: float | None = None

    def worse_by(self, now: Figure) -> float:
        """By which part ``now`` is worse than this; negative where it is better.

        An exponent is judged by what it makes of the time over the sizes that both were fitted to: a tolerance of 20 %
        then means there, too, that the largest takes 20 % longer, against the smallest.
        """
        if self.span is not None and now.span is not None:
            return float(min(self.span, now.span) ** (now.value - self.value)) - 1
        return now.value / self.value - 1

    def __str__(self) -> str:
        return f"{self.value:.3g}"


class Change(NamedTuple):
    """A ratio then and now, and, where it was measured once more, again."""

    key: Key
    committed: Figure
    now: Figure
    again: Figure | None = None

    @property
    def worse_by(self) -> float:
        return min(self.committed.worse_by(found) for found in (self.now, self.again) if found is not None)

    def is_worse(self, tolerance: float) -> bool:
        return self.worse_by > (0 if self.key.what == OPERATIONS else tolerance)  # a count, the same everywhere

    def __str__(self) -> str:
        return f"{self.key} ({self.committed} → {self.now}, {100 * self.worse_by:+.1f} %)"


Figures = dict[Key, Figure]
Ratios = Iterator[tuple[Key, Figure]]

# What this library promises about its cost on a CPU. Machines differ: a promise that another one does not keep is worth
# an issue, so it is said, and is no failure. Twice the inputs of 256×4096 are a quarter of a D×D matrix.
PROMISES = {
    Key("growth", "N = 256", "exponent of time in d"): 1.15,
    Key("cells", "256×4096, threads 1", "working memory over the inputs"): 2.0,
    Key("limits", "256×8192, threads 1", "time over its GEMMs alone"): 1.7,
    Key("limits", "1024×8192, threads 1", "time over its GEMMs alone"): 1.5,
    Key("training", "ResNet-50 and projector, batch 64", "share of the loss"): 0.03,
}


def verdicts(results: Record) -> list[str]:
    found = {key: ratio.value for key, ratio in figures(results).items() if key in PROMISES}
    return [
        f"{'kept' if value <= PROMISES[key] else 'NOT KEPT'}: {key}: {value:.3g}, promised at most {PROMISES[key]:g}"
        for key, value in found.items()
    ]


def figures(results: Record) -> Figures:
    return dict([*_of_cells(results.get("cells", [])), *_of_growth(results.get("growth")), *_quotients(results)])


def _of_cells(cells: list[Record]) -> Ratios:
    for cell in cells:
        key, contenders = partial(Key, "cells", CELL.format(**cell)), cell["contenders"]
        textbook, working = contenders.get(TEXTBOOK), contenders[OURS]["working_bytes"]
        for name, found in contenders.items():
            ratio = found["times_ours"]["median"]
            if not entry(name).ours:
                yield key(f"time over {name}"), Figure(1 / ratio)
            elif name != OURS and textbook:
                yield key(f"time of {name} over {TEXTBOOK}"), Figure(ratio / textbook["times_ours"]["median"])
        yield key("working memory over the inputs"), Figure(working / (2 * 4 * cell["n"] * cell["d"]))
        if textbook:
            yield key(f"working memory over {TEXTBOOK}"), Figure(working / textbook["working_bytes"])


def _of_growth(growth: Record | None) -> Ratios:
    for line, axis, fixed in (("features", "d", "n"), ("samples", "n", "d")):
        if fit := figure(growth, f"{line}/contenders/{OURS}"):
            key = Key("growth", f"{fixed.upper()} = {figure(growth, line)[fixed]}", f"exponent of time in {axis}")
            yield key, Figure(fit["exponent"], max(fit[axis]) / min(fit[axis]))
    if largest := figure(growth, f"budget/contenders/{OURS}/features"):
        key = Key("growth", f"N = {figure(growth, 'budget/n')}", "working memory over D, the largest")
        yield key, Figure(figure(growth, "budget/bytes") / largest)


# Of each: the section, where its records lie, the place, of what, and the figures whose quotient it is.
QUOTIENTS = (
    ("limits", "", CELL, "time over its GEMMs alone", "ours_over_gemms/median", ""),
    ("host", "steps", "{n}×{d}, {what}", "host time over {reference}", "over_reference/median", ""),
    ("host", "operations", "{n}×{d}, eager", OPERATIONS, "operations", ""),
    ("distributed", "cells", PROCESSES, f"time over {TEXTBOOK}", "", f"contenders/{TEXTBOOK}/times_ours/median"),
    ("distributed", "cells", PROCESSES, f"bytes sent over {TEXTBOOK}", SENT.format(OURS), SENT.format(TEXTBOOK)),
    ("training", "", "{what}, batch {batch_size}", "share of the loss", f"shares/{OURS}", ""),
)


def _quotients(results: Record) -> Ratios:
    for section, where, place, what, over, under in QUOTIENTS:
        for record in figure(results, f"{section}/{where}") or []:
            ratio = (figure(record, over) if over else 1) / (figure(record, under) if under else 1)
            yield Key(section, place.format(**record), what.format(**record)), Figure(ratio)


def absent(here: Figures, there: Figures) -> list[str]:
    keys = sorted(here.keys() - there.keys())
    places = groupby(keys, lambda key: f"{key.section} at {key.place}")
    return [f"{where}: {', '.join(key.what for key in of)}" for where, of in places]


def differences(old: Record, new: Record) -> str:
    before, after = ({**each["environment"], **each["environment"]["versions"]} for each in (old, new))
    changed = [what for what in ("cpu", "instructions", "torch") if before[what] != after[what]]
    said = "; ".join(f"{what} {before[what]} → {after[what]}" for what in changed)
    return f"Ratios differ between environments, and these differ: {said}." if said else ""


def compared(old: Record, new: Record) -> list[Change]:
    """The ratios that both have, the worst change first; raises where a section has none that both have."""
    before, after = figures(old), figures(new)
    changes = [Change(key, before[key], after[key]) for key in before if key in after]
    sections = {key.section for key in before} & {key.section for key in after}
    apart = sections - {change.key.section for change in changes}
    if apart or not changes:
        raise SystemExit(
            f"expected the two results to have ratios of {', '.join(sorted(apart)) or 'any section'} in common, found "
            "none: measure the same cells, with as many threads"
        )
    return sorted(changes, key=lambda change: -change.worse_by)


def once_more(changes: list[Change], tolerance: float, measure: Callable[[list[str]], Record]) -> list[Change]:
    """Measure the sections anew in which something is worse, and add what was found; the worst first again."""
    worse = {change.key for change in changes if change.is_worse(tolerance)}
    if not worse:
        return changes
    named = {key.section for key in worse}
    again = figures(measure([s for s in SECTIONS if s in named or (s == "cells" and "growth" in named)]))
    added = [change._replace(again=again.get(change.key)) if change.key in worse else change for change in changes]
    return sorted(added, key=lambda change: -change.worse_by)


def report(old: Record, new: Record, changes: list[Change], tolerance: float) -> str:
    worse = [change for change in changes if change.is_worse(tolerance)]
    others = [change for change in changes if not change.is_worse(tolerance)]
    shown = worse + others[: max(0, ROWS - len(worse))]
    rows = [{**change._asdict(), "worse by": f"{100 * change.worse_by:+.1f} %"} for change in shown]
    heads = ("key", "committed", "now", "again", "worse by")
    before, after = figures(old), figures(new)
    lines = [differences(old, new), table(rows, [(head, head, str) for head in heads])]
    lines += [f"Committed, but not measured now: {what}." for what in absent(before, after)]
    lines += [f"Measured now, but not committed: {what}." for what in absent(after, before)]
    said = f"WORSE by more than {100 * tolerance:g} %, or a count more: {'; '.join(map(str, worse))}."
    lines.append(said if worse else f"None of {len(changes)} ratios is worse by more than {100 * tolerance:g} %.")
    return "\n".join(filter(None, lines))


def measured(sections: list[str], bench: Path = BENCH) -> Record:
    """The results of a run of the cells that matter, of some sections or, where none is named, of all."""
    with tempfile.TemporaryDirectory(prefix="barlow-loss-") as folder:
        only = ["--only", *sections] if sections else []
        subprocess.run([sys.executable, bench, "--plan", "check", *only, "--out", folder], check=True)
        return load(newest(Path(folder)))


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Name the ratios that are worse than the committed ones.")
    parser.add_argument("new", nargs="?", type=Path, help="results to compare (default: measure them)")
    parser.add_argument("--against", type=Path, help="results to compare with (default: the newest committed)")
    parser.add_argument("--tolerance", type=float, default=0.2, help="by which part a ratio may be worse (0.2)")
    arguments = parser.parse_args(flags)
    name, old = (arguments.against.name, load(arguments.against)) if arguments.against else baseline()
    print(f"Against {name}.")
    new = load(arguments.new) if arguments.new else measured([])
    changes = compared(old, new)
    if not arguments.new:
        changes = once_more(changes, arguments.tolerance, measured)
    print(report(old, new, changes, arguments.tolerance))
    sys.exit(any(change.is_worse(arguments.tolerance) for change in changes))


if __name__ == "__main__":
    main()
