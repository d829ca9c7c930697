"""Turns the figures of compare.py and distributed.py into Markdown, and puts them into the README.

Each block of tables stands between two markers there. The figures come from results/compare.json and
results/distributed.json; those of the block on bytes are a model's, traffic.py.

    python benches/table.py                 rewrites them
    python benches/table.py --check         fails if they are not what the figures say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traffic
from baselines import COMPILED, LIGHTLY, OURS, TEXTBOOK
from workload import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable

    Record = dict[str, Any]

HERE = Path(__file__).parent
TITLES = {OURS: "barlow_loss", TEXTBOOK: "textbook", COMPILED: "torch.compile of it", LIGHTLY: "lightly"}
GPUS = (8, 16, 64, 256, 1024)
GPU_CELLS = (Cell(2048, 8192), Cell(4096, 32768))


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
    return _plain(1e3 * seconds["median"])


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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


def distributed_line(record: Record) -> str:
    """One cell of distributed.py, for the terminal."""
    ours, textbook = (record["contenders"][name] for name in (OURS, TEXTBOOK))
    return (
        f"{record['n']}×{record['d']}, {record['processes']} processes: {_ms(ours['seconds'])} ms; "
        f"textbook {_times(textbook['times_ours'])}, its floor {_times(record['floor']['times_ours'])}; "
        f"header {_ms(record['header']['seconds'])} ms; sent {_mb(ours)} and {_mb(textbook)} MB; "
        f"errors {ours['loss_error']:.0e} {ours['gradient_error']:.0e}, {record['rounds']} rounds"
    )


def distributed_summary(results: Record) -> str:
    """The table of distributed.py for the README."""
    head = [
        "N × D",
        "processes",
        "ours, ms",
        "textbook, × ours",
        "its products and all-reduce alone, × ours",
        "a rank sends, MB: ours",
        "textbook",
    ]
    rows = []
    for r in results["cells"]:
        ours, textbook = (r["contenders"][name] for name in (OURS, TEXTBOOK))
        ratios = [_times(textbook["times_ours"]), _times(r["floor"]["times_ours"])]
        sent = [_mb(ours), _mb(textbook)]
        rows.append([f"{r['n']} × {r['d']}", str(r["processes"]), _ms(ours["seconds"]), *ratios, *sent])
    return "\n\n".join((_setting(results), _grid(head, rows), _distributed_sentences(results["cells"])))


def _distributed_sentences(records: list[Record]) -> str:
    ours = [r["contenders"][OURS] for r in records]
    loss, gradient = (max(c[field] for c in ours) for field in ("loss_error", "gradient_error"))
    header = records[0]["header"]["seconds"]
    sentences = [
        "Each process has one thread; gloo over the loopback; the slowest rank's time; medians of per-round ratios.",
        f"Largest distance of ours to float64 in one process: loss {loss:.1e}, gradient {gradient:.1e}, relative, "
        "after DDP's mean over the ranks, which leaves the true gradient of ours, and 1/W of it of the textbook's.",
        f"The header takes {_ms(header)} ms of a step at {records[0]['processes']} processes.",
    ]
    counters = [c["sent"]["loopback"] / c["sent"]["collectives"] for c in ours if c["sent"]["loopback"]]
    if counters:
        low, high = min(counters), max(counters)
        sentences.append(
            f"The loopback's own counter shows {low:.3f} to {high:.3f} times the bytes that stand here for ours."
        )
    return "\n".join(sentences)


def distributed_markdown(results: Record) -> str:
    """The summary, and every figure with its spread."""
    head = ["N × D", "processes", "rounds", "what", "ms (quartiles)", "× ours (quartiles)"]
    head += ["loss error", "gradient error", "gradient, × true", "MB sent: by the collectives", "by the loopback"]
    rows = []
    for r in results["cells"]:
        where = [f"{r['n']} × {r['d']}", str(r["processes"]), str(r["rounds"])]
        for name, c in r["contenders"].items():
            found = [f"{c['loss_error']:.1e}", f"{c['gradient_error']:.1e}", f"{c['gradient_factor']:g}"]
            sent = [_mb(c), _mb(c, "loopback")]
            rows.append([*where, TITLES[name], _spread(c["seconds"], 1e3), _spread(c["times_ours"]), *found, *sent])
        floor, nothing = r["floor"], [""] * 5
        title = "textbook's products and all-reduce alone"
        rows.append([*where, title, _spread(floor["seconds"], 1e3), _spread(floor["times_ours"]), *nothing])
        rows.append([*where, "header of ours alone", _spread(r["header"]["seconds"], 1e3), "", *nothing])
    return f"{distributed_summary(results)}\n\n{_grid(head, rows)}\n"


def bytes_model() -> str:
    """What a step costs each of many GPUs, for the README: the model of traffic.py."""
    head = ["N × D", "GPUs", "all-reduce of C, MB", "ours, float32, MB", "ours, 16 bit, MB", "vectors in either, MB"]
    rows = [_gpu_row(cell, count) for cell in GPU_CELLS for count in GPUS]
    sentence = (
        "What each of W GPUs sends in a step, forward and backward, by ring algorithms: W − 1 times what it gives to a "
        "gather, 2 (W − 1)/W times a sum's size. It receives as much. The vectors of the textbook's batch norm are not "
        "counted."
    )
    return f"{sentence}\n\n{_grid([*head, 'textbook, GFLOP', 'ours, GFLOP'], rows)}"


def _gpu_row(cell: Cell, count: int) -> list[str]:
    textbook, ours, half = traffic.textbook(cell, count), traffic.dual(cell, count), traffic.dual(cell, count, 2)
    sent = [f"{cost.sent / 1e6:,.0f} ({100 * cost.sent / textbook.sent:.1f} %)" for cost in (ours, half)]
    flops = [_plain(cost.flops / 1e9) for cost in (textbook, ours)]
    shape = f"{cell.n} × {cell.d}"
    return [shape, str(count), _plain(textbook.sent / 1e6), *sent, f"{half.vectors / 1e6:.1f}", *flops]


def _mb(contender: Record, counted: str = "collectives") -> str:
    size: float | None = contender["sent"][counted]
    return "" if size is None else f"{size / 1e6:,.2f}"


def blocks(results: Path) -> dict[str, str]:
    """What stands in the README between the markers, by their name."""

    def figures(name: str) -> Record:
        record: Record = json.loads((results / f"{name}.json").read_text())
        return record

    return {
        "bench": summary(figures("compare")),
        "distributed": distributed_summary(figures("distributed")),
        "bytes": bytes_model(),
    }


def insert(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` between the markers ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"README.md: expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the figures of the benches into the README.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of the figures")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    arguments = parser.parse_args()
    now = arguments.readme.read_text(encoding="utf-8")
    wanted = now
    for name, text in blocks(arguments.results).items():
        wanted = insert(wanted, name, text)
    if not arguments.check:
        arguments.readme.write_text(wanted, encoding="utf-8")
    elif now != wanted:
        sys.exit(f"{arguments.readme} does not hold the figures of {arguments.results}: run python benches/table.py")


if __name__ == "__main__":
    main()
