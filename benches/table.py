"""Turns the figures of compare.py into Markdown, and puts them into the README.

The tables stand between two markers there; the figures come from results/compare.json.

    python benches/table.py                 rewrites them
    python benches/table.py --check         fails if they are not what the figures say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baselines import COMPILED, LIGHTLY, OURS, TEXTBOOK

if TYPE_CHECKING:
    from collections.abc import Iterable

    Record = dict[str, Any]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HERE = Path(__file__).parent
TITLES = {OURS: "barlow_loss", TEXTBOOK: "textbook", COMPILED: "torch.compile of it", LIGHTLY: "lightly"}


def line(record: Record) -> str:
    """One cell of the comparison, for the terminal."""
    ours = record["contenders"][OURS]
    parts = [f"{record['n']}×{record['d']}, {_threads([record])}, {record['algorithm']}: {_ms(ours['seconds'])} ms"]
    parts += [f"{TITLES[name]} {_times(c['times_ours'])}" for name, c in record["contenders"].items() if name != OURS]
    parts.append(f"{record['gemms']['ours_over_gemms']['median']:.2f} of its GEMMs alone")
    parts.append(f"errors {ours['loss_error']:.0e} {ours['gradient_error']:.0e}, {record['rounds']} rounds")
    return "; ".join(parts)


def summary(results: Record) -> str:
    """The tables of the README."""
    return "\n\n".join(filter(None, (_setting(results), _speed(results), _memory(results), _sentences(results))))


def markdown(results: Record) -> str:
    """The summary, and every figure with its spread."""
    return f"{summary(results)}\n\n{_details(results)}\n"


def _setting(results: Record) -> str:
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"Forward and backward, float32, on {machine['cpu']} ({machine['cores']} cores), "
        f"{machine['system']}, Python {machine['python']}, {versions}."
    )


def _speed(results: Record) -> str:
    cells = _by_shape(results["cells"])
    names = [name for name in _names(results["cells"]) if name != OURS]
    threads = _threads(next(iter(cells.values())))
    others = [f"{TITLES[name]}, × ours" for name in names]
    head = ["N × D", "algorithm", f"ours, ms ({threads})", *others, "ours / its GEMMs alone"]
    rows = []
    for shape, records in cells.items():
        row = [shape, records[0]["algorithm"], " / ".join(_ms(r["contenders"][OURS]["seconds"]) for r in records)]
        row += [" / ".join(_times(r["contenders"][name]["times_ours"]) for r in records) for name in names]
        row.append(" / ".join(f"{r['gemms']['ours_over_gemms']['median']:.2f}" for r in records))
        rows.append(row)
    return _grid(head, rows)


def _memory(results: Record) -> str:
    if not results["memory"]:
        return ""
    names = _names(results["memory"])
    rows = []
    for record in results["memory"]:
        measured = [_bytes(record["contenders"][name]) for name in names]
        rows.append([f"{record['n']} × {record['d']}", *(f"{size / 1e6:,.1f}" for size in measured)])
    return _grid(["working memory, MB", *(TITLES[name] for name in names)], rows)


def _bytes(contender: Record) -> int:
    """Storages where they can be seen, else resident memory."""
    live: int | None = contender["live_bytes"]
    return contender["resident_bytes"] if live is None else live


def _sentences(results: Record) -> str:
    ours = [record["contenders"][OURS] for record in results["cells"]]
    loss, gradient = (max(c[field] for c in ours) for field in ("loss_error", "gradient_error"))
    sentences = [
        "Medians of ratios taken round by round in one process.",
        f"Largest distance of ours to float64 over the grid: loss {loss:.1e}, gradient {gradient:.1e}, relative.",
    ]
    for record in results["growth"]:
        ours_grows, textbook_grows = (record["contenders"][name]["growth"]["median"] for name in (OURS, TEXTBOOK))
        small, large = record["d"]
        sentences.append(
            f"From D = {small} to {large} at N = {record['n']} ({_threads([record])}) our time grows "
            f"{ours_grows:.2f}-fold, the textbook's {textbook_grows:.2f}-fold."
        )
    if results["memory"]:
        sentences.append(
            "Working memory is what a step allocates beyond its inputs and gradients: bytes of live tensor storages; "
            "for torch.compile, whose storages cannot be seen, the rise of the resident memory of a fresh process."
        )
    return "\n".join(sentences)


def _details(results: Record) -> str:
    head = [
        "N × D",
        "threads",
        "rounds",
        "what",
        "ms (quartiles)",
        "× ours (quartiles)",
        "loss error",
        "gradient error",
    ]
    rows = []
    for record in results["cells"]:
        where = [f"{record['n']} × {record['d']}", str(record["threads"]), str(record["rounds"])]
        for name, c in record["contenders"].items():
            found = [f"{c['loss_error']:.1e}", f"{c['gradient_error']:.1e}"]
            rows.append([*where, TITLES[name], _spread(c["seconds"], 1e3), _spread(c["times_ours"]), *found])
        shapes = ", ".join(record["gemms"]["shapes"])
        rows.append([*where, f"torch.mm: {shapes}", _spread(record["gemms"]["seconds"], 1e3), "", "", ""])
    return _grid(head, rows)


def _names(records: list[Record]) -> list[str]:
    return list(records[0]["contenders"])


def _by_shape(records: Iterable[Record]) -> dict[str, list[Record]]:
    shapes: dict[str, list[Record]] = {}
    for record in records:
        shapes.setdefault(f"{record['n']} × {record['d']}", []).append(record)
    return shapes


def _threads(records: list[Record]) -> str:
    counts = [record["threads"] for record in records]
    return f"{' / '.join(map(str, counts))} thread{'s' if counts[-1] > 1 else ''}"


def _ms(seconds: Record) -> str:
    milliseconds = 1e3 * seconds["median"]
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _times(ratio: Record) -> str:
    return f"{_figure(ratio['median'])}×"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _spread(values: Record, unit: float = 1) -> str:
    median, q1, q3 = (f"{unit * values[key]:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def insert(readme: str, text: str) -> str:
    """``readme`` with ``text`` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md: expected the markers {BEGIN} and {END}, one after the other")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the figures of compare.py into the README.")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "compare.json")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    arguments = parser.parse_args()
    now = arguments.readme.read_text(encoding="utf-8")
    wanted = insert(now, summary(json.loads(arguments.results.read_text())))
    if not arguments.check:
        arguments.readme.write_text(wanted, encoding="utf-8")
    elif now != wanted:
        sys.exit(f"{arguments.readme} does not hold the figures of {arguments.results}: run python benches/table.py")


if __name__ == "__main__":
    main()
