"""Draws the results: how time and memory grow, and everybody beside ours in one cell. Ours stands out."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from baselines import OURS, OURS_COMPILED, PAPER
from plot_figures import COMPARISON, GROWTH, KEYWORD, digest, picture, pictures
from table_format import times

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from plot_figures import Bar, Line

    Record = dict[str, Any]

DOTS, COLOURS = 140, 256
LABEL_POINTS = 12.5  # from one label to the next

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
    "figure.facecolor": "white",
    "font.size": 9.5,
    "savefig.facecolor": "white",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def draw(results: Record, results_path: Path) -> list[Path]:
    """Draw the pictures of these results beside their file; returns where."""
    paths = []
    with mpl.rc_context(STYLE):
        for kind, figures in pictures(results).items():
            paths.append(picture(results_path, kind))
            _save(DRAWERS[kind](figures), paths[-1], digest(figures))
    return paths


def _save(figure: Figure, path: Path, drawn: str) -> None:
    """A PNG of few colours, a quarter as large as with all of them."""
    pixels, info = io.BytesIO(), PngInfo()
    figure.savefig(pixels, format="png", dpi=DOTS)
    info.add_text(KEYWORD, drawn)
    Image.open(pixels).convert("RGB").quantize(COLOURS).save(path, pnginfo=info, optimize=True)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def draw_growth(figures: Record) -> Figure:
    """Time against D above; time against N and memory against D below."""
    figure = _figure(9.2, 8.8)
    mosaic: Any = [["time by features"] * 2, ["time by samples", "memory by features"]]
    panels = figure.subplot_mosaic(mosaic, height_ratios=(1.1, 1))
    colours = _colours(figures)
    n, d = figures["n"], figures["d"]
    titles = (
        f"Time of a step, ms, at N = {n:,}",
        f"Time of a step, ms, at D = {d:,}",
        f"Working memory, MB, at N = {n:,}",
    )
    for key, title, letter, margin in zip(panels, titles, "DND", (0.24, 0.75, 0.75), strict=True):
        _draw_lines(panels[key], figures[key], colours, margin)
        panels[key].set_title(title)
        panels[key].set_xlabel({"D": "D, features", "N": "N, samples"}[letter])
    figure.draw_without_rendering()  # lays the panels out, so that their heights are known
    for key, letter, narrow in zip(panels, "DND", (False, True, True), strict=True):
        if figures[key]:
            _label_ends(panels[key], figures[key], colours, letter, at_the_right=narrow)
    return figure


def _colours(figures: Record) -> dict[str, str]:
    """A colour for each contender, the same in all panels."""
    found = (line.name for key in figures if " by " in key for line in figures[key])
    others = [name for name in dict.fromkeys(found) if name != OURS]
    return {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {OURS: BLUE}


def _is_ours(name: str) -> bool:
    return name in (OURS, OURS_COMPILED)


def _draw_lines(axes: Axes, lines: list[Line], colours: dict[str, str], margin: float) -> None:
    """Lines on logarithmic axes, which go on to the right for the names by so many times the lines' width."""
    if not lines:
        axes.set_visible(False)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for number, line in enumerate(lines):
        axes.plot(line.x, line.y, color=colours[line.name], marker="o", **_strength(line.name, number))
    xs, ys = sorted({x for line in lines for x in line.x}), [y for line in lines for y in line.y]
    axes.set_xticks(xs, [str(x) for x in xs], fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.set_xlim(xs[0] / 1.1, xs[-1] * (xs[-1] / xs[0]) ** margin)
    axes.set_ylim(min(ys) / 1.5, max(ys) * 2.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)


def _strength(name: str, number: int) -> dict[str, Any]:
    """Ours stands out; the others recede."""
    if name == OURS:
        return {"linewidth": 3.4, "markersize": 6.5, "zorder": 5}
    return {"linewidth": 1.4, "markersize": 3, "zorder": 3, "alpha": 0.8, "linestyle": DASHES[number % len(DASHES)]}


def _label_ends(axes: Axes, lines: list[Line], colours: dict[str, str], letter: str, *, at_the_right: bool) -> None:
    """Names right of the lines' ends, moved apart where lines meet, each with a thin line to its end.

    In a narrow panel all stand at its right: those of lines that end early would cover the longer ones.
    """
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    step = math.log(high / low) * LABEL_POINTS / points
    ends = {line.name: max(line.x[-1] for line in lines) if at_the_right else line.x[-1] for line in lines}
    for right in set(ends.values()):
        ending = sorted((line for line in lines if ends[line.name] == right), key=lambda line: line.y[-1])
        heights = _apart([math.log(line.y[-1]) for line in ending], step)
        for line, height in zip(ending, heights, strict=True):
            _label(axes, line, (right, math.exp(height)), colours[line.name], letter)


def _label(axes: Axes, line: Line, place: tuple[float, float], colour: str, letter: str) -> None:
    grows = "" if line.exponent is None else f"  ${letter}^{{{line.exponent:.1f}}}$"
    ours = line.name == OURS
    (right, height), (low, high) = place, axes.get_xlim()
    axes.annotate(
        f"{line.name}{grows}",
        xy=(line.x[-1], line.y[-1]),
        xytext=(right * (high / low) ** 0.02, height),
        textcoords="data",
        color=colour,
        fontsize=10.5 if ours else 9,
        fontweight="bold" if ours else "normal",
        va="center",
        annotation_clip=False,
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        },
    )


def _apart(wanted: list[float], step: float) -> list[float]:
    """Heights at least ``step`` apart, in the order of ``wanted`` and near to it: what is too close shares its mean.

    >>> _apart([0.0, 0.0, 9.0], 2.0)
    [-1.0, 1.0, 9.0]
    """
    groups: list[list[float]] = []  # of the wanted heights, each less the steps below it in its group
    for height in wanted:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], step) < _bottom(groups[-2], step) + len(groups[-2]) * step:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, step) + i * step for group in groups for i in range(len(group))]


def _bottom(group: list[float], step: float) -> float:
    """Where the lowest of a group stands that is centred on what its members want."""
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def draw_comparison(figures: Record) -> Figure:
    """Everybody's time and working memory over ours, in one cell, on either side of ours."""
    bars = sorted(figures["bars"], key=lambda bar: bar.median)
    figure = _figure(9.2, 0.34 * len(bars) + 1.5)
    left, right = figure.subplots(1, 2, sharey=True)
    where, base = f"{figures['n']} × {figures['d']}", figures["ours"]
    time, memory = [bar.median for bar in bars], [bar.memory for bar in bars]
    ends = [bar.q3 if bar.median >= 1 else bar.q1 for bar in bars]
    _draw_bars(left, bars, time, ends, f"Time of a step at {where}\nbarlow_loss: {base['ms']:.3g} ms")
    _draw_bars(right, bars, memory, memory, f"Working memory at {where}\nbarlow_loss: {base['MB']:.3g} MB")
    left.hlines(range(len(bars)), [bar.q1 for bar in bars], [bar.q3 for bar in bars], color=INK, linewidth=0.9)
    left.set_yticks(range(len(bars)), [bar.name for bar in bars])
    left.invert_yaxis()
    for label, bar in zip(left.get_yticklabels(), bars, strict=True):
        label.set_color(BLUE if _is_ours(bar.name) else INK)
        label.set_fontweight("bold" if bar.name == OURS else "normal")
        label.set_fontstyle("normal" if bar.definition == PAPER else "italic")
    others = " In italics: another loss than the paper's." if any(bar.definition != PAPER for bar in bars) else ""
    figure.supxlabel(f"Logarithmic scale; quartiles at the ends.{others}", fontsize=8.5, color=GREY)
    return figure


def _draw_bars(axes: Axes, bars: list[Bar], values: list[float], ends: list[float], title: str) -> None:
    """From ours, at 1×, to each value, on a logarithmic axis; the numbers stand beyond the ``ends``."""
    places = range(len(bars))
    axes.set_xscale("log")
    axes.barh(places, [value - 1 for value in values], left=1, color=[_bar_colour(bar) for bar in bars], height=0.7)
    axes.axvline(1, color=BLUE, linewidth=1.6)
    axes.plot(1, [bar.name for bar in bars].index(OURS), color=BLUE, marker="o", markersize=9)
    for place, bar, value, end in zip(places, bars, values, ends, strict=True):
        text = "1×" if bar.name == OURS else times(value)
        side = -1 if value < 1 else 1
        style: dict[str, Any] = {"va": "center", "ha": "left" if side > 0 else "right", "fontsize": 9, "color": INK}
        axes.annotate(text, (end, place), (8 * side, 0), textcoords="offset points", **style)
    low, high = min(1.0, *ends), max(1.0, *ends)
    room = max(high / low, 10) ** 0.24  # for the numbers at the bars' ends
    axes.set_xlim(low / room if low < 1 else low / room**0.2, high * room)
    axes.set_title(title)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([], [])
    axes.set_xticks([], minor=True)
    axes.spines[["left", "bottom"]].set_visible(False)


def _bar_colour(bar: Bar) -> str:
    return "#8fbfdd" if _is_ours(bar.name) else "#a6a6a6"


DRAWERS: dict[str, Callable[[Record], Figure]] = {GROWTH: draw_growth, COMPARISON: draw_comparison}
