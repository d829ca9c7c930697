"""The accuracies of several seeds as a table and as a picture: for people, for Markdown, for README.md."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from barlow_recipes.errors import require
from barlow_recipes.looking import BLUE, GREEN, GREY, ORANGE, drawing
from barlow_recipes.small.data import CLASSES, COLUMNS, KNN, MOST, TASKS
from barlow_recipes.small.methods import FINE_TUNED, METHODS, PRETRAINED, RAW, SCRATCH, UNTRAINED

TITLES = {KNN: "10-NN", "1": "1 a class", "10": "10 a class", "1%": "1 %", "10%": "10 %", MOST: "most"}
COLORS = {RAW: "#c9c9c9", UNTRAINED: GREY, SCRATCH: ORANGE, PRETRAINED: BLUE, FINE_TUNED: GREEN}
DARK = "#3c3c3c"
Results = Mapping[str, Any]  # of results.json


class Figure(NamedTuple):
    """An accuracy in percent over several seeds."""

    mean: float
    spread: float | None  # the standard deviation over the seeds, with n − 1; None of one seed
    seeds: int
    augmented: bool | None = None  # of training with labels: which is the better

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "")


Cell = tuple[str, str, str]  # task, method, labels


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, Figure]:
    """The mean over the seeds of the mean over a seed's draws, and the spread over the seeds.

    Where training from scratch was tried with and without augmentation, the one with the better mean counts.
    """
    groups: dict[tuple[Cell, bool | None], dict[int, list[float]]] = {}
    for row in rows:
        key = (row["task"], row["method"], row["labels"]), row.get("augmented")
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row["accuracy"])
    figures: dict[Cell, Figure] = {}
    for (cell, augmented), seeds in groups.items():
        values = [statistics.fmean(draws) for draws in seeds.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        figure = Figure(statistics.fmean(values), spread, len(values), augmented)
        figures[cell] = max(figures.get(cell, figure), figure, key=lambda each: each.mean)
    return figures


def _axes(cells: Iterable[Cell]) -> list[list[str]]:
    """The tasks, the methods and the columns that occur, each in its order."""
    known = zip((TASKS, METHODS, COLUMNS), map(set, zip(*cells, strict=True)), strict=True)
    return [[name for name in order if name in present] for order, present in known]


def markdown(results: Results) -> str:
    """The table, the best of a task and column in bold; and in words what stands in it."""
    figures = summarize(results["rows"])
    tasks, methods, columns = _axes(figures)
    lines = [["", *(TITLES[column] for column in columns)], ["---", *("---:" for _ in columns)]]
    for task in tasks:
        lines.append([f"**{TASKS[task].title}**", *("" for _ in columns)])
        own = {cell[1:]: figure for cell, figure in figures.items() if cell[0] == task}
        best = {
            c: max((round(figure.mean, 1) for (_, of), figure in own.items() if of == c), default=0) for c in columns
        }
        for method in methods:
            row = [own.get((method, column)) for column in columns]
            texts = [
                "–" if figure is None else f"**{figure}**" if round(figure.mean, 1) == best[column] else str(figure)
                for column, figure in zip(columns, row, strict=True)
            ]
            lines += [[method, *texts]] if any(row) else []
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{sentences(results)}"


def sentences(results: Results) -> str:
    """What the numbers are, where they come from, and what they took."""
    settings, environment = results["settings"], results["environment"]
    seeds, threads = settings["seeds"], environment["threads"]
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
    sizes = " and ".join(f"{size[MOST]:,} of {size['train']:,} {name}" for name, size in results["data"].items())
    epochs = " and ".join(f"{count} on {name}" for name, count in settings["epochs"].items())
    scratch = [row for row in results["rows"] if row["method"] == SCRATCH]
    alone = {(row["task"], SCRATCH, row["labels"]) for row in scratch if row["augmented"]}
    both = alone & {(row["task"], SCRATCH, row["labels"]) for row in scratch if not row["augmented"]}
    better, others = sum(bool(summarize(scratch)[cell].augmented) for cell in both), len(alone - both)
    more = f"; {others} more {'are' if others > 1 else 'is'} with them alone." if others else "."
    return "\n".join(
        (
            f"Percent of the test images, {spread} of weights, views and labels; the best in bold.",
            f"10-NN searches, and “most” are, {sizes}. Pixels and frozen encoders get a linear classifier.",
            "From scratch, the same encoder learns from the same labels, with and without the augmentations of "
            f"pretraining: the better of the two counts, which is with them in {better} of {len(both)} cells{more}",
            f"Epochs of pretraining: {epochs}. All of it took {results['seconds'] / 60:.1f} minutes on "
            f"{environment['device']}, in {environment['processes']} processes of {threads} "
            f"thread{'s' * (threads != 1)}, with torch {environment['versions']['torch']}.",
        )
    )


def draw_accuracies(path: Path, results: Results) -> None:
    """One panel for each task, a group of bars for each number of labels, a colour for each method."""
    patches: Any = require("matplotlib.patches", "the picture")
    figures = summarize(results["rows"])
    tasks, methods, _ = _axes(figures)
    across, down = min(2, len(tasks)), -(-len(tasks) // 2)
    with drawing(path, (5.2 * across + (2.2 if across == 1 else 0), 3.1 * down + 0.6)) as figure:
        panels = [*figure.subplots(down, across, squeeze=False, sharey=True).flat]
        for axes, task in zip(panels, tasks, strict=False):
            _draw_task(axes, {cell: value for cell, value in figures.items() if cell[0] == task})
            axes.set_title(TASKS[task].title)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        handles = [patches.Patch(color=COLORS[method], label=method) for method in methods]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(methods), handlelength=1.0)


def _draw_task(axes: Any, figures: Mapping[Cell, Figure]) -> None:
    (task,), methods, columns = _axes(figures)
    width = 0.86 / max(4, len(methods))
    for place, column in enumerate(columns):
        present = [method for method in methods if (task, method, column) in figures]
        for number, method in enumerate(present):
            x, bar = place + (number - (len(present) - 1) / 2) * width, figures[task, method, column]
            error = {"ecolor": DARK, "elinewidth": 1, "capsize": 1.5}
            bars = axes.bar(x, bar.mean, 0.92 * width, yerr=bar.spread or None, color=COLORS[method], error_kw=error)
            axes.bar_label(bars, fmt="%.0f", padding=1, fontsize=7, color=DARK)
    axes.axhline(100 / CLASSES, color=DARK, linestyle=":", linewidth=1)  # chance
    axes.set_xticks(range(len(columns)), [TITLES[column] for column in columns])
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
