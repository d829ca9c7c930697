"""The table of accuracies as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barlow_recipes.errors import require
from barlow_recipes.pictures import BLUE, GREEN, GREY, ORANGE, drawing
from barlow_recipes.small.data import CLASSES, COLUMNS, KNN, MOST, TASKS
from barlow_recipes.small.methods import FINE_TUNED, METHODS, PRETRAINED, RAW, SCRATCH, UNTRAINED
from barlow_recipes.small.tables import Figure, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT_GREY = "#c9c9c9"
COLORS = {RAW: LIGHT_GREY, UNTRAINED: GREY, SCRATCH: ORANGE, PRETRAINED: BLUE, FINE_TUNED: GREEN}
DARK = "#3c3c3c"
GROUP = 0.86  # the width of a group of bars, of 1
CHANCE = 100 / CLASSES
LABELS = {
    KNN: "nearest\nneighbours",
    "1": "1 label\na class",
    "10": "10 labels\na class",
    "1%": "1 %\nof labels",
    "10%": "10 %\nof labels",
    MOST: "most\nlabels",
}


def draw_accuracies(path: Path, results: Mapping[str, Any]) -> None:
    """One panel for each task, a group of bars for each number of labels, a colour for each method."""
    patches: Any = require("matplotlib.patches", "the picture")
    figures = summarize(results["rows"])
    tasks = [name for name in TASKS if any(task == name for task, _, _ in figures)]
    across, down = min(2, len(tasks)), -(-len(tasks) // 2)
    with drawing(path, (5.2 * across + (2.2 if across == 1 else 0), 3.1 * down + 0.6)) as figure:
        panels = [*figure.subplots(down, across, squeeze=False, sharey=True).flat]
        for axes, task in zip(panels, tasks, strict=False):
            _draw_task(axes, TASKS[task].title, {key[1:]: value for key, value in figures.items() if key[0] == task})
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        panels[0].text(0.005, CHANCE + 1.5, "chance", transform=panels[0].get_yaxis_transform(), fontsize=7, color=DARK)
        present = [method for method in METHODS if any(name == method for _, name, _ in figures)]
        handles = [patches.Patch(color=COLORS[method], label=method) for method in present]
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": len(present)}
        figure.legend(handles=handles, **place, handlelength=1.0, handletextpad=0.5, columnspacing=1.6)


def _draw_task(axes: "Axes", title: str, figures: Mapping[tuple[str, str], Figure]) -> None:
    columns = [column for column in COLUMNS if any(labels == column for _, labels in figures)]
    most = max(sum((method, column) in figures for method in METHODS) for column in columns)
    width = GROUP / max(4, most)
    for place, column in enumerate(columns):
        present = [method for method in METHODS if (method, column) in figures]
        for number, method in enumerate(present):
            _draw_bar(axes, place + (number - (len(present) - 1) / 2) * width, width, figures[method, column], method)
    axes.axhline(CHANCE, color=DARK, linestyle=":", linewidth=1, zorder=3)
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), [LABELS[column] for column in columns])
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelleft=True)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)


def _draw_bar(axes: "Axes", x: float, width: float, figure: Figure, method: str) -> None:
    spread = figure.spread or 0.0
    axes.bar(x, figure.mean, 0.92 * width, color=COLORS[method], zorder=2)
    if spread:
        axes.errorbar(x, figure.mean, spread, color=DARK, linewidth=1, capsize=1.5, zorder=3)
    above: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7, "zorder": 4}
    axes.text(x, figure.mean + spread + 0.8, f"{figure.mean:.0f}", color=DARK, **above)
