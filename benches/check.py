"""`make bench-check`: has anything become worse against the others than the committed results say?

Compares ratios, never times: ours over every other contender and over its own matrix products, its working memory over
the textbook's and the inputs', how its cost grows, what it costs the host, what it sends, its share of a training step.
Times differ between machines and hours, ratios taken in turns within one run much less. What comes out worse is
measured once more, and named only if it is worse both times. Counts, of the operations that a step dispatches, are the
same everywhere: one more is named.

    python benches/check.py                    measures the cells of bench.py's plan "check"
    python benches/check.py NEW.json           compares a file of results with the newest committed ones
    python benches/check.py NEW.json --against OLD.json --tolerance 0.1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from baselines import OURS, TEXTBOOK, entry
from committed import baseline, load, newest
from table_format import counted, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Record = dict[str, Any]

BENCH = Path(__file__).with_name("bench.py")
ROWS = 12  # of the table at least, if there are as many
FLOAT32 = 4


class Key(NamedTuple):
    """Which ratio: the section that measures it, where in it, and of what."""

    section: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.what}, {self.place}"


class Figure(NamedTuple):
    """A ratio. Exponents are told by the span of sizes that they were fitted over, D in a budget by ``larger``.

    A count is ``exact``: no tolerance is for it.
    """

    value: float
    span: float | None = None
    larger_is_better: bool = False
    exact: bool = False

    def worse_by(self, now: Figure) -> float:
        """By which part ``now`` is worse than this; negative where it is better.

        An exponent is judged by what it makes of the time over the sizes that both were fitted to: a tolerance of 20 %
        then means there, too, that the largest takes 20 % longer, against the smallest. Over 16-fold D those are 0.066
        of the exponent.
        """
        if self.span is not None and now.span is not None:
            growth: float = min(self.span, now.span) ** (now.value - self.value)
            return growth - 1
        return self.value / now.value - 1 if self.larger_is_better else now.value / self.value - 1


Figures = dict[Key, Figure]


class Change(NamedTuple):
    """A ratio then and now, and, where it was measured once more, again."""

    key: Key
    committed: Figure
    now: Figure
    again: Figure | None = None

    @property
    def worse_by(self) -> float:
        """Of two measurements the better one's."""
        return min(self.committed.worse_by(found) for found in (self.now, self.again) if found is not None)

    def is_worse(self, tolerance: float) -> bool:
        """By more than ``tolerance``, or at all where that is exact."""
        return self.worse_by > (0 if self.committed.exact else tolerance)


def figures(results: Record) -> Figures:
    """All ratios that are compared; the larger the worse, but for the largest D."""
    found = (ratios(results[section]) for section, ratios in SECTIONS.items() if results.get(section))
    return dict(chain.from_iterable(found))


def _places(cells: list[Record]) -> Iterator[tuple[str, Record]]:
    """Each cell and its name."""
    for cell in cells:
        yield f"{cell['n']}×{cell['d']} on {counted(cell['threads'], 'thread')}", cell


def _of_cells(cells: list[Record]) -> Iterator[tuple[Key, Figure]]:
    for place, cell in _places(cells):
        contenders = cell["contenders"]
        for name, found in contenders.items():
            if name != OURS and not entry(name).ours:
                yield Key("cells", place, f"time over {name}"), Figure(1 / found["times_ours"]["median"])
            elif name != OURS and TEXTBOOK in contenders:
                over = found["times_ours"]["median"] / contenders[TEXTBOOK]["times_ours"]["median"]
                yield Key("cells", place, f"time of {name} over {TEXTBOOK}"), Figure(over)
        working = contenders[OURS]["working_bytes"]
        inputs = 2 * FLOAT32 * cell["n"] * cell["d"]
        yield Key("cells", place, "working memory over the inputs"), Figure(working / inputs)
        if TEXTBOOK in contenders:
            over = working / contenders[TEXTBOOK]["working_bytes"]
            yield Key("cells", place, f"working memory over {TEXTBOOK}"), Figure(over)


def _of_growth(growth: Record) -> Iterator[tuple[Key, Figure]]:
    for line, axis, fixed in (("features", "d", "n"), ("samples", "n", "d")):
        fit = growth.get(line, {}).get("contenders", {}).get(OURS)
        if fit:
            place = f"{fixed.upper()} = {growth[line][fixed]}"
            span = max(fit[axis]) / min(fit[axis])
            yield Key("growth", place, f"exponent of time in {axis.upper()}"), Figure(fit["exponent"], span)
    budget = growth.get("budget", {})
    if largest := budget.get("contenders", {}).get(OURS):
        what = f"largest D in {budget['bytes'] / 1e9:g} GB"
        yield Key("growth", f"N = {budget['n']}", what), Figure(largest["features"], larger_is_better=True)


def _of_limits(cells: list[Record]) -> Iterator[tuple[Key, Figure]]:
    for place, cell in _places(cells):
        yield Key("limits", place, "time over its GEMMs alone"), Figure(cell["ours_over_gemms"]["median"])


def _of_host(section: Record) -> Iterator[tuple[Key, Figure]]:
    for found in section["steps"]:
        place = f"{found['n']}×{found['d']}, {found['what']}"
        yield Key("host", place, f"host time over {found['reference']}"), Figure(found["over_reference"]["median"])
    for found in section["operations"]:
        place = f"{found['n']}×{found['d']}, eager"
        yield Key("host", place, "operations of a step"), Figure(found["operations"], exact=True)


def _of_distributed(section: Record) -> Iterator[tuple[Key, Figure]]:
    for cell in section.get("cells", []):
        place = f"{cell['n']}×{cell['d']} on {cell['processes']} processes"
        ours, textbook = (cell["contenders"][name] for name in (OURS, TEXTBOOK))
        sent = ours["sent"]["collectives"] / textbook["sent"]["collectives"]
        yield Key("distributed", place, f"time over {TEXTBOOK}"), Figure(1 / textbook["times_ours"]["median"])
        yield Key("distributed", place, f"bytes sent over {TEXTBOOK}"), Figure(sent)


def _of_training(records: list[Record]) -> Iterator[tuple[Key, Figure]]:
    for record in records:
        place = f"{record['what']}, batch {record['batch_size']}"
        yield Key("training", place, "share of the loss"), Figure(record["shares"][OURS])


SECTIONS: dict[str, Callable[[Any], Iterator[tuple[Key, Figure]]]] = {
    "cells": _of_cells,
    "growth": _of_growth,
    "limits": _of_limits,
    "host": _of_host,
    "distributed": _of_distributed,
    "training": _of_training,
}


def absent(here: Figures, there: Figures) -> list[str]:
    """What ``here`` has and ``there`` lacks, as briefly as it can be said: sections, places, then single ratios."""
    gone = [key for key in here if key not in there]
    sections, places = {key.section for key in there}, {key[:2] for key in there}
    said = [f"all of {section}" for section in _once(key.section for key in gone) if section not in sections]
    gone = [key for key in gone if key.section in sections]
    for section in _once(key.section for key in gone):
        whole = _once(key.place for key in gone if key.section == section and key[:2] not in places)
        said += [f"{section} at {listed(whole)}"] if whole else []
    gone = [key for key in gone if key[:2] in places]
    for what in _once(key.what for key in gone):
        said.append(f"{what} at {listed(key.place for key in gone if key.what == what)}")
    return said


def _once(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def differences(old: Record, new: Record) -> str:
    """One line on what ratios depend on and is not the same, or nothing."""
    before, after = _setting(old), _setting(new)
    said = [f"{what} {before[what]} → {after[what]}" for what in before if before[what] != after[what]]
    return f"Ratios differ between environments, and these differ: {'; '.join(said)}." if said else ""


def _setting(results: Record) -> dict[str, str]:
    machine = results["environment"]
    threads = sorted({cell["threads"] for section in ("cells", "limits") for cell in results.get(section, [])})
    return {
        "CPU": machine["cpu"],
        "instructions": machine["instructions"],
        "torch": machine["versions"]["torch"],
        "threads": " and ".join(map(str, threads)),
    }


def compared(old: Record, new: Record) -> list[Change]:
    """The ratios that both have, the worst change first.

    Raises:
        SystemExit: there are none, or none of a section that both have.
    """
    before, after = figures(old), figures(new)
    changes = [Change(key, before[key], after[key]) for key in before if key in after]
    sections = {key.section for key in before} & {key.section for key in after}
    apart = sorted(sections - {change.key.section for change in changes})
    if apart or not changes:
        where = f" of {listed(apart)}" if apart else ""
        raise SystemExit(
            f"expected the two results to have ratios{where} in common, found none: measure the same cells, "
            "with as many threads"
        )
    return sorted(changes, key=lambda change: -change.worse_by)


def once_more(changes: list[Change], tolerance: float, measure: Callable[[list[str]], Record]) -> list[Change]:
    """Measure the sections anew in which something is worse, and add what was found; the worst first again."""
    worse = {change.key for change in changes if change.is_worse(tolerance)}
    if not worse:
        return changes
    again = figures(measure(_measured_by(worse)))
    added = [change._replace(again=again.get(change.key)) if change.key in worse else change for change in changes]
    return sorted(added, key=lambda change: -change.worse_by)


def _measured_by(keys: Iterable[Key]) -> list[str]:
    """The sections that these are measured in, in the order of a run; growth follows from the cells."""
    named = {key.section for key in keys}
    return [section for section in SECTIONS if section in named or (section == "cells" and "growth" in named)]


def report(old: Record, new: Record, changes: list[Change], tolerance: float) -> str:
    """What differs in the setting, the table, what could not be compared, and the verdict."""
    changes = sorted(changes, key=lambda change: not change.is_worse(tolerance))
    worse = [change for change in changes if change.is_worse(tolerance)]
    shown = changes[: max(len(worse), ROWS)]
    lines = [differences(old, new), _table(shown)]
    if rest := changes[len(shown) :]:
        lines.append(f"… and {counted(len(rest), 'ratio')} more, none worse by more than {_percent(rest[0].worse_by)}.")
    before, after = figures(old), figures(new)
    lines += [f"Committed, but not measured now: {what}." for what in absent(before, after)]
    lines += [f"Measured now, but not committed: {what}." for what in absent(after, before)]
    return "\n".join(filter(None, [*lines, *_verdict(changes, worse, tolerance)]))


def _verdict(changes: list[Change], worse: list[Change], tolerance: float) -> list[str]:
    """A line on the ratios, and one on the counts if one is larger."""
    named = "; ".join(f"{change.key} ({_percent(change.worse_by)})" for change in worse if not change.committed.exact)
    more = "; ".join(
        f"{change.key} ({_value(change.committed)} → {_value(change.now)})"
        for change in worse
        if change.committed.exact
    )
    return [
        f"WORSE by more than {100 * tolerance:g} %: {named}."
        if named
        else f"None of {counted(len(changes), 'ratio')} is worse by more than {100 * tolerance:g} %.",
        f"MORE than committed: {more}." if more else "",
    ]


def _table(changes: list[Change]) -> str:
    twice = any(change.again for change in changes)
    rows = [["what", "committed", "now", *(["again"] if twice else []), "worse by"]]
    for change in changes:
        again = [_value(change.again) if change.again else ""] if twice else []
        rows.append([str(change.key), _value(change.committed), _value(change.now), *again, _percent(change.worse_by)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join((f"{row[0]:<{first}}", *map(str.rjust, row[1:], others))) for row in rows)


def _value(figure: Figure) -> str:
    return f"{figure.value:,.0f}" if figure.larger_is_better or figure.exact else f"{figure.value:.3g}"


def _percent(part: float) -> str:
    return f"{100 * part:+.1f} %"


def measured(sections: list[str], bench: Path = BENCH) -> Record:
    """The results of a run of the cells that matter, of some sections or, where none is named, of all."""
    with tempfile.TemporaryDirectory(prefix="barlow-loss-") as folder:
        only = ["--only", *sections] if sections else []
        subprocess.run([sys.executable, bench, "--plan", "check", *only, "--out", folder], check=True)
        return load(newest(Path(folder)))


def main(flags: Sequence[str] | None = None) -> None:
    """The program; ``flags`` in place of those of the command line."""
    parser = argparse.ArgumentParser(description="Name the ratios that are worse than the committed ones.")
    parser.add_argument("new", nargs="?", type=Path, help="results to compare (default: measure them)")
    parser.add_argument("--against", type=Path, help="results to compare with (default: the newest committed)")
    parser.add_argument(
        "--tolerance", type=float, default=0.2, help="by which part a ratio may be worse (default: 0.2)"
    )
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
