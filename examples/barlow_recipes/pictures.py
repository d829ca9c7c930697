"""The run as pictures: its curves, and the cross-correlation matrix before and after."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from barlow_recipes.errors import require
from barlow_recipes.metrics import Row
from barlow_recipes.reporting import replacing
from barlow_recipes.tables import accuracies_of, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1722c", "#3a8f5c", "#8a8a8a"
BASELINE_STYLES = ("--", ":")
MOST_POINTS = 2000  # of a curve: more than the picture has pixels
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "lines.markersize": 3,
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
    steps = thinned(steps)

    def curve(axes: "Axes", name: str, color: str, label: str = "", factor: float = 1.0, log: bool = False) -> None:
        values = [math.nan if row.get(name) is None else factor * row[name] for row in steps]
        axes.plot(
            [row["step"] for row in steps], values, marker="." if len(steps) == 1 else "", color=color, label=label
        )
        if log and any(value > 0 for value in values):
            axes.set_yscale("log")

    with drawing(path, (10, 8)) as figure:
        (loss, terms), (rank, probe), (rate, norm) = figure.subplots(
            3, 2, sharex=True, gridspec_kw={"height_ratios": (3, 3, 1.5)}
        )
        loss.set_title("Loss")
        curve(loss, "loss", BLUE, log=True)
        terms.set_title("Its two terms")
        curve(terms, "on_diagonal", BLUE, r"on-diagonal  $\sum_i (C_{ii} - 1)^2$", log=True)
        curve(terms, "off_diagonal", ORANGE, r"$\lambda$ · off-diagonal  $\sum_{i \neq j} C_{ij}^2$", lambd, log=True)
        terms.axhline(lambd * noise_floor, color=ORANGE, linestyle=":", label="its noise floor: random embeddings")
        terms.legend()
        rank.set_title(f"Effective rank (at most {attainable_rank:,})")
        curve(rank, "effective_rank", GREEN)
        rank.set_ylim(bottom=0)
        _draw_accuracies(probe, thinned([row for row in epochs if "knn" in row]), baselines)
        rate.set_title("Learning rate")
        curve(rate, "learning_rate", GREY)
        norm.set_title("Norm of the gradient")
        curve(norm, "gradient_norm", GREY, log=True)
        for axes in (rate, norm):
            axes.set_xlabel("step")


def thinned(rows: Sequence[Row]) -> Sequence[Row]:
    """At most a picture's worth of rows, evenly spaced, with the last."""
    stride = -(-len(rows) // MOST_POINTS) or 1
    return rows[::-1][::stride][::-1]


def _draw_accuracies(axes: "Axes", looks: Sequence[Row], baselines: Mapping[str, Mapping[str, float]]) -> None:
    """The nearest neighbours and the linear probe with the most labels, each beside its baselines."""
    axes.set_title("Held-out accuracy (%)")
    axes.set_ylim(0, 102)
    names = accuracies_of(looks[-1]) if looks else []
    for name, color in zip(dict.fromkeys([*names[:1], *names[-1:]]), (BLUE, ORANGE), strict=False):
        axes.plot([row["step"] for row in looks], [row[name] for row in looks], "o-", color=color, label=label_of(name))
        for (baseline, accuracies), style in zip(baselines.items(), BASELINE_STYLES, strict=True):
            label = f"{baseline}, {label_of(name)}"
            axes.axhline(accuracies.get(name, math.nan), color=color, linestyle=style, linewidth=1, label=label)
    if names:
        axes.legend(fontsize="small")


def draw_cross_correlation(path: Path, before: Tensor, after: Tensor, step: int) -> None:
    """The cross-correlation (D, D) before and after so many steps on one diverging scale: −1 is blue, 1 is red."""
    with drawing(path, (10, 4.8)) as figure:
        panels = figure.subplots(1, 2)
        titles = ("Before pretraining", f"After step {step:,}")
        for axes, matrix, title in zip(panels, (before, after), titles, strict=True):
            picture = axes.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(title=title, xlabel="feature of view 2", ylabel="feature of view 1")
            axes.grid(False)
        figure.colorbar(picture, ax=list(panels), shrink=0.85, label=r"cross-correlation $C_{ij}$")


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
