"""Puts the results into README, docs, and the page and pictures beside them; or checks that they are what stands there.

Each block of a page stands between two markers. The figures are those of the newest file of results; those of the block
on bytes are a model's. A picture keeps in its PNG the SHA-256 of the figures that it was drawn from.

    python benches/render.py             takes over the newest results: blocks, and the pages and pictures beside them
    python benches/render.py --check     writes nothing; names what is not as the newest results that git tracks say
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
from contenders import DUAL, JOINT, OURS, OURS_COMPILED, PAPER, PRIMAL, RELAXED, TEXTBOOK, UNBIASED
from measure import RESULTS, cells, load, newest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from measure import Record

    Columns = dict[str, Callable[[Any], str]]
    Lines = dict[str, tuple[list[float], list[float], str]]  # x, y, and what the legend says

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/processes.md")  # of a repository, with markers for the blocks
NONE = "—"  # not measured
DEFINITIONS = {
    PAPER: "the paper's loss",
    UNBIASED: "unbiased deviation",
    JOINT: "statistics of both views together",
    RELAXED: "relaxed sum",
}
HIDDEN = (PRIMAL, DUAL)  # they tell where "auto" should change over, which the pages do not discuss
GAIN = {
    "textbook": (TEXTBOOK, model.TEXTBOOK),
    "textbook, torch.compile": ("textbook, torch.compile", model.COMPILED),
    "barlow_loss": (OURS, model.TRITON),
    "in a CUDA graph": ("", model.GRAPH),
}
SHOWN = (256, 8192)  # the cell of the README's table and picture
GPUS = (8, 16, 64, 256, 1024)
GPU_CELLS = cells("2048x8192", "4096x32768")


def table(records: Iterable[Any], columns: Columns) -> str:
    """A row for each of the records, by what stands in which column; the first to the left, the others to the right."""
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(record) for cell in columns.values()] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def details(records: Iterable[Record]) -> str:
    """Every figure of these records: a row for each contender, a column for each figure, quartiles in brackets."""
    rows: list[dict[str, str]] = []
    for record in records:
        where = _flat({key: value for key, value in record.items() if key != "contenders"})
        found = record.get("contenders", {"": {}})
        rows += [where | ({"contender": name} if name else {}) | _flat(own) for name, own in found.items()]
    heads = dict.fromkeys(key for row in rows for key in row)
    return table(rows, {head: lambda row, head=head: row.get(head, "") for head in heads})  # type: ignore[misc]


def _flat(record: Record, above: str = "") -> dict[str, str]:
    """The figures of a record as text, those of records in it by both names."""
    flat: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, dict) and "median" not in value:
            flat |= _flat(value, f"{above}{key}: ")
        else:
            flat[f"{above}{key}".replace("_", " ")] = _text(value)
    return flat


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return spread(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else " ".join(str(value).split())


def insert(page: str, name: str, text: str) -> str:
    """A page with ``text`` between its markers ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{text}\n{end}{after}"


def paragraphs(*texts: str) -> str:
    """Those that are not empty, an empty line between them."""
    return "\n\n".join(filter(None, texts))


def plain(value: float, digits: int = 3) -> str:
    """So many digits, and all of those before the point: 0.0123, 4.56, 78.9, 1,234."""
    return f"{value:,.0f}" if value >= 10**digits - 0.5 else f"{value:.{digits}g}"


def ms(found: Record) -> str:
    """The median of its seconds, in milliseconds."""
    return plain(1e3 * found["seconds"]["median"])


def times(found: Record) -> str:
    """A ratio as a factor: 0.43×, 5.6×, 78×."""
    return f"{plain(found['median'], 2)}×"


def percent(share: float) -> str:
    """A share of one: 0.07 %, 2.6 %, 47 %."""
    return f"{plain(100 * share, 2)} %"


def spread(values: Record) -> str:
    """Median, and quartiles in brackets."""
    median, q1, q3 = (f"{values[key]:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def shape(record: Record) -> str:
    """The cell of a record."""
    return f"{record['n']} × {record['d']}"


def _figure(name: str, read: Callable[[Record], str]) -> Callable[[Record], str]:
    """What is read off the contender ``name`` of a record."""
    return lambda record: read(record["contenders"][name]) if name in record["contenders"] else NONE


def _names(records: Iterable[Record]) -> list[str]:
    """The contenders of all ``records``, in the order in which they are first met."""
    found = dict.fromkeys(name for record in records for name in record["contenders"])
    return [name for name in found if name not in HIDDEN]


def setting(results: Record) -> str:
    """The machine, the versions, and the day."""
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"Forward and backward, float32, one thread, on {machine['cpu']} ({machine['instructions']}, cores: "
        f"{machine['cores']}), {machine['system']}, Python {machine['python']}, {versions}; {results['date']}."
    )


def gain(results: Record) -> str:
    """Time and memory of a step by the textbook and with ours, by device and mode."""
    on_gpu = results.get("gpu", {"cells": []})
    rows = [("one CPU thread, float32", cell, 0) for cell in results["cells"]]
    rows += [(f"{on_gpu['environment']['device']}, {cell['setting']}", cell, 1) for cell in on_gpu["cells"]]

    def cost(found: Record) -> str:
        size = found["working_bytes"] if "working_bytes" in found else found["peak_bytes"]
        return f"{ms(found)} ms, {plain(size / 1e6)} MB"

    columns: Columns = {f"{SHOWN[0]} × {SHOWN[1]}, forward and backward": lambda row: row[0]}
    for title, names in GAIN.items():
        columns[title] = lambda row, names=names: _figure(names[row[2]], cost)(row[1])  # type: ignore[misc]
    return table([row for row in rows if (row[1]["n"], row[1]["d"]) == SHOWN], columns)


def speed(results: Record) -> str:
    """Ours in milliseconds, the others in multiples of it; then the working memory of all."""
    found = sorted(results["cells"], key=lambda cell: (cell["n"], cell["d"]))
    names = _names(found)
    columns: Columns = {"N × D": shape, "algorithm": lambda cell: cell["algorithm"], "ours, ms": _figure(OURS, ms)}
    columns |= {name: _figure(name, lambda own: times(own["times_ours"])) for name in names if name != OURS}
    memory: Columns = {"working memory, MB": shape}
    memory |= {name: _figure(name, lambda own: plain(own["working_bytes"] / 1e6)) for name in names}
    # Where "auto" chose the dual, ours is there twice.
    twice = [c["contenders"][DUAL] for c in found if c["algorithm"] == "dual" and DUAL in c["contenders"]]
    noise = [own["times_ours"]["median"] for own in twice] or [1.0]
    said = f"Ours against itself in the same way: {min(noise):.2f} to {max(noise):.2f}×. {NONE}: not measured there."
    return paragraphs(setting(results), table(found, columns), said, table(found, memory))


def growth(results: Record) -> str:
    """Fitted exponents of time, and the largest D that a budget of memory holds."""
    features, samples, budget = (results["growth"][key] for key in ("features", "samples", "budget"))

    def of(found: Record, read: Callable[[Record], str]) -> Callable[[str], str]:
        return lambda name: _figure(name, read)(found)

    columns: Columns = {
        "": str,
        f"time grows as, in D (N = {features['n']})": of(features, lambda fit: f"D^{fit['exponent']:.2f}"),
        f"in N (D = {samples['d']})": of(samples, lambda fit: f"N^{fit['exponent']:.2f}"),
        f"largest D in {budget['bytes'] / 1e9:g} GB of working memory (N = {budget['n']})": of(
            budget, lambda own: f"{'' if own['measured'] else '≈ '}{own['features']:,}"
        ),
        "with inputs and gradients in it": of(budget, lambda own: f"≈ {own['features_in_all']:,}"),
    }
    return table(_names([features, samples, budget]), columns)


def exactness(results: Record) -> str:
    """The largest distance of each contender to float64: of its own function, and of the paper's where it differs."""
    found = {name: [c["contenders"].get(name) for c in results["cells"]] for name in _names(results["cells"])}
    measured = {name: list(filter(None, own)) for name, own in found.items()}

    def largest(read: Callable[[Record], float], others: bool = False) -> Callable[[str], str]:
        def cell(name: str) -> str:
            if others and measured[name][0]["definition"] == PAPER:
                return ""
            return f"{max(map(read, measured[name])):.1e}"

        return cell

    columns: Columns = {
        "": str,
        "computes": lambda name: DEFINITIONS[measured[name][0]["definition"]],
        "from its own float64: loss": largest(lambda own: own["error_of_own"]["loss"]),
        "gradient": largest(lambda own: own["error_of_own"]["gradient"]),
        "from the paper's: loss": largest(lambda own: own["loss_error"], others=True),
        "and gradient": largest(lambda own: own["gradient_error"], others=True),
    }
    return table(measured, columns)


def limits(results: Record) -> str:
    """Ours beside its matrix products alone, and beside what the machine's ceilings allow."""

    def part(name: str) -> Callable[[Record], str]:
        return lambda cell: percent(cell["parts"][name] / sum(cell["parts"].values()))

    columns: Columns = {
        "N × D": shape,
        "algorithm": lambda cell: cell["algorithm"],
        "ours, ms": ms,
        "its GEMMs alone, ms": lambda cell: ms(cell["gemms"]),
        "ours / GEMMs": lambda cell: f"{cell['ours_over_gemms']['median']:.2f}",
        "ours / model": lambda cell: f"{cell['seconds']['median'] / cell['model_seconds']:.2f}",
        "of the step: products": part("products"),
        "elementwise": part("elementwise"),
        "rest": part("rest"),
    }
    return table(results["limits"], columns)


def host(results: Record) -> str:
    """Small steps beside what they are measured against, and the operations of a step."""
    columns: Columns = {
        "a small step": lambda found: found["what"],
        "N × D": shape,
        "dtype": lambda found: found["dtype"],
        "ours, µs": lambda found: plain(1e6 * found["seconds"]["median"]),
        "beside": lambda found: found["reference"],
        "takes, µs": lambda found: plain(1e6 * found["reference_seconds"]["median"]),
        "ours / that": lambda found: times(found["over_reference"]),
    }
    section = results["host"]
    counts = " and ".join(f"{each['operations']} operations at {shape(each)}" for each in section["operations"])
    said = [f"In eager mode a step on the CPU dispatches {counts}, views among them."]
    said += [f"Not measured: {what}, because {reason}." for what, reason in section["left_out"].items()]
    return paragraphs(table(section["steps"], columns), " ".join(said))


def distributed(results: Record) -> str:
    """Time and bytes over several processes, and what becomes of everybody's answers there."""

    def sent(own: Record) -> str:
        return f"{own['sent']['collectives'] / 1e6:,.2f}"

    columns: Columns = {
        "N × D": shape,
        "processes": lambda cell: str(cell["processes"]),
        "ours, ms": _figure(OURS, ms),
        "textbook, × ours": _figure(TEXTBOOK, lambda own: times(own["times_ours"])),
        "its products and all-reduce alone, × ours": lambda cell: times(cell["floor"]["times_ours"]),
        "the header, ms": lambda cell: ms(cell["header"]),
        "a rank sends, MB: ours": _figure(OURS, sent),
        "textbook": _figure(TEXTBOOK, sent),
    }
    settings = results["distributed"]["exactness"]
    shards: Columns = {"loss error / gradient error / cosine": str}
    for each in settings:
        title = f"{each['processes']} processes: {' + '.join(map(str, each['rows']))}"
        shards[title] = lambda name, each=each: _figure(name, _shards)(each)  # type: ignore[misc]
    found = results["distributed"]["cells"]
    return paragraphs(setting(results), table(found, columns), table(_names(settings), shards))


def _shards(found: Record) -> str:
    if "refused" in found:
        return f"refuses: {' '.join(found['refused'].split())}".replace("|", "\\|")
    return f"{found['loss_error']:.1e} / {found['gradient_error']:.1e} / {found['gradient_cosine']:.4f}"


def bytes_on_gpus(results: Record) -> str:
    """What a step costs each of many GPUs, by the model."""
    costs = [
        (cell, count, model.sent_by_textbook(cell, count), *(model.sent_by_dual(cell, count, size) for size in (4, 2)))
        for cell in GPU_CELLS
        for count in GPUS
    ]
    columns: Columns = {
        "N × D": lambda row: f"{row[0].n} × {row[0].d}",
        "GPUs": lambda row: str(row[1]),
        "all-reduce of C, MB": lambda row: plain(row[2].sent / 1e6),
        "ours, float32, MB": lambda row: plain(row[3].sent / 1e6),
        "ours, 16 bit, MB": lambda row: plain(row[4].sent / 1e6),
        "vectors in either, MB": lambda row: plain(row[4].vectors / 1e6),
        "textbook, GFLOP": lambda row: plain(row[2].flops / 1e9),
        "ours, GFLOP": lambda row: plain(row[3].flops / 1e9),
    }
    return table(costs, columns)


def training(results: Record) -> str:
    """A whole step before and after the textbook loss is replaced by ours."""

    def share(name: str) -> Callable[[Record], str]:
        """What a step takes beyond the rest, which is a step with ours but for our loss; over the step."""
        return lambda record: percent(
            1 - (record["steps"][OURS] - record["losses"][OURS]["median"]) / record["steps"][name]
        )

    columns: Columns = {
        "": lambda record: record["what"],
        "pairs": lambda record: str(record["batch_size"]),
        "threads": lambda record: str(record["threads"]),
        "a step with the textbook, s": lambda record: plain(record["steps"][TEXTBOOK]),
        "with ours, s": lambda record: plain(record["steps"][OURS]),
        "speed-up": lambda record: f"{record['speed_up']:.2f}×",
        "the loss by itself, ms: textbook": lambda record: plain(1e3 * record["losses"][TEXTBOOK]["median"]),
        "ours": lambda record: plain(1e3 * record["losses"][OURS]["median"]),
        "share of the textbook's loss": share(TEXTBOOK),
        "share of ours": share(OURS),
    }
    return table(results["training"], columns)


GROWTH, COMPARISON = "growth", "comparison"
TITLES = {
    COMPARISON: "Time and working memory of each contender over those of barlow_loss",
    GROWTH: "Time against D and against N, and working memory against D, of each contender",
}
# By name: the section that a block stands on, what writes it, and the picture above it.
BLOCKS: dict[str, tuple[str, Callable[[Record], str], str]] = {
    "gain": ("cells", gain, COMPARISON),
    "bench": ("cells", speed, ""),
    "growth": ("growth", growth, GROWTH),
    "exactness": ("cells", exactness, ""),
    "limits": ("limits", limits, ""),
    "host": ("host", host, ""),
    "distributed": ("distributed", distributed, ""),
    "training": ("training", training, ""),
    "bytes": ("environment", bytes_on_gpus, ""),
}

KEYWORD = "figures-sha256"
NOT_DRAWN = {*HIDDEN, OURS_COMPILED}  # in the picture of growth, where its lines would cover those of ours
# Near to Okabe and Ito's colours, which the colour-blind can tell apart, dark enough for text on white.
BLUE, INK, GREY, LIGHT = "#0072B2", "#222222", "#6f6f6f", "#d9d9d9"
OTHERS = ("#C85200", "#007A5A", "#B0558A", "#857700", "#7B5EA7", "#666666", "#8C4A3C", "#A87000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
}


def picture(results_path: Path, kind: str) -> Path:
    """Where the picture of a file of results lies: beside it."""
    return results_path.with_name(f"{results_path.stem}-{kind}.png")


def digest(results: Record) -> str:
    """SHA-256 of what the pictures are drawn from."""
    shown = [results.get("cells"), results.get("growth")]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a PNG keeps, or None; a broken file has none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return str(image.info[KEYWORD]) if KEYWORD in image.info else None
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is no whole PNG
        return None


def draw(results: Record, results_path: Path) -> list[Path]:
    """Draw the pictures of these results beside their file; returns where. Needs matplotlib."""
    import matplotlib as mpl
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEYWORD, digest(results))
    with mpl.rc_context(STYLE):
        figures = {kind: DRAWERS[kind](results) for kind in drawable(results)}
        for kind, figure in figures.items():
            pixels = io.BytesIO()
            figure.savefig(pixels, dpi=140, bbox_inches="tight")
            few = Image.open(pixels).convert("RGB").quantize(256)  # colours: a quarter as large as with all of them
            few.save(picture(results_path, kind), pnginfo=info, optimize=True)
    return [picture(results_path, kind) for kind in figures]


def drawable(results: Record) -> list[str]:
    """The pictures that these results have the figures for."""
    return [kind for kind, section in ((GROWTH, "growth"), (COMPARISON, "cells")) if results.get(section)]


def draw_growth(results: Record) -> Figure:
    """Time against D and against N, and memory against D."""
    from matplotlib.figure import Figure

    features, samples = results["growth"]["features"], results["growth"]["samples"]
    at_n, at_d = f"\nat N = {features['n']:,}", f"\nat D = {samples['d']:,}"
    panels: list[tuple[str, str, Lines]] = [
        (f"Time of a step, ms,{at_n}", "D, features", _fitted(features, "d")),
        (f"Time of a step, ms,{at_d}", "N, samples", _fitted(samples, "n")),
        (f"Memory, MB,{at_n}", "D, features", _memory(results.get("cells", []), features["n"])),
    ]
    names = [name for name in dict.fromkeys(name for *_, lines in panels for name in lines) if name != OURS]
    styles: dict[str, Any] = {
        name: {"color": OTHERS[i % len(OTHERS)], "linestyle": DASHES[i % len(DASHES)], "markersize": 3}
        for i, name in enumerate(names)
    }
    styles[OURS] = {"color": BLUE, "linewidth": 3.4, "markersize": 6.5, "zorder": 5}
    figure = Figure(figsize=(9.2, 6.6), layout="constrained")
    for axes, (title, label, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set(title=title, xlabel=label)
        _draw_lines(axes, lines, styles)
    return figure


def _fitted(line: Record, axis: str) -> Lines:
    return {
        name: (fit[axis], [1e3 * s for s in fit["seconds"]], f"${axis.upper()}^{{{fit['exponent']:.1f}}}$")
        for name, fit in line["contenders"].items()
        if name not in NOT_DRAWN
    }


def _memory(found: list[Record], n: int) -> Lines:
    lines: Lines = {}
    for cell in sorted((cell for cell in found if cell["n"] == n), key=lambda cell: int(cell["d"])):
        for name in cell["contenders"].keys() - NOT_DRAWN:
            x, y, _ = lines.setdefault(name, ([], [], ""))
            x.append(cell["d"])
            y.append(cell["contenders"][name]["working_bytes"] / 1e6)
    return {name: line for name, line in lines.items() if len(line[0]) > 1}


def _draw_lines(axes: Axes, lines: Lines, styles: dict[str, Any]) -> None:
    """Lines on logarithmic axes, and under them their names and exponents, the costliest first."""
    axes.set_visible(bool(lines))
    if not lines:
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name in sorted(lines, key=lambda name: -lines[name][1][-1]):
        x, y, exponent = lines[name]
        axes.plot(x, y, marker="o", label=f"{name}  {exponent}", **styles[name])
    xs = sorted({x for line in lines.values() for x in line[0]})
    axes.set_xticks(xs, [str(x) for x in xs], rotation=45)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    for text in axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.26)).get_texts():
        if text.get_text().split("  ")[0] == OURS:
            text.set(color=BLUE, fontweight="bold")


def compared(results: Record) -> Record:
    """The cell of the picture of the comparison: 256 × 8192, or the largest where most were measured."""
    found: Record = max(
        results["cells"], key=lambda cell: ((cell["n"], cell["d"]) == SHOWN, len(cell["contenders"]), cell["d"])
    )
    return found


def draw_comparison(results: Record) -> Figure:
    """Everybody's time and working memory over ours, in one cell, on either side of ours."""
    from matplotlib.figure import Figure

    cell = compared(results)
    found, ours = cell["contenders"], cell["contenders"][OURS]
    names = sorted(_names([cell]), key=lambda name: float(found[name]["times_ours"]["median"]))
    figure = Figure(figsize=(9.2, 0.34 * len(names) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_bars(left, names, [found[name]["times_ours"]["median"] for name in names])
    _draw_bars(right, names, [found[name]["working_bytes"] / ours["working_bytes"] for name in names])
    left.set_title(f"Time of a step at {shape(cell)}\n{OURS}: {ms(ours)} ms")
    right.set_title(f"Working memory at {shape(cell)}\n{OURS}: {plain(ours['working_bytes'] / 1e6)} MB")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for label, name in zip(left.get_yticklabels(), names, strict=True):
        label.set_color(BLUE if name in (OURS, OURS_COMPILED) else INK)
        label.set_fontstyle("normal" if found[name]["definition"] == PAPER else "italic")
    figure.supxlabel("Logarithmic scale. In italics: another loss than the paper's.", fontsize=8.5, color=GREY)
    return figure


def _draw_bars(axes: Axes, names: Sequence[str], values: list[float]) -> None:
    """From ours, at 1×, to each value, on a logarithmic axis; the numbers stand at the ends."""
    colours = ["#8fbfdd" if name in (OURS, OURS_COMPILED) else "#a6a6a6" for name in names]
    axes.set_xscale("log")
    bars = axes.barh(range(len(names)), [value - 1 for value in values], left=1, color=colours, height=0.7)
    axes.bar_label(bars, [f"{plain(value, 2)}×" for value in values], padding=6, color=INK)
    axes.axvline(1, color=BLUE, linewidth=1.6)
    room = max(max(values) / min(values), 10) ** 0.24  # for the numbers at the bars' ends
    axes.set_xlim(min(1.0, *values) / room, max(1.0, *values) * room)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([], [])
    axes.set_xticks([], minor=True)
    axes.spines[["left", "bottom"]].set_visible(False)


DRAWERS = {GROWTH: draw_growth, COMPARISON: draw_comparison}


def image(results: Record, results_path: Path, kind: str, folder: Path) -> str:
    """The Markdown that shows a picture in a page of ``folder``, if these results have it."""
    path = Path(os.path.relpath(picture(results_path, kind), folder)).as_posix()
    return f"![{TITLES[kind]}]({path})" if kind in drawable(results) else ""


def page(results: Record, results_path: Path) -> str:
    """The page beside the results: all figures, with quartiles."""
    parts = ["# Benches", setting(results)]
    parts += [image(results, results_path, kind, results_path.parent) for kind in TITLES]
    for section in dict.fromkeys(section for section, *_ in BLOCKS.values() if section != "environment"):
        found = results.get(section, [])
        tables = {section: found} if isinstance(found, list) else {f"{section}: {key}": found[key] for key in found}
        for title, records in tables.items():
            listed = [records] if isinstance(records, dict) else records
            parts += [f"## {title}", details(listed)] if any(listed) else []
    return paragraphs(*parts) + "\n"


def blocks(results: Record, results_path: Path, folder: Path) -> dict[str, str]:
    """What stands in the pages of ``folder`` between the markers, by their name."""
    absent = f"Not among the results of {results['date']}."
    return {
        name: paragraphs(kind and image(results, results_path, kind, folder), write(results))
        if results.get(section)
        else absent
        for name, (section, write, kind) in BLOCKS.items()
    }


def pages(results_path: Path, root: Path) -> dict[Path, str]:
    """What is to stand in every page.

    Raises:
        SystemExit: no page has a place for a block with figures.
    """
    results, on_gpu = load(results_path), results_path.with_name("gpu.json")
    found = {results_path.with_suffix(".md"): page(results, results_path)}
    results |= {"gpu": load(on_gpu)} if on_gpu.exists() else {}
    sought = {name for name, (section, *_) in BLOCKS.items() if results.get(section)}
    for path in [root / name for name in PAGES if (root / name).exists()]:
        text = path.read_text(encoding="utf-8")
        for name, block in blocks(results, results_path, path.parent).items():
            if f"<!-- {name}:begin -->" in text:
                sought.discard(name)
                text = insert(text, name, block)
        found[path] = text
    if sought:
        raise SystemExit(f"expected <!-- {min(sought)}:begin --> and its end in one of {', '.join(PAGES)}, found none")
    return found


def other_pages() -> dict[Path, str]:
    """What the pages of a GPU, of the relatives and of more views are to say."""
    import gpu
    import relatives

    found = {RESULTS / "gpu.md": gpu.markdown(load(RESULTS / "gpu.json"))}
    for name in relatives.TABLES:
        path = relatives.DOCS / f"{name}.md"
        if path.exists():  # no part of a source distribution
            found[path] = relatives.page_with(name, load(path.with_suffix(".json")))
    return found


def stale(wanted: dict[Path, str], results_path: Path) -> list[str]:
    """What does not say what the results say: pages, and pictures."""
    found = [
        f"{path.name}: does not hold the figures of {path.stem if 'json' in path.suffixes else 'the results'}"
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    return found + stale_pictures(results_path)


def stale_pictures(results_path: Path) -> list[str]:
    """Those that were drawn from other figures, or not at all."""
    results = load(results_path)
    paths = [picture(results_path, kind) for kind in drawable(results)]
    return [
        f"{path.name}: expected a picture of the figures of {results_path.name}"
        for path in paths
        if not path.exists() or drawn_from(path) != digest(results)
    ]


def beside(results_path: Path) -> list[Path]:
    """Writes the page and draws the pictures beside a file of results; returns where."""
    results, text = load(results_path), results_path.with_suffix(".md")
    text.write_text(page(results, results_path), encoding="utf-8")
    return [text, *draw(results, results_path)]


def main(flags: Sequence[str] | None = None) -> None:
    """The program; ``flags`` in place of those of the command line."""
    parser = argparse.ArgumentParser(description="Put the figures of the benches into README and documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    checking = parser.parse_args(flags).check
    results_path = newest(committed=checking)
    wanted = pages(results_path, ROOT) | other_pages()
    if not checking:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        if stale_pictures(results_path):
            draw(load(results_path), results_path)
    elif found := stale(wanted, results_path):
        sys.exit("\n".join([*found, "Run python benches/render.py"]))


if __name__ == "__main__":
    main()
