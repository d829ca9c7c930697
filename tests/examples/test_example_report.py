"""The report: one file that needs no other, shows what is known, and trusts no string."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from barlow_loss import collapse_report
from barlow_recipes import pictures
from barlow_recipes.errors import Aborted
from barlow_recipes.report import MOST_EVENTS, versions, write_report

GENERATOR = torch.Generator().manual_seed(0)
HEALTHY = collapse_report(
    *(torch.randn(2, 64, 16, generator=GENERATOR) * 0.1 + torch.randn(64, 16, generator=GENERATOR))
)
COLLAPSED = collapse_report(torch.ones(64, 16), torch.ones(64, 16))
ACCURACIES = {
    "raw pixels": {"knn": 91.25, "linear_1": 41.0},
    "untrained encoder": {"knn": 92.25, "linear_1": 42.0},
    "pretrained encoder": {"knn": 93.25, "linear_1": 43.0},
}
HOSTILE = '</table><script src=//evil.example/x.js></script><img src=x onerror=alert(1)>" onload="{{ 7*7 }}'


class Page(HTMLParser):
    """Everything that a browser would fetch or run, and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.addresses.append(value or "")
            if name == "style":
                self.styles.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style" and "{" in data:
            self.styles.append(data)
        else:
            self.text += data


def a_run(events: int = 2, steps: int = 30) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": "settings", "seed": 0}]
    for step in range(1, steps + 1):
        rows.append({"kind": "step", "step": step, "loss": 100 / step, "effective_rank": 12.5, "dead_features": 1})
        if step % 10 == 0:
            rows.append(
                {"kind": "epoch", "step": step, "epoch": step // 10, "unreadable": 1, "images_per_second": 1234}
            )
    return rows + [{"kind": "event", "step": step, "text": f"happening number {step}"} for step in range(events)]


def written(path: Path, **changes: Any) -> Page:
    content: dict[str, Any] = {
        "title": "digits, digits-cnn",
        "status": "running",
        "last_step": 1500,
        "settings": {"batch_size": 128, "epochs": 60, "device": "cpu", "processes": 2} | versions(),
        "rows": a_run(),
        "pictures": {},
        "accuracies": ACCURACIES,
        "collapse": HEALTHY,
    }
    write_report(path, **content | changes)
    return Page(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    steps = [
        {"step": step}
        | dict.fromkeys(("loss", "on_diagonal", "off_diagonal", "effective_rank", "gradient_norm"), 1 + step % 89)
        for step in range(1, 150_000, 10)
    ]
    curves, correlation = folder / "curves.png", folder / "cross_correlation.png"
    pictures.draw_curves(curves, steps, [], lambd=0.005, noise_floor=1000.0, attainable_rank=99, baselines={})
    noise = 2 * torch.rand(2, 128, 128, generator=GENERATOR) - 1
    pictures.draw_cross_correlation(correlation, noise[0], noise[1], step=3)
    return {"The curves": curves, "The correlation": correlation}


def test_the_page_shows_what_is_known(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html")
    for text in (
        "digits, digits-cnn", "running", "30 of 1,500", "3 of 60", "1,234", "3.333", "12.5", "unreadable images",
        "raw pixels", "91.2 %", "untrained encoder", "42.0 %", "pretrained encoder", "1 label/class",
        HEALTHY.verdict, "effective rank", "at most 16", "happening number 0", "happening number 1",
        "batch size", "128", "processes", "barlow-loss", torch.__version__.partition("+")[0], "When to worry",
    ):  # fmt: skip
        assert text in page.text
    assert page.text.index("happening number 1") < page.text.index("happening number 0")  # the newest first
    assert page.tags.count("li") == 5


def test_a_collapse_is_told(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", collapse=COLLAPSED, status="stopped by SIGTERM after step 30")
    assert COLLAPSED.warnings
    assert all(warning in page.text for warning in COLLAPSED.warnings)
    assert page.text.count("stopped by SIGTERM after step 30") == 2  # the page and its title
    assert not any(warning in written(tmp_path / "report.html").text for warning in COLLAPSED.warnings)


def test_the_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    nothing = {"Not drawn yet": tmp_path / "absent.png"}
    page = written(tmp_path / "report.html", rows=[], pictures=nothing, accuracies={}, collapse=None)
    assert "0 of 1,500" in page.text
    assert "Nothing out of the ordinary" in page.text
    for absent in ("Not drawn yet", "representation is worth", "embeddings healthy"):
        assert absent not in page.text


def test_a_number_that_is_not_finite_is_said_to_be_so(tmp_path: Path) -> None:
    rows = [*a_run(), {"kind": "step", "step": 31, "loss": None, "effective_rank": None, "dead_features": 0}]
    broken = collapse_report(torch.full((4, 2), torch.nan), torch.ones(4, 2))
    page = written(tmp_path / "report.html", rows=rows, collapse=broken)
    assert page.text.count("not finite") == 3  # loss, rank and the warning
    assert broken.warnings[0] in page.text


def test_the_page_needs_no_other_file_and_runs_nothing(drawn: dict[str, Path], tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", pictures=drawn)
    assert page.tags.count("img") == 2
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.styles
    for style in page.styles:
        assert not re.search(r"@import|url\(", style)
    for adaptation in ("prefers-color-scheme: dark", "@media print", "max-width"):
        assert adaptation in page.styles[0]
    assert "viewport" in (tmp_path / "report.html").read_text()


def test_no_string_is_trusted(tmp_path: Path) -> None:
    tags = written(tmp_path / "plain.html").tags
    page = written(
        tmp_path / "report.html",
        title=HOSTILE,
        status=HOSTILE,
        settings={"data": HOSTILE, "command": [HOSTILE], HOSTILE: 1, "epochs": HOSTILE},
        rows=[*a_run(), {"kind": "event", "step": 3, "text": HOSTILE}],
        accuracies={HOSTILE: {"knn": 1.0}},
    )
    assert page.text.count("{{ 7*7 }}") >= 7
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert set(page.tags) == set(tags)
    assert not {"onerror", "onload"} & set(page.attributes)


def test_a_long_run_has_a_small_page(drawn: dict[str, Path], tmp_path: Path) -> None:
    """1,000 epochs, and an event in each."""
    page = written(tmp_path / "report.html", pictures=drawn, rows=a_run(events=1000, steps=10_000))
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert page.text.count("happening number") == MOST_EVENTS
    assert "happening number 999" in page.text
    assert "900 older ones" in page.text


def test_a_reader_sees_the_old_page_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    written(path)
    with path.open(encoding="utf-8") as reader:  # who has the old page open goes on reading the old page
        beginning = reader.read(100)
        written(path, status="done")
        old = beginning + reader.read()
    assert old != path.read_text(encoding="utf-8")
    assert old.rstrip().endswith("</html>")
    with pytest.raises(TypeError):
        written(path, last_step="many", rows=[{"kind": "step", "step": {}}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(Aborted, match=r"cannot write .*report.html"):
        written(tmp_path / "nowhere" / "report.html")
