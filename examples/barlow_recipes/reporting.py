"""Looking at a run: what its representations are worth, its curves, its cross-correlation, and one page of all that."""

import base64
import copy
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from html import escape
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from barlow_loss import __version__, collapse_report, cross_correlation
from barlow_loss.diagnostics import noise_floor
from barlow_recipes import probes
from barlow_recipes.data import Probe
from barlow_recipes.distributed import is_rank_zero, world_size
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import require
from barlow_recipes.metrics import Metrics, accuracies_of, accuracy_table, label_of
from barlow_recipes.outputs import CROSS_CORRELATION, CURVES, PICTURES, REPORT, replacing
from barlow_recipes.steps import Accuracies, Run
from barlow_recipes.views import completed

PICTURED_PAIRS, PICTURED_FEATURES = 1024, 128  # of thousands of features a picture shows none
LOGGED_PAIRS = 256  # of a process: with thousands the effective rank, in float64, takes as long as a step
BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1722c", "#3a8f5c", "#8a8a8a"
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.right": False, "axes.spines.top": False}
MOST_EVENTS = 100  # the newest, so that the page stays small
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>body {{ margin: auto; max-width: 60rem }} pre {{ overflow: auto }} img {{ width: 100% }}</style>
<h1>{title}</h1>
{body}
<p>Written {written}</p>
</html>
"""


def baselines(run: Run, name: Literal["monitor", "final"]) -> Accuracies:
    """What the images of a probe are worth without pretraining: as pixels, and behind random weights.

    A resumed run finds them in its metrics: for ImageNet they take minutes.
    """
    settings, probe = run.settings, getattr(run.data, name)
    rows = [row for row in run.metrics.of_kind("baseline") if row["probe"] == name]
    if probe and not rows:
        backbone = run.state.model.backbone
        if run.begun:  # with other weights than random ones
            with torch.random.fork_rng(devices=[]):
                shape = settings.stem, settings.channels, settings.image_size
                backbone = build_encoder(settings.arch, *shape).module.to(settings.device)
        untrained = probes.untrained(backbone, probe.bank, settings.device)
        for label, represent in {"raw pixels": probes.raw_pixels, "untrained encoder": untrained}.items():
            measured = probes.evaluate(represent, probe, settings.device)
            rows.append({"step": 0, "probe": name, "representation": label, "accuracies": measured})
            run.metrics.add("baseline", rows[-1])
    return {row["representation"]: row["accuracies"] for row in rows}


def accuracies(run: Run, probe: Probe | None) -> dict[str, float]:
    return probes.evaluate(run.state.model.backbone.eval(), probe, run.settings.device) if probe else {}


@torch.no_grad()
def draw(run: Run) -> None:
    """The curves and the correlation matrix, beside that of the first call; all processes take part.

    Of the first pairs, of the first two views where there are more, by their embeddings as the loss sees them: with
    batch statistics.
    """
    model, settings = copy.deepcopy(run.state.model).train(), run.settings
    batches = islice(run.data.pairs.batches(epoch=0), -(-PICTURED_PAIRS // settings.micro_batch_size))
    views = ([completed(view, settings.device, run.data.pixels) for view in batch.views[:2]] for batch in batches)
    z1, z2 = map(torch.cat, zip(*([*map(model, two)] for two in views), strict=True))
    correlation = cross_correlation(z1[:, :PICTURED_FEATURES], z2[:, :PICTURED_FEATURES])
    if run.before is None:
        run.before = correlation
        return
    run.collapse = collapse_report(z1, z2, lambd=settings.lambd)
    if is_rank_zero():
        n, d = settings.micro_batch_size, z1.shape[1]
        draw_cross_correlation(run.out / CROSS_CORRELATION, run.before, correlation, run.state.step)
        limits = {"floor": noise_floor(n, d), "rank": min(n - 1, LOGGED_PAIRS * world_size() - 1, d)}
        draw_curves(run.out / CURVES, run.metrics, lambd=settings.lambd, **limits)


def draw_curves(path: Path, metrics: Metrics, *, lambd: float, floor: float, rank: int) -> None:
    """What is logged of the steps and of the looks.

    ``floor`` is the noise floor of the off-diagonal, D(D − 1)/(N − 1); ``rank`` the highest that is attainable.
    """
    looks = [row for row in metrics.of_kind("epoch") if "knn" in row]
    names = accuracies_of(looks[-1]) if looks else []
    panels = {
        "Loss": {"loss": 1.0},
        "Its two terms, and their noise floor": {"on_diagonal": 1.0, "off_diagonal": lambd},
        f"Effective rank, at most {rank:,}": {"effective_rank": 1.0},
        "Held-out accuracy (%)": dict.fromkeys([*names[:1], *names[-1:]], 1.0),
        "Learning rate": {"learning_rate": 1.0},
        "Norm of the gradient": {"gradient_norm": 1.0},
    }
    with drawing(path, (10, 8)) as figure:
        axes = dict(zip(panels, figure.subplots(3, 2, sharex=True).flat, strict=True))
        for title, curves in panels.items():
            axes[title].set_title(title)
            rows = looks if "accuracy" in title else metrics.of_kind("step")
            for name, factor in curves.items():
                values = [math.nan if row.get(name) is None else factor * row[name] for row in rows]
                label = label_of(name) if rows is looks else name if factor == 1 else f"λ · {name}"
                axes[title].plot([row["step"] for row in rows], values, ".-", markersize=2, label=label)
                if title.startswith(("Loss", "Its", "Norm")) and any(value > 0 for value in values):
                    axes[title].set_yscale("log")
            if len(curves) > 1:
                axes[title].legend(fontsize="small")
            if "floor" in title:
                axes[title].axhline(lambd * floor, color=GREY, linestyle=":")


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
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw into, in this file's style; written to ``path`` at the end, all at once."""
    pyplot: Any = require("matplotlib.figure", "drawing the curves")
    with require("matplotlib", "drawing the curves").rc_context(STYLE):
        figure = pyplot.Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on, as far as it is installed."""
    packages = [found for name in ("torch", "torchvision", "numpy") for found in metadata.distributions(name=name)]
    own = {"Python": platform.python_version(), "barlow-loss": __version__}
    return own | {package.name: package.version for package in packages}


def write_report(run: Run, status: str) -> None:
    """Write the page anew, all at once; ``status`` is "running", "done", or what has stopped the run."""
    if not is_rank_zero():
        return
    as_yaml = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    rows = [*run.metrics.of_kind("epoch")[-1:], *run.metrics.of_kind("step")[-1:]]
    newest = {name: value for row in rows for name, value in row.items() if name != "kind"}
    events = [f"step {row['step']:,}: {row['text']}" for row in reversed(run.metrics.of_kind("event"))]
    more = [f"and {len(events) - MOST_EVENTS} older ones, in metrics.jsonl"] if len(events) > MOST_EVENTS else []
    texts = {
        "How far it is": as_yaml({"steps": run.last_step, "epochs": run.settings.epochs, **newest}),
        "Held-out accuracy": accuracy_table(run.accuracies) if run.accuracies else "",
        "Are the embeddings healthy?": str(run.collapse or ""),
        "Events": "\n".join(events[:MOST_EVENTS] + more) or "Nothing out of the ordinary.",
        "Settings": as_yaml(run.metrics.of_kind("settings")[0]),
    }
    body = [f"<h2>{head}</h2><pre>{escape(text)}</pre>" for head, text in texts.items() if text]
    pictures = (run.out / name for name in PICTURES)
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in pictures if path.is_file()]
    body[2:2] = [f'<img src="data:image/png;base64,{picture}" alt="">' for picture in encoded]
    title = escape(f"{run.data.name}, {run.settings.arch}: {status}")
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    with replacing(run.out / REPORT) as temporary:
        temporary.write_text(PAGE.format(title=title, written=written, body="\n".join(body)), encoding="utf-8")
