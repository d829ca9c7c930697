"""The run on one page: a file that needs no other, for a browser or a telephone."""

import base64
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from barlow_loss import CollapseReport, __version__
from barlow_recipes.errors import require
from barlow_recipes.metrics import Row
from barlow_recipes.reporting import replacing
from barlow_recipes.tables import accuracy_cells

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_EVENTS = 100  # the newest, so that the page stays small
NEWEST = {"images_per_second": ",.0f", "loss": ".4g", "effective_rank": ".4g", "dead_features": ",d"}


def write_report(
    path: Path,
    *,
    title: str,
    status: str,
    last_step: int,
    settings: Mapping[str, object],
    rows: Sequence[Row],
    pictures: Mapping[str, Path],
    accuracies: Mapping[str, Mapping[str, float]],
    collapse: CollapseReport | None,
) -> None:
    """Write the page anew, all at once.

    Args:
        path: of the HTML file.
        title: what runs, such as "digits, digits-cnn".
        status: "running", "done", or what has stopped the run.
        last_step: of the whole run.
        settings: of the run and its surroundings.
        rows: the metrics; of them the newest numbers and the events are shown.
        pictures: PNGs by what they show; those not yet drawn are left out.
        accuracies: of each representation.
        collapse: the newest report on the embeddings, if there is one.
    """
    jinja2: Any = require("jinja2", "report.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    events = [(f"{row['step']:,}", row["text"]) for row in rows if row["kind"] == "event"]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        status=status,
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        facts=_facts(rows, last_step, settings.get("epochs")),
        accuracies=accuracy_cells(accuracies) if accuracies else [],
        pictures={caption: _embedded(picture) for caption, picture in pictures.items() if picture.is_file()},
        collapse=collapse,
        events=events[-MOST_EVENTS:][::-1],
        older_events=max(0, len(events) - MOST_EVENTS),
        settings={name.replace("_", " "): value for name, value in settings.items()},
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _facts(rows: Sequence[Row], last_step: int, epochs: object) -> dict[str, str]:
    """The newest numbers, those that are known."""
    newest: dict[str, Any] = {"step": 0}
    for row in rows:
        newest |= row if row["kind"] in ("step", "epoch") else {}
    facts = {"step": f"{newest['step']:,} of {last_step:,}"}
    if "epoch" in newest:
        facts["epochs"] = f"{newest['epoch']:,} of {epochs}"
    for name, layout in NEWEST.items():
        if name in newest:
            facts[name.replace("_", " ")] = "not finite" if newest[name] is None else format(newest[name], layout)
    unreadable = sum(row.get("unreadable", 0) for row in rows if row["kind"] == "epoch")
    return facts | ({"unreadable images": f"{unreadable:,}"} if unreadable else {})


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on."""
    found = {"Python": platform.python_version(), "barlow-loss": __version__}
    for package in ("torch", "torchvision", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
