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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from contenders import OURS, TEXTBOOK, entry
from measure import baseline, load, newest
from render import table

if TYPE_CHECKING:
    from measure import Record

BENCH = Path(__file__).with_name("bench.py")
ROWS = 12  # of the table at least, if there are as many


class Key(NamedTuple):
    """Which ratio: the section that measures it, where in it, and of what."""

    section: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.what}, {self.place}"


class Figure(NamedTuple):
    """A ratio, the larger the worse; an exponent with the span of sizes it was fitted over; or a count, exactly."""

    value: float
    span: float | None = None
    exact: bool = False

    def worse_by(self, now: Figure) -> float:
        """By which part ``now`` is worse than this; negative where it is better.

        An exponent is judged by what it makes of the time over the sizes that both were fitted to: a tolerance of 20 %
        then means there, too, that the largest takes 20 % longer, against the smallest.
        """
        if self.span is not None and now.span is not None:
            growth: float = min(self.span, now.span) ** (now.value - self.value)
            return growth - 1
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
        """By more than ``tolerance``, or at all where that is exact."""
        return self.worse_by > (0 if self.committed.exact else tolerance)

    def __str__(self) -> str:
        return f"{self.key} ({self.committed} → {self.now}, {100 * self.worse_by:+.1f} %)"


Figures = dict[Key, Figure]
Ratios = Iterator[tuple[str, str, Figure]]  # place, what, and how large

# What this library promises about its cost on a CPU. Machines differ: a promise that another one does not keep is worth
# an issue, so it is said, and is no failure. Twice the inputs of 256×4096 are a quarter of a D×D matrix.
PROMISES = {
    Key("growth", "N = 256", "exponent of time in d"): 1.15,
    Key("cells", "256×4096 on 1 thread", "working memory over the inputs"): 2.0,
    Key("limits", "256×8192 on 1 thread", "time over its GEMMs alone"): 1.7,
    Key("limits", "1024×8192 on 1 thread", "time over its GEMMs alone"): 1.5,
    Key("training", "ResNet-50 and projector, batch 64", "share of the loss"): 0.03,
}


def verdicts(results: Record) -> list[str]:
    found = {key: figure.value for key, figure in figures(results).items() if key in PROMISES}
    return [
        f"{'kept' if value <= PROMISES[key] else 'NOT KEPT'}: {key}: {value:.3g}, promised at most {PROMISES[key]:g}"
        for key, value in found.items()
    ]


def figures(results: Record) -> Figures:
    return {
        Key(section, place, what): figure
        for section, ratios in SECTIONS.items()
        if results.get(section)
        for place, what, figure in ratios(results[section])
    }


def _place(cell: Record) -> str:
    return f"{cell['n']}×{cell['d']} on {cell['threads']} thread{'s' * (cell['threads'] > 1)}"


def _of_cells(cells: list[Record]) -> Ratios:
    for cell in cells:
        place, contenders = _place(cell), cell["contenders"]
        textbook = contenders.get(TEXTBOOK)
        for name, found in contenders.items():
            ratio = found["times_ours"]["median"]
            if not entry(name).ours:
                yield place, f"time over {name}", Figure(1 / ratio)
            elif name != OURS and textbook:
                yield place, f"time of {name} over {TEXTBOOK}", Figure(ratio / textbook["times_ours"]["median"])
        working = contenders[OURS]["working_bytes"]
        yield place, "working memory over the inputs", Figure(working / (2 * 4 * cell["n"] * cell["d"]))
        if textbook:
            yield place, f"working memory over {TEXTBOOK}", Figure(working / textbook["working_bytes"])


def _of_growth(growth: Record) -> Ratios:
    for line, axis, fixed in (("features", "d", "n"), ("samples", "n", "d")):
        if fit := growth[line]["contenders"].get(OURS):
            exponent = Figure(fit["exponent"], max(fit[axis]) / min(fit[axis]))
            yield f"{fixed.upper()} = {growth[line][fixed]}", f"exponent of time in {axis}", exponent
    budget = growth["budget"]
    if largest := budget["contenders"].get(OURS):
        yield f"N = {budget['n']}", "working memory over D, the largest", Figure(budget["bytes"] / largest["features"])


def _of_limits(cells: list[Record]) -> Ratios:
    for cell in cells:
        yield _place(cell), "time over its GEMMs alone", Figure(cell["ours_over_gemms"]["median"])


def _of_host(section: Record) -> Ratios:
    for found in section["steps"]:
        ratio = Figure(found["over_reference"]["median"])
        yield f"{found['n']}×{found['d']}, {found['what']}", f"host time over {found['reference']}", ratio
    for found in section["operations"]:
        yield f"{found['n']}×{found['d']}, eager", "operations of a step", Figure(found["operations"], exact=True)


def _of_distributed(section: Record) -> Ratios:
    for cell in section["cells"]:
        place = f"{cell['n']}×{cell['d']} on {cell['processes']} processes"
        ours, textbook = (cell["contenders"][name] for name in (OURS, TEXTBOOK))
        sent = ours["sent"]["collectives"] / textbook["sent"]["collectives"]
        yield place, f"time over {TEXTBOOK}", Figure(1 / textbook["times_ours"]["median"])
        yield place, f"bytes sent over {TEXTBOOK}", Figure(sent)


def _of_training(records: list[Record]) -> Ratios:
    for record in records:
        yield f"{record['what']}, batch {record['batch_size']}", "share of the loss", Figure(record["shares"][OURS])


SECTIONS: dict[str, Callable[[Any], Ratios]] = {
    "cells": _of_cells,
    "growth": _of_growth,
    "limits": _of_limits,
    "host": _of_host,
    "distributed": _of_distributed,
    "training": _of_training,
}


def absent(here: Figures, there: Figures) -> list[str]:
    """What ``here`` has and ``there`` lacks, place by place."""
    missing: dict[str, list[str]] = {}
    for key in sorted(here.keys() - there.keys()):
        missing.setdefault(f"{key.section} at {key.place}", []).append(key.what)
    return [f"{where}: {', '.join(what)}" for where, what in missing.items()]


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
    """What differs in the setting, the table, what could not be compared, and the verdict."""
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
