"""The run as pictures: its curves, and the cross-correlation matrix before and after."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from barlow_recipes.errors import require
from barlow_recipes.metrics import Metrics, Row
from barlow_recipes.outputs import replacing
from barlow_recipes.tables import accuracies_of, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1722c", "#3a8f5c", "#8a8a8a"
BASELINE_STYLES = ("--", ":")
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.right": False, "axes.spines.top": False}
LAYOUT = (
    ["Loss", "Its two terms"],
    ["Effective rank", "Held-out accuracy (%)"],
    ["Learning rate", "Norm of the gradient"],
)
Baselines = Mapping[str, Mapping[str, float]]  # of each representation, in percent
LOGARITHMIC = ("Loss", "Its two terms", "Norm of the gradient")


def draw_curves(
    path: Path, metrics: Metrics, baselines: Baselines, *, lambd: float, noise_floor: float, rank: int
) -> None:
    """Loss, its two terms beside the noise floor, effective rank, accuracies, learning rate and gradient norm.

    ``baselines`` are the accuracies of other representations; ``noise_floor`` is that of the off-diagonal,
    D(D − 1)/(N − 1); ``rank`` the highest that is attainable, min(N − 1, D).
    """
    steps = metrics.of_kind("step")
    curves = (
        ("Loss", "loss", BLUE, 1.0, ""),
        ("Its two terms", "on_diagonal", BLUE, 1.0, r"on-diagonal  $\sum_i (C_{ii} - 1)^2$"),
        ("Its two terms", "off_diagonal", ORANGE, lambd, r"$\lambda$ · off-diagonal  $\sum_{i \neq j} C_{ij}^2$"),
        ("Effective rank", "effective_rank", GREEN, 1.0, f"at most {rank:,}"),
        ("Learning rate", "learning_rate", GREY, 1.0, ""),
        ("Norm of the gradient", "gradient_norm", GREY, 1.0, ""),
    )
    with drawing(path, (10, 8)) as figure:
        panels = figure.subplot_mosaic(LAYOUT, sharex=True, height_ratios=(3, 3, 1.5))
        for title, axes in panels.items():
            axes.set_title(title)
        for title, name, color, factor, label in curves:
            values = [math.nan if row.get(name) is None else factor * row[name] for row in steps]
            marker = "." if len(steps) == 1 else ""
            panels[title].plot([row["step"] for row in steps], values, marker=marker, color=color, label=label)
            if title in LOGARITHMIC and any(value > 0 for value in values):
                panels[title].set_yscale("log")
        floor = "its noise floor: random embeddings"
        panels["Its two terms"].axhline(lambd * noise_floor, color=ORANGE, linestyle=":", label=floor)
        panels["Effective rank"].set_ylim(bottom=0)
        looks = [row for row in metrics.of_kind("epoch") if "knn" in row]
        _draw_accuracies(panels["Held-out accuracy (%)"], looks, baselines)
        for title in ("Its two terms", "Effective rank"):
            panels[title].legend()
        for title in LAYOUT[-1]:
            panels[title].set_xlabel("step")


def _draw_accuracies(axes: "Axes", looks: list[Row], baselines: Baselines) -> None:
    """The nearest neighbours and the linear probe with the most labels, each beside its baselines."""
    axes.set_ylim(0, 102)
    names = accuracies_of(looks[-1]) if looks else []
    for name, color in zip(dict.fromkeys([*names[:1], *names[-1:]]), (BLUE, ORANGE), strict=False):
        values = [row.get(name, math.nan) for row in looks]
        axes.plot([row["step"] for row in looks], values, ".-", color=color, label=label_of(name))
        for (baseline, accuracies), style in zip(baselines.items(), BASELINE_STYLES, strict=False):
            label = f"{baseline}, {label_of(name)}"
            axes.axhline(accuracies.get(name, math.nan), color=color, linestyle=style, linewidth=1, label=label)
    if names:
        axes.legend(fontsize="small")


def draw_cross_correlation(path: Path, before: Tensor, after: Tensor, step: int) -> None:
    """The cross-correlation (D, D) before and after so many steps on one diverging scale: −1 is blue, 1 is red."""
    with drawing(path, (10, 4.8)) as figure:
        panels = figure.subplots(1, 2)
        matrices = {"Before pretraining": before, f"After step {step:,}": after}
        for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
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
