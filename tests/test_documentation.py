"""What the README and the pages show runs as pasted, and what they point to exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs" / "index.md").exists():
    pytest.skip("the pages are not part of a source distribution", allow_module_level=True)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def _blocks(page: Path) -> list[tuple[str | None, str]]:
    return [(found["needs"], found["code"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def _can_run(needs: str | None) -> bool:
    return needs is None or (needs == "cuda" and torch.cuda.is_available())


def _slug(heading: str) -> str:
    """As GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As torchrun would start one process; what a block writes lands in a folder of its own."""
    settings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(_blocks(ROOT / "README.md"))))
def test_every_block_of_the_readme_runs_by_itself(one_process: None, number: int) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    needs, code = _blocks(ROOT / "README.md")[number]
    assert needs is None
    exec(compile(code, f"README.md, block {number}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if _blocks(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_another(one_process: None, page: Path) -> None:
    if "lightning" in page.read_text(encoding="utf-8"):
        pytest.importorskip("lightning")
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, (needs, code) in enumerate(_blocks(page)):
        if _can_run(needs):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_slug, headings), f"{target}#{anchor}"


def test_the_text_of_an_index_links_to_no_file() -> None:
    assert LINK.findall((ROOT / "docs" / "pypi.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_includes_exists(page: Path) -> None:
    for path in re.findall(r"include\} (\S+)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).exists(), path


def test_the_readme_is_read_in_a_minute() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    assert len(lines) <= 150
    assert next(number for number, line in enumerate(lines) if line == "```python") < 15


def test_every_public_name_has_a_page() -> None:
    import barlow_loss
    from barlow_loss import diagnostics

    listed = set(re.findall(r"^   ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(barlow_loss.__all__) - {"reference", "__version__"} <= listed
    assert {f"diagnostics.{name}" for name in diagnostics.__all__ if name not in barlow_loss.__all__} <= listed


def test_the_notebook_runs(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell; without its pictures, and with fewer steps."""
    plots = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    plots.switch_backend("agg")
    monkeypatch.setattr(plots, "show", lambda: plots.close("all"))
    notebook = json.loads((ROOT / "docs" / "barlow_twins_on_digits.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell.replace("steps, N = 300, 256", "steps, N = 101, 256"), "notebook", "exec"), names)
    (_, on, *_, before), *_, (_, better, *_, after) = names["history"]
    assert better < on
    assert after > before
    assert all(not cell.get("outputs") for cell in notebook["cells"])
