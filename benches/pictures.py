"""The pictures of the results: how time and memory grow, and everybody beside ours in one cell. Ours stands out.

Each keeps in its PNG the SHA-256 of the figures that it shows, so that a stale one can be told without drawing it anew.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from contenders import FULL_ONLY, OURS, OURS_COMPILED, PAPER
from tables import times

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from machine import Record

GROWTH, COMPARISON = "growth", "comparison"
SHOWN = (256, 8192)  # the cell of the comparison
NOT_DRAWN = (*FULL_ONLY, OURS_COMPILED)  # in the picture of growth, where its lines would cover those of ours

KEYWORD = "figures-sha256"
DOTS, COLOURS = 140, 256

# Near to Okabe and Ito's colours, which the colour-blind can tell apart, dark enough for text on white.
BLUE, INK, GREY, LIGHT = "#0072B2", "#222222", "#6f6f6f", "#d9d9d9"
OTHERS = ("#C85200", "#007A5A", "#B0558A", "#857700", "#7B5EA7", "#666666", "#8C4A3C", "#A87000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelspacing": 0.35,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


class Line(NamedTuple):
    """A contender's figures along an axis, and the exponent fitted to them where there is one."""

    name: str
    x: list[float]
    y: list[float]
    exponent: float | None


def pictures(results: Record) -> dict[str, Record]:
    """The figures of each picture that these results have, by the end of its name."""
    figures = {GROWTH: growth_figures(results), COMPARISON: comparison_figures(results)}
    return {kind: found for kind, found in figures.items() if found}


def growth_figures(results: Record) -> Record:
    """What the picture of growth shows; empty where it was not measured."""
    found = results.get("growth")
    if not found:
        return {}
    n, d = found["features"]["n"], found["samples"]["d"]
    return {
        "n": n,
        "d": d,
        "time by features": _fits(found["features"], "d"),
        "time by samples": _fits(found["samples"], "n"),
        "memory by features": _memory([cell for cell in results.get("cells", []) if cell["n"] == n]),
    }


def _fits(line: Record, axis: str) -> list[Line]:
    return [
        Line(name, fit[axis], [1e3 * s for s in fit["seconds"]], fit["exponent"])
        for name, fit in line["contenders"].items()
        if name not in NOT_DRAWN
    ]


def _memory(cells: list[Record]) -> list[Line]:
    points: dict[str, dict[float, float]] = {}
    for cell in cells:
        for name, contender in cell["contenders"].items():
            points.setdefault(name, {})[cell["d"]] = contender["working_bytes"] / 1e6
    return [
        Line(name, sorted(at), [at[d] for d in sorted(at)], None)
        for name, at in points.items()
        if len(at) > 1 and name not in NOT_DRAWN
    ]


def comparison_figures(results: Record) -> Record:
    """What the picture of the comparison shows: the cell 256 × 8192, or the largest where most were measured."""
    return max(
        results.get("cells", []),
        key=lambda cell: ((cell["n"], cell["d"]) == SHOWN, len(cell["contenders"]), cell["d"], -cell["threads"]),
        default={},
    )


def picture(results_path: Path, kind: str) -> Path:
    """Where the picture of a file of results lies: beside it."""
    return results_path.with_name(f"{results_path.stem}-{kind}.png")


def digest(figures: Record) -> str:
    """SHA-256 of what a picture shows."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a PNG keeps, or None; a broken file has none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            found = image.info.get(KEYWORD)
            return str(found) if found else None
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is no whole PNG
        return None


def draw(results: Record, results_path: Path) -> list[Path]:
    """Draw the pictures of these results beside their file; returns where. Needs matplotlib."""
    import matplotlib as mpl

    drawers = {GROWTH: draw_growth, COMPARISON: draw_comparison}
    with mpl.rc_context(STYLE):
        found = pictures(results)
        return [_save(drawers[kind](figures), picture(results_path, kind), figures) for kind, figures in found.items()]


def _save(figure: Figure, path: Path, shown: Record) -> Path:
    """A PNG of few colours, a quarter as large as with all of them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels, info = io.BytesIO(), PngInfo()
    figure.savefig(pixels, format="png", dpi=DOTS, facecolor="white", bbox_inches="tight")
    info.add_text(KEYWORD, digest(shown))
    Image.open(pixels).convert("RGB").quantize(COLOURS).save(path, pnginfo=info, optimize=True)
    return path


def draw_growth(figures: Record) -> Figure:
    """Time against D and against N, and memory against D."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 6.6), layout="constrained")
    panels = figure.subplots(1, 3)
    colours, n, d = colours_of(figures), figures["n"], figures["d"]
    titles = (f"Time of a step, ms,\nat N = {n:,}", f"Time of a step, ms,\nat D = {d:,}", f"Memory, MB,\nat N = {n:,}")
    kinds = "time by features", "time by samples", "memory by features"
    for axes, kind, title, letter in zip(panels, kinds, titles, "DND", strict=True):
        axes.set(title=title, xlabel={"D": "D, features", "N": "N, samples"}[letter])
        _draw_lines(axes, figures[kind], colours, letter)
    return figure


def colours_of(figures: Record) -> dict[str, str]:
    """A colour for each contender, the same in all panels."""
    found = (line.name for key in figures if " by " in key for line in figures[key])
    others = [name for name in dict.fromkeys(found) if name != OURS]
    return {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {OURS: BLUE}


def _draw_lines(axes: Axes, lines: list[Line], colours: dict[str, str], letter: str) -> None:
    """Lines on logarithmic axes, and under them their names and exponents, the costliest first."""
    if not lines:
        axes.set_visible(False)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for line in sorted(lines, key=lambda line: -line.y[-1]):
        grows = "" if line.exponent is None else f"  ${letter}^{{{line.exponent:.1f}}}$"
        dashes = DASHES[list(colours).index(line.name) % len(DASHES)]
        style: dict[str, Any] = {"linewidth": 1.4, "markersize": 3, "linestyle": dashes}
        if line.name == OURS:
            style = {"linewidth": 3.4, "markersize": 6.5, "zorder": 5}
        axes.plot(line.x, line.y, color=colours[line.name], marker="o", label=f"{line.name}{grows}", **style)
    xs = sorted({x for line in lines for x in line.x})
    axes.set_xticks(xs, [str(x) for x in xs], rotation=45)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.26))
    for text in legend.get_texts():
        if text.get_text().split("  ")[0] == OURS:
            text.set(color=BLUE, fontweight="bold")


def draw_comparison(cell: Record) -> Figure:
    """Everybody's time and working memory over ours, in one cell, on either side of ours."""
    from matplotlib.figure import Figure

    ours, found = cell["contenders"][OURS], {n: c for n, c in cell["contenders"].items() if n not in FULL_ONLY}
    names = sorted(found, key=lambda name: float(found[name]["times_ours"]["median"]))
    figure = Figure(figsize=(9.2, 0.34 * len(names) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    median, q1, q3 = ([found[name]["times_ours"][key] for name in names] for key in ("median", "q1", "q3"))
    memory = [found[name]["working_bytes"] / ours["working_bytes"] for name in names]
    where, time = f"{cell['n']} × {cell['d']}", 1e3 * ours["seconds"]["median"]
    ends = [high if middle >= 1 else low for low, middle, high in zip(q1, median, q3, strict=True)]
    _draw_bars(left, names, median, ends)
    _draw_bars(right, names, memory, memory)
    left.set_title(f"Time of a step at {where}\n{OURS}: {time:.3g} ms")
    right.set_title(f"Working memory at {where}\n{OURS}: {ours['working_bytes'] / 1e6:.3g} MB")
    left.hlines(range(len(names)), q1, q3, color=INK, linewidth=0.9)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for label, name in zip(left.get_yticklabels(), names, strict=True):
        label.set_color(BLUE if name in (OURS, OURS_COMPILED) else INK)
        label.set_fontweight("bold" if name == OURS else "normal")
        label.set_fontstyle("normal" if found[name]["definition"] == PAPER else "italic")
    others = any(found[name]["definition"] != PAPER for name in names)
    note = "Logarithmic scale; quartiles at the ends." + " In italics: another loss than the paper's." * others
    figure.supxlabel(note, fontsize=8.5, color=GREY)
    return figure


def _draw_bars(axes: Axes, names: list[str], values: list[float], ends: list[float]) -> None:
    """From ours, at 1×, to each value, on a logarithmic axis; the numbers stand beyond the ``ends``."""
    places = range(len(names))
    colours = ["#8fbfdd" if name in (OURS, OURS_COMPILED) else "#a6a6a6" for name in names]
    axes.set_xscale("log")
    axes.barh(places, [value - 1 for value in values], left=1, color=colours, height=0.7)
    axes.axvline(1, color=BLUE, linewidth=1.6)
    axes.plot(1, names.index(OURS), color=BLUE, marker="o", markersize=9)
    for place, name, value, end in zip(places, names, values, ends, strict=True):
        side, align = (-8, "right") if value < 1 else (8, "left")
        text = "1×" if name == OURS else times(value)
        axes.annotate(text, (end, place), (side, 0), textcoords="offset points", va="center", ha=align, color=INK)
    low, high = min(1.0, *ends), max(1.0, *ends)
    room = max(high / low, 10) ** 0.24  # for the numbers at the bars' ends
    axes.set_xlim(low / room if low < 1 else low / room**0.2, high * room)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([], [])
    axes.set_xticks([], minor=True)
    axes.spines[["left", "bottom"]].set_visible(False)
