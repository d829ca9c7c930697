"""The run on one page: a file that needs no other, for a browser or a telephone."""

import base64
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from barlow_loss import __version__
from barlow_recipes.errors import require
from barlow_recipes.outputs import CROSS_CORRELATION, CURVES, REPORT, replacing
from barlow_recipes.run import Run
from barlow_recipes.tables import accuracy_cells

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_EVENTS = 100  # the newest, so that the page stays small
CAPTIONS = {
    CURVES: "How it goes",
    CROSS_CORRELATION: "Cross-correlation of the first features: the aim is 1 on the diagonal and 0 beside it",
}


def write_report(now: Run, status: str) -> None:
    """Write the page anew, all at once; ``status`` is "running", "done", or what has stopped the run."""
    jinja2: Any = require("jinja2", "report.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    (settings,) = now.metrics.of_kind("settings")
    events = [(f"{row['step']:,}", row["text"]) for row in now.metrics.of_kind("event")]
    drawn = {caption: now.out / name for name, caption in CAPTIONS.items() if (now.out / name).is_file()}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{now.data.name}, {now.settings.arch}",
        status=status,
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        facts=_facts(now),
        accuracies=accuracy_cells(now.accuracies) if now.accuracies else [],
        pictures={caption: base64.b64encode(path.read_bytes()).decode() for caption, path in drawn.items()},
        collapse=now.collapse,
        events=events[-MOST_EVENTS:][::-1],
        older_events=max(0, len(events) - MOST_EVENTS),
        settings={name.replace("_", " "): value for name, value in settings.items() if name != "kind"},
    )
    with replacing(now.out / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _facts(now: Run) -> dict[str, str]:
    """How far the run is, and its newest numbers."""
    steps, epochs = now.metrics.of_kind("step"), now.metrics.of_kind("epoch")
    facts = {"step": f"{now.state.step:,} of {now.last_step:,}"}
    if epochs:
        facts["epoch"] = f"{epochs[-1]['epoch']:,} of {now.settings.epochs:,}"
    for name, value in (steps[-1] if steps else {}).items():
        if name not in ("kind", "step"):
            facts[name.replace("_", " ")] = "not finite" if value is None else f"{value:,.5g}"
    unreadable = sum(row["unreadable"] for row in epochs)
    return facts | ({"unreadable images": f"{unreadable:,}"} if unreadable else {})


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on, as far as it is installed."""
    packages = [found for name in ("torch", "torchvision", "numpy") for found in metadata.distributions(name=name)]
    own = {"Python": platform.python_version(), "barlow-loss": __version__}
    return own | {package.name: package.version for package in packages}
