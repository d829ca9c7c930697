"""The accuracies of several seeds as a table: for people, for Markdown, for README.md."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from barlow_recipes.errors import UsageError
from barlow_recipes.small.data import COLUMNS, KNN, MOST, TASKS
from barlow_recipes.small.methods import METHODS, PRETRAINED, SCRATCH, UNTRAINED

BEGIN, END = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"
TITLES = {KNN: "10-NN", "1": "1 a class", "10": "10 a class", "1%": "1 %", "10%": "10 %", MOST: "most"}
Row = Mapping[str, Any]
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


def summarize(rows: Sequence[Row]) -> dict[Cell, Figure]:
    """The mean over the seeds of the mean over a seed's draws, and the spread over the seeds.

    Where training from scratch was tried with and without augmentation, the one with the better mean counts.
    """
    figures: dict[Cell, Figure] = {}
    for (*cell, augmented), seeds in _by_seed(rows).items():
        task, method, labels = cell
        spread = statistics.stdev(seeds.values()) if len(seeds) > 1 else None
        figure = Figure(statistics.fmean(seeds.values()), spread, len(seeds), augmented)
        known = figures.get((task, method, labels))
        figures[task, method, labels] = figure if known is None else max(known, figure, key=lambda each: each.mean)
    return figures


def _by_seed(rows: Sequence[Row]) -> dict[tuple[str, str, str, bool | None], dict[int, float]]:
    """The mean over the draws of every seed."""
    groups: dict[tuple[str, str, str, bool | None], dict[int, list[float]]] = {}
    for row in rows:
        key = row["task"], row["method"], row["labels"], row.get("augmented")
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row["accuracy"])
    return {key: {seed: statistics.fmean(found) for seed, found in seeds.items()} for key, seeds in groups.items()}


def markdown(results: Results) -> str:
    """The table, and in words what stands in it."""
    figures = summarize(results["rows"])
    columns = [column for column in COLUMNS if any(labels == column for _, _, labels in figures)]
    lines = [["", *(TITLES[column] for column in columns)], ["---", *("---:" for _ in columns)]]
    for task in TASKS:
        own = {(method, labels): figure for (name, method, labels), figure in figures.items() if name == task}
        if own:
            lines.append([f"**{TASKS[task].title}**", *("" for _ in columns)])
            lines += _lines(own, columns)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{sentences(results)}"


def _lines(figures: Mapping[tuple[str, str], Figure], columns: Sequence[str]) -> list[list[str]]:
    """A line for each method; the best of a column in bold."""
    best = {
        column: max(round(figure.mean, 1) for (_, labels), figure in figures.items() if labels == column)
        for column in {labels for _, labels in figures}
    }

    def cell(method: str, column: str) -> str:
        figure = figures.get((method, column))
        if figure is None:
            return "–"
        return f"**{figure}**" if round(figure.mean, 1) == best[column] else str(figure)

    present = [method for method in METHODS if any(name == method for name, _ in figures)]
    return [[method, *(cell(method, column) for column in columns)] for method in present]


def sentences(results: Results) -> str:
    """What the numbers are, where they come from, and what they took."""
    settings, environment = results["settings"], results["environment"]
    seeds, versions = settings["seeds"], environment["versions"]
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
    sizes = " and ".join(f"{size[MOST]:,} of {size['train']:,} {name}" for name, size in results["data"].items())
    epochs = " and ".join(f"{count} on {name}" for name, count in settings["epochs"].items())
    threads = environment["threads"]
    return "\n".join(
        (
            f"Percent of the test images, {spread} of weights, views and labels; the best in bold.",
            f"10-NN searches, and “most” are, {sizes}. Pixels and frozen encoders get a linear classifier.",
            _from_scratch(results["rows"]),
            f"Epochs of pretraining: {epochs}. All of it took {results['seconds'] / 60:.1f} minutes on "
            f"{environment['device']}, in {environment['processes']} processes of {threads} "
            f"thread{'s' * (threads != 1)}, with torch {versions['torch']}.",
        )
    )


def _from_scratch(rows: Sequence[Row]) -> str:
    """Where augmentation was the better, of the cells in which both were tried."""
    scratch = [row for row in rows if row["method"] == SCRATCH]
    tried: dict[Cell, set[bool]] = {}
    for row in scratch:
        tried.setdefault((row["task"], SCRATCH, row["labels"]), set()).add(row["augmented"])
    both = [cell for cell, kinds in tried.items() if len(kinds) == 2]
    better = sum(bool(summarize(scratch)[cell].augmented) for cell in both)
    text = (
        "From scratch, the same encoder learns from the same labels, with and without the augmentations of "
        f"pretraining: the better of the two counts, which is with them in {better} of {len(both)} cells"
    )
    others = len(tried) - len(both)
    return text + (f"; {others} more {'are' if others > 1 else 'is'} with them alone." if others else ".")


def margins(rows: Sequence[Row]) -> str:
    """How far the pretrained encoder is ahead where a few labels are used, in points, seed by seed."""
    found, lines = _by_seed(rows), []
    for (task, method, labels, _), accuracies in found.items():
        if method != PRETRAINED or labels in (KNN, MOST):
            continue
        others = {
            name + {True: " with augmentation", False: " without", None: ""}[augmented]: seeds
            for (where, name, count, augmented), seeds in found.items()
            if (where, count) == (task, labels) and name in (UNTRAINED, SCRATCH)
        }
        ahead = [
            f"{_difference([accuracies[seed] - value for seed, value in seeds.items()])} {name}"
            for name, seeds in others.items()
        ]
        lines.append(f"{TASKS[task].title}, {TITLES[labels]}: {', '.join(ahead)}")
    return "\n".join(lines)


def _difference(points: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
    return f"{statistics.fmean(points):+.1f}{spread} over"


def insert(readme: Path, now: str, text: str) -> str:
    """``now``, what the file holds, with ``text`` between the two markers.

    Raises:
        UsageError: the markers are not there.
    """
    before, found, rest = now.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise UsageError(f"--readme {readme}: expected the markers {BEGIN} and {END}, one after the other")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
