"""The committed table of what the kernels need, and what has changed since it was written."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import triton
from chips import Report

TOLERATED_REGISTERS = 1.1  # times those of the table

_HEAD = """# Registers, shared memory and spills of the kernels

Compiled ahead of time by triton {version}; other versions give other figures. Registers are per thread. Shared memory
is in bytes per block. Spills are in bytes on NVIDIA, in registers on AMD.

| kernel | case | chip | registers | shared memory | spills |
|---|---|---|---:|---:|---:|
"""


class Row(NamedTuple):
    """What the figures belong to."""

    kernel: str
    case: str
    chip: str


class Figures(NamedTuple):
    """The figures."""

    registers: int
    shared: int
    spills: int


class Table(NamedTuple):
    """The figures of every kernel, case and chip, and the version of triton that they hold for."""

    version: str
    rows: Mapping[Row, Figures]

    @classmethod
    def of(cls, reports: Mapping[tuple[str, str], list[Report]]) -> "Table":
        """Of reports by kernel and case, by the triton at hand."""
        rows = {
            Row(kernel, case, report.chip): Figures(report.registers, report.shared, report.spills)
            for (kernel, case), several in reports.items()
            for report in several
        }
        return cls(triton.__version__, rows)

    @classmethod
    def read(cls, text: str) -> "Table":
        """Of the text that `written` gave."""
        version = re.search(r"by triton ([\w.+]+);", text)
        if version is None:
            raise ValueError("the table does not name its version of triton")
        cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
        rows = {Row(*line[:3]): Figures(*map(int, line[3:])) for line in cells[2:]}
        return cls(version[1], rows)

    def written(self) -> str:
        """As Markdown, sorted."""
        lines = (f"| {' | '.join(map(str, (*row, *self.rows[row])))} |\n" for row in sorted(self.rows))
        return _HEAD.format(version=self.version) + "".join(lines)

    def reason_to_skip(self) -> str | None:
        """Why the table cannot be compared with the triton at hand. None: it can."""
        if self.version == triton.__version__:
            return None
        return f"the figures are those of triton {self.version}, this is {triton.__version__}"


class Changes(NamedTuple):
    """What a comparison found, a line for each row."""

    regressions: list[str]
    others: list[str]


def changes(committed: Table, fresh: Table) -> Changes:
    """What is different in `fresh`.

    A regression: over a tenth more registers, more shared memory, or more spills. All else, rows that came and went
    too, calls for the table to be written anew.
    """
    found = Changes([], [])
    for row in sorted(committed.rows.keys() | fresh.rows.keys()):
        before, now = committed.rows.get(row), fresh.rows.get(row)
        if before == now:
            continue
        kind = found.regressions if before and now and _is_worse(before, now) else found.others
        kind.append(f"{' '.join(row)}: {_described(before)} → {_described(now)}")
    return found


def _is_worse(before: Figures, now: Figures) -> bool:
    more_registers = now.registers > TOLERATED_REGISTERS * before.registers
    return more_registers or now.shared > before.shared or now.spills > before.spills


def _described(figures: Figures | None) -> str:
    if figures is None:
        return "absent"
    return f"{figures.registers} registers, {figures.shared} bytes shared, {figures.spills} spills"
