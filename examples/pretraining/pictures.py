"""The run as pictures: its curves, and the cross-correlation matrix before and after."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import Aborted, require
from .reporting import COLUMNS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1722c", "#3a8f5c", "#8a8a8a"
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
    "legend.frameon": False,
}


def draw_curves(
    path: Path,
    steps: Sequence[Row],
    epochs: Sequence[Row],
    *,
    lambd: float,
    noise_floor: float,
    attainable_rank: int,
    baselines: dict[str, dict[str, float]],
) -> None:
    """Loss, its two terms beside the noise floor, effective rank, and the probes over time.

    Args:
        path: of the PNG.
        steps: rows with step, loss, on_diagonal, off_diagonal, effective_rank.
        epochs: rows with step and the accuracies of the monitor, if there is one.
        lambd: λ, which weighs the off-diagonal in the picture as in the loss.
        noise_floor: D(D − 1)/(N − 1).
        attainable_rank: min(N − 1, D).
        baselines: the monitor's accuracies of other representations.
    """
    x = [row["step"] for row in steps]

    def curve(axes: "Axes", name: str, color: str, label: str = "", factor: float = 1.0) -> None:
        values = [float("nan") if row[name] is None else factor * row[name] for row in steps]
        axes.plot(x, values, color=color, label=label, linewidth=1.6)

    with _picture(path, (10, 6.4)) as figure:
        (loss, terms), (rank, probe) = figure.subplots(2, 2)
        loss.set_title("Loss")
        curve(loss, "loss", BLUE)
        terms.set_title("Its two terms")
        curve(terms, "on_diagonal", BLUE, r"on-diagonal  $\sum_i (C_{ii} - 1)^2$")
        curve(terms, "off_diagonal", ORANGE, r"$\lambda$ · off-diagonal  $\sum_{i \neq j} C_{ij}^2$", lambd)
        terms.axhline(lambd * noise_floor, color=ORANGE, linestyle=":", label="its noise floor: random embeddings")
        terms.margins(y=0.15)
        terms.legend(loc="upper right")
        rank.set_title(f"Effective rank (at most {attainable_rank})")
        curve(rank, "effective_rank", GREEN)
        _draw_probe(probe, [row for row in epochs if "knn" in row], baselines)
        for axes in (loss, terms):
            _make_logarithmic(axes)
        rank.set_ylim(bottom=0)
        for axes in (loss, terms, rank, probe):
            axes.set_xlabel("step")


def _make_logarithmic(axes: "Axes") -> None:
    """A logarithmic vertical axis with plain numbers: 1, 2, 3, 5, 10, ..."""
    ticker: Any = require("matplotlib.ticker", "drawing the curves")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _draw_probe(axes: "Axes", epochs: Sequence[Row], baselines: dict[str, dict[str, float]]) -> None:
    if not epochs:
        axes.set_axis_off()
        return
    name = "linear_1" if "linear_1" in epochs[0] else "knn"
    axes.set_title(f"Held-out accuracy, {COLUMNS[name]} (%)")
    untrained = {"step": 0, name: baselines["untrained encoder"][name]}
    points = [(row["step"], row[name]) for row in (untrained, *epochs)]
    axes.plot(*zip(*points, strict=True), "o-", color=BLUE, markersize=4, label="encoder")
    for (label, accuracies), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(accuracies[name], color=GREY, linestyle=style, label=label)
    axes.set_ylim(0, 100)
    axes.legend(loc="lower right")


def draw_cross_correlation(path: Path, before: Tensor, after: Tensor) -> None:
    """Two cross-correlation matrices (D, D) on one diverging scale, from −1 (blue) to 1 (red)."""
    with _picture(path, (10, 4.8)) as figure:
        panels = figure.subplots(1, 2)
        for axes, matrix, title in zip(panels, (before, after), ("Before pretraining", "After"), strict=True):
            picture = axes.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title)
            axes.set_xlabel("feature of view 2")
            axes.grid(False)
        panels[0].set_ylabel("feature of view 1")
        bar = figure.colorbar(picture, ax=list(panels), shrink=0.85, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.set_label(r"cross-correlation $C_{ij}$")


@contextmanager
def _picture(path: Path, size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure to draw into, in this file's style; written to ``path`` at the end."""
    matplotlib: Any = require("matplotlib", "drawing the curves")
    figures: Any = require("matplotlib.figure", "drawing the curves")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        try:
            figure.savefig(path)
        except OSError as error:
            raise Aborted(f"cannot write {path}: {error.strerror or error}") from None
