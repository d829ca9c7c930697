"""The report and the pictures: one page that needs no other, shows what is known, and trusts no string."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from barlow_loss import collapse_report
from barlow_recipes import reporting
from barlow_recipes.metrics import Metrics
from barlow_recipes.reporting import MOST_EVENTS, versions, write_report

GENERATOR = torch.Generator().manual_seed(0)
HEALTHY = collapse_report(
    *(torch.randn(2, 64, 16, generator=GENERATOR) * 0.1 + torch.randn(64, 16, generator=GENERATOR))
)
COLLAPSED = collapse_report(torch.ones(64, 16), torch.ones(64, 16))
ACCURACIES = {"knn": 50.0, "linear_1": 40.0, "linear_all": 60.0}
BASELINES = {"raw pixels": {**ACCURACIES, "knn": 91.25}, "untrained encoder": {"knn": 10.0, "linear_1": 42.0}}
HOSTILE = '</table><script src=//evil.example/x.js></script><img src=x onerror=alert(1)>" onload="{{ 7*7 }}'
CURVES = ("loss", "on_diagonal", "off_diagonal", "effective_rank", "learning_rate", "gradient_norm")


class Page(HTMLParser):
    """Everything that a browser would fetch or run, and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def curve(steps: range) -> list[dict[str, Any]]:
    return [{"step": step} | dict.fromkeys(CURVES, None if step == 21 else 100 + step % 7) for step in steps]


def a_run(out: Path, steps: int = 31, events: int = 2, **changes: Any) -> Any:
    """What the page reads of a run."""
    metrics = Metrics(None)
    metrics.add("settings", {"batch_size": 128, "processes": 2} | versions())
    for row in curve(range(1, steps + 1, 10)):
        metrics.add("step", row)
        metrics.add("epoch", {"step": row["step"], "epoch": row["step"] // 10, "unreadable": 1})
    for number in range(events):
        metrics.add("event", {"step": number, "text": f"happening number {number}"})
    known = {"out": out, "last_step": 1500, "collapse": HEALTHY, "metrics": metrics}
    known |= {"accuracies": BASELINES | {"pretrained encoder": ACCURACIES}, "state": SimpleNamespace(step=steps)}
    known |= {"data": SimpleNamespace(name="digits"), "settings": SimpleNamespace(arch="small-cnn", epochs=60)}
    return SimpleNamespace(**known | changes)


def written(run: Any, status: str = "running") -> Page:
    write_report(run, status)
    return Page(run.out / "report.html")


def draw(path: Path, steps: range, looks: bool = False) -> None:
    metrics = Metrics(None)
    for row in curve(steps):
        metrics.add("step", row)
    for step in (20, 40):
        metrics.add("epoch", {"step": step, "epoch": 1} | (ACCURACIES if looks and step > 20 else {}))
    reporting.draw_curves(path, metrics, lambd=0.005, floor=1000.0, rank=99)


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(maxcolors=2**24) or [])


def test_the_page_shows_what_is_known(tmp_path: Path) -> None:
    page = written(a_run(tmp_path))
    for text in (
        "digits, small-cnn", "running", "step: 31", "steps: 1500",
        "epoch: 3", "epochs: 60", "gradient_norm: 103", "unreadable: 1",
        "raw pixels", "91.2 %", "untrained encoder", "42.0 %", "pretrained encoder", "1 label/class", "–",
        HEALTHY.verdict, str(HEALTHY), "happening number 0", "happening number 1",
        "batch_size: 128", "processes", "barlow-loss", torch.__version__.partition("+")[0],
    ):  # fmt: skip
        assert text in page.text
    assert page.text.index("happening number 1") < page.text.index("happening number 0")  # the newest first


def test_a_collapse_and_a_number_that_is_not_finite_are_told(tmp_path: Path) -> None:
    page = written(a_run(tmp_path, collapse=COLLAPSED), "stopped by SIGTERM after step 30")
    assert COLLAPSED.warnings
    assert str(COLLAPSED) in page.text
    assert page.text.count("stopped by SIGTERM after step 30") == 2  # the page and its title
    assert written(a_run(tmp_path, steps=21)).text.count(": null") == len(CURVES)


def test_the_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = written(a_run(tmp_path, steps=0, events=0, accuracies={}, collapse=None))
    assert "steps: 1500" in page.text
    assert "Nothing out of the ordinary" in page.text
    assert "img" not in page.tags
    for absent in ("Held-out accuracy", "embeddings healthy"):
        assert absent not in page.text


def test_the_page_needs_no_other_file_and_runs_nothing(tmp_path: Path) -> None:
    draw(tmp_path / "curves.png", range(1, 60, 10))
    reporting.draw_cross_correlation(tmp_path / "cross_correlation.png", torch.zeros(9, 9), torch.eye(9), step=3)
    assert colours(tmp_path / "cross_correlation.png") > 200
    page = written(a_run(tmp_path))
    assert page.tags.count("img") == 2
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "style")]
    assert len(addresses) == 3
    assert all(address.startswith("data:") for address in addresses)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\(", (tmp_path / "report.html").read_text())


def test_no_string_is_trusted(tmp_path: Path) -> None:
    run = a_run(tmp_path, accuracies={HOSTILE: {"knn": 1.0}}, data=SimpleNamespace(name=HOSTILE))
    tags = written(run).tags
    run.settings.arch = HOSTILE
    run.metrics.rows[0] |= {"data": HOSTILE, "command": [HOSTILE], HOSTILE: 1}
    run.metrics.add("event", {"step": 3, "text": HOSTILE})
    page = written(run, HOSTILE)
    assert page.text.count("{{ 7*7 }}") >= 7
    assert not {"script", "img"} & set(page.tags)
    assert set(page.tags) == set(tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    """150,000 steps, 1,000 epochs, and an event in each."""
    draw(tmp_path / "curves.png", range(1, 150_000, 10))
    page = written(a_run(tmp_path, events=1000))
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert page.text.count("happening number") == MOST_EVENTS
    assert "happening number 999" in page.text
    assert "900 older ones" in page.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("steps", [range(1, 60, 10), range(1, 2), range(21, 22), range(0)])
def test_curves_are_drawn_at_any_time(steps: range, looks: bool, tmp_path: Path) -> None:
    """Of steps with a gap, a single one, without a finite value, and before the first."""
    draw(tmp_path / "curves.png", steps, looks)
    assert colours(tmp_path / "curves.png") > 50
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
