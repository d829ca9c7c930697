"""The run on one page: a file that needs no other, for a browser, a telephone or a printer."""

import base64
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from barlow_loss import CollapseReport, __version__
from barlow_recipes.errors import require
from barlow_recipes.reporting import Row, accuracy_cells, replacing

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PACKAGES = ("torch", "torchvision", "numpy")
MOST_EVENTS = 100  # the newest, so that the page stays small


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
    events = [row for row in rows if row["kind"] == "event"]
    page = _template().render(
        title=title,
        status=status,
        running=status == "running",
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        facts=_facts(rows, last_step, settings.get("epochs")),
        accuracies=accuracy_cells(accuracies) if accuracies else [],
        pictures={caption: _embedded(picture) for caption, picture in pictures.items() if picture.is_file()},
        warnings=collapse.warnings if collapse else (),
        collapse=collapse,
        quantities=_quantities(collapse) if collapse else [],
        events=events[-MOST_EVENTS:][::-1],
        older_events=max(0, len(events) - MOST_EVENTS),
        settings=settings,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _template() -> Any:
    jinja2: Any = require("jinja2", "report.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _facts(rows: Sequence[Row], last_step: int, epochs: object) -> dict[str, str]:
    """The newest numbers, those that are known."""
    newest: dict[str, Any] = {}
    for row in rows:
        if row["kind"] in ("step", "epoch"):
            newest |= row
    unreadable = sum(row.get("unreadable", 0) for row in rows if row["kind"] == "epoch")
    facts = {"step": f"{newest.get('step', 0):,} of {last_step:,}"}
    if "epoch" in newest:
        facts["epochs"] = f"{newest['epoch']:,} of {epochs}"
    for name, label, layout in (
        ("images_per_second", "images/s", ",.0f"),
        ("loss", "loss", ".4g"),
        ("effective_rank", "effective rank", ".4g"),
        ("dead_features", "dead features", ",d"),
    ):
        if name in newest:
            value = newest[name]
            facts[label] = "not finite" if value is None else format(value, layout)
    return facts | ({"unreadable images": f"{unreadable:,}"} if unreadable else {})


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on."""
    versions = {"Python": platform.python_version(), "barlow-loss": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _quantities(report: CollapseReport) -> list[tuple[str, str, str, str]]:
    """Each measured quantity: its name, its value, what to compare it with, and what it means."""
    rank = f"at most {report.attainable_rank:,}"
    return [
        ("loss", _number(report.loss), "", "on-diagonal + λ · off-diagonal; lower is better only at equal N, D and λ"),
        (
            "on-diagonal",
            _number(report.on_diagonal),
            f"0 at best, {report.d:,} at collapse",
            "Σ (C_ii − 1)²: how far the two views of an image are from agreeing",
        ),
        (
            "off-diagonal",
            _number(report.off_diagonal),
            f"chance {_number(report.off_diagonal_noise_floor)}",
            "Σ C_ij², i ≠ j: how much the features repeat each other; random embeddings have the chance value",
        ),
        ("mean diagonal", f"{report.mean_diagonal:.3f}", "1 at best", "correlation of the views, feature by feature"),
        (
            "off-diagonal RMS",
            f"{report.off_diagonal_rms:.3f}",
            f"chance {report.off_diagonal_rms_noise_floor:.3f}",
            "typical correlation of two different features",
        ),
        (
            "dead features",
            f"{report.dead_features:,}",
            f"of {report.d:,}",
            "features that are the same for every image",
        ),
        (
            "feature std",
            f"{report.std_min:.2g} to {report.std_max:.2g}",
            f"median {report.std_median:.2g}",
            "spread of a feature over the batch",
        ),
        (
            "effective rank",
            f"{report.effective_rank_1:.4g}, {report.effective_rank_2:.4g}",
            rank,
            "directions that the embeddings of view 1 and view 2 really use; few directions are a collapse",
        ),
        (
            "alignment",
            f"{report.alignment:.3f}",
            "0 at best, chance 2",
            "squared distance of the directions of a pair; it is small at collapse, too",
        ),
    ]
