"""The run as pictures: its curves, and the cross-correlation matrix before and after."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from barlow_recipes.errors import require
from barlow_recipes.reporting import Row, accuracies_of, label_of, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1722c", "#3a8f5c", "#8a8a8a"
STYLES = ("--", ":")  # of the baselines
MOST_POINTS, MOST_MARKERS = 2000, 40  # of a curve: more points than the picture has pixels
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.fontsize": 9,
    "grid.alpha": 0.3,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
}


def draw_curves(
    path: Path,
    steps: Sequence[Row],
    epochs: Sequence[Row],
    *,
    lambd: float,
    noise_floor: float,
    attainable_rank: int,
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """Loss, its two terms beside the noise floor, effective rank, the probes, learning rate and gradient norm.

    Args:
        path: of the PNG.
        steps: rows with step, loss, on_diagonal, off_diagonal, effective_rank, and where known learning_rate and
            gradient_norm. Of thousands some are drawn.
        epochs: rows with step and the accuracies of the monitor, if there is one.
        lambd: λ, which weighs the off-diagonal in the picture as in the loss.
        noise_floor: D(D − 1)/(N − 1).
        attainable_rank: min(N − 1, D).
        baselines: the monitor's accuracies of other representations.
    """
    steps = _thinned(steps)
    looks = _thinned([row for row in epochs if "knn" in row])
    x = [row["step"] for row in steps]

    def curve(axes: "Axes", name: str, color: str, label: str = "", factor: float = 1.0) -> list[float]:
        values = [math.nan if row.get(name) is None else factor * row[name] for row in steps]
        axes.plot(x, values, color=color, label=label, linewidth=1.6, marker="o" if len(x) == 1 else "")
        return values

    below = ["rate", "norm"] if any("gradient_norm" in row for row in steps) else ["rate", "rate"]
    layout: list[Any] = [["loss", "terms"], ["rank", "probe"] if looks else ["rank", "rank"], below]
    with drawing(path, (10, 8)) as figure:
        panels = figure.subplot_mosaic(layout, height_ratios=(3, 3, 1.4))
        panels["loss"].set_title("Loss")
        _make_logarithmic(panels["loss"], curve(panels["loss"], "loss", BLUE))
        panels["terms"].set_title("Its two terms")
        terms = curve(panels["terms"], "on_diagonal", BLUE, r"on-diagonal  $\sum_i (C_{ii} - 1)^2$")
        off_diagonal = r"$\lambda$ · off-diagonal  $\sum_{i \neq j} C_{ij}^2$"
        terms += curve(panels["terms"], "off_diagonal", ORANGE, off_diagonal, lambd)
        floor = lambd * noise_floor
        panels["terms"].axhline(floor, color=ORANGE, linestyle=":", label="its noise floor: random embeddings")
        panels["terms"].margins(y=0.15)
        panels["terms"].legend()
        _make_logarithmic(panels["terms"], [*terms, floor])
        panels["rank"].set_title(f"Effective rank (at most {attainable_rank:,})")
        curve(panels["rank"], "effective_rank", GREEN)
        panels["rank"].set_ylim(bottom=0)
        if looks:
            _draw_accuracies(panels["probe"], looks, baselines)
        panels["rate"].set_title("Learning rate")
        curve(panels["rate"], "learning_rate", GREY)
        if "norm" in panels:
            panels["norm"].set_title("Norm of the gradient")
            _make_logarithmic(panels["norm"], curve(panels["norm"], "gradient_norm", GREY))
        for axes in panels.values():
            _number_steps(axes, max([1, *x, *(row["step"] for row in looks)]))


def _thinned(rows: Sequence[Row]) -> Sequence[Row]:
    """At most a picture's worth of rows, evenly spaced, with the last."""
    stride = -(-len(rows) // MOST_POINTS) or 1
    return rows[::-1][::stride][::-1]


def _number_steps(axes: "Axes", last: int) -> None:
    """A horizontal axis of whole steps: 0, 100, 200, ... or 0, 100k, 200k, ..."""
    ticker: Any = require("matplotlib.ticker", "drawing the curves")
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7, integer=True, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _make_logarithmic(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic vertical axis with plain numbers, as many of 1, 1.5, 2, 3, 5, 7, 10, ... as the values leave room.

    Without a positive value it stays linear.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return
    decades = math.log10(max(positive) / min(positive))
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    ticker: Any = require("matplotlib.ticker", "drawing the curves")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _draw_accuracies(axes: "Axes", looks: Sequence[Row], baselines: Mapping[str, Mapping[str, float]]) -> None:
    """The nearest neighbours and the linear probe with the most labels, each beside its baselines."""
    names = accuracies_of(looks[-1])
    for name, color in zip(dict.fromkeys(["knn", names[-1]]), (BLUE, ORANGE), strict=False):
        start = [{"step": 0, **accuracies} for label, accuracies in baselines.items() if label == "untrained encoder"]
        points = [(row["step"], row[name]) for row in (*start, *looks) if name in row]
        marker = "o" if len(points) <= MOST_MARKERS else ""
        axes.plot(*zip(*points, strict=True), marker=marker, color=color, markersize=3, label=label_of(name))
        for accuracies, style in zip(baselines.values(), STYLES, strict=True):
            axes.axhline(accuracies[name], color=color, linestyle=style, linewidth=1)
    for label, style in zip(baselines, STYLES, strict=True):
        axes.plot([], [], color=GREY, linestyle=style, linewidth=1, label=label)
    axes.set_title("Held-out accuracy (%)")
    axes.set_ylim(0, 102)
    axes.legend(ncols=2)


def draw_cross_correlation(path: Path, before: Tensor, after: Tensor, step: int) -> None:
    """The cross-correlation (D, D) before and after so many steps on one diverging scale: −1 is blue, 1 is red."""
    with drawing(path, (10, 4.8)) as figure:
        panels = figure.subplots(1, 2)
        titles = ("Before pretraining", f"After step {step:,}")
        for axes, matrix, title in zip(panels, (before, after), titles, strict=True):
            picture = axes.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title)
            axes.set_xlabel("feature of view 2")
            axes.grid(False)
        panels[0].set_ylabel("feature of view 1")
        bar = figure.colorbar(picture, ax=list(panels), shrink=0.85, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.set_label(r"cross-correlation $C_{ij}$")


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure to draw into, in this file's style; written to ``path`` at the end, all at once."""
    matplotlib: Any = require("matplotlib", "drawing the curves")
    figures: Any = require("matplotlib.figure", "drawing the curves")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
