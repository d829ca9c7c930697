"""Numbers as people read them: the table of accuracies, the progress bar, the line of an epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

# Of tqdm's bar: with what `progress` says in at most 100 columns, also in a run of millions of steps and many days.
BAR = "{bar} {n_fmt}/{total_fmt} [{remaining}{postfix}]"


def accuracies_of(row: Mapping[str, Any]) -> list[str]:
    """The names of the accuracies in a row, in their order."""
    return [name for name in row if name == "knn" or name.startswith("linear_")]


def label_of(accuracy: str) -> str:
    """How an accuracy is called where people read it."""
    size = accuracy.removeprefix("linear_")
    if size.isdigit():
        return f"{size} label{'s' * (size != '1')}/class"
    return {"knn": "10-NN", "linear_all": "all labels"}[accuracy]


def accuracy_cells(rows: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """What :func:`probes.evaluate` returned for each representation, as the cells of a table with a head."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in accuracies_of(row)))
    lines = [[label, *(_percent(row.get(name)) for name in columns)] for label, row in rows.items()]
    return [["", *map(label_of, columns)], *lines]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """The cells of a table with a head, in columns; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def progress(row: Mapping[str, float]) -> str:
    """What the progress bar says of a step: at most 70 columns."""
    names = {"loss": "loss", "on_diagonal": "on-diag", "off_diagonal": "off-diag", "effective_rank": "rank"}
    parts = [f"{label} {_short(row[name])}" for name, label in names.items()]
    return ", ".join([*parts, f"{row['images_per_second']:,.0f} img/s"])


def _short(value: float) -> str:
    """Four digits, and a letter for the thousands of what has more: 54.57, 1342, 15.59k, 2.123M."""
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """What stays on the terminal of an epoch."""
    accuracies = [f"{label_of(name)} {row[name]:.1f} %" for name in accuracies_of(row)]
    speed = f"{row['images_per_second']:,.0f} images/s"
    count = row["unreadable"]
    unreadable = [f"{count} unreadable image{'s' * (count > 1)} replaced"] if count else []
    return f"epoch {row['epoch']}/{epochs}: " + ", ".join([*accuracies, speed, *unreadable])
