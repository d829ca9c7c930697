"""How figures and tables are written in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Record = dict[str, Any]

NONE = "—"  # not measured


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column to the left, the others to the right."""
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def paragraphs(*texts: str) -> str:
    """Those that are not empty, an empty line between them."""
    return "\n\n".join(filter(None, texts))


def plain(value: float) -> str:
    """Three digits: 0.0123, 4.56, 78.9, 1,234."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def ms(seconds: Record) -> str:
    """The median, in milliseconds."""
    return plain(1e3 * seconds["median"])


def times(ratio: float) -> str:
    """A ratio as a factor: 0.43×, 5.6×, 78×."""
    return f"{ratio:#.2g}×" if ratio < 0.995 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def percent(share: float) -> str:
    """A share of one: 0.07 %, 2.6 %, 47 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def megabytes(size: float) -> str:
    """Millions of bytes."""
    return f"{size / 1e6:.2g}" if size < 1e6 else f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def error(value: float) -> str:
    """A relative distance."""
    return f"{value:.1e}"


def spread(values: Record, unit: float = 1) -> str:
    """Median, and quartiles in brackets."""
    median, q1, q3 = (f"{unit * values[key]:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def between(values: Sequence[float], digits: int) -> str:
    """``"1.25 to 3.40"``, or ``"1.25"`` where all are the same."""
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))


def listed(items: Iterable[str]) -> str:
    """``"a, b and c"``."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def shape(record: Record) -> str:
    """The cell of a record."""
    return f"{record['n']} × {record['d']}"


def counted(number: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def names(records: Iterable[Record]) -> list[str]:
    """The contenders of all ``records``, in the order in which they are first met."""
    return list(dict.fromkeys(name for record in records for name in record["contenders"]))
