"""The tables say what the figures say, the README holds them, and the check sees when it does not."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import fictitious
import pytest
from fictitious import Record

import machine
import pictures
import render
import tables

ROOT = Path(__file__).parents[2]
PLACES = {  # of the blocks
    "gain": "README.md",
    **dict.fromkeys(("bench", "growth", "exactness", "limits", "host", "training"), "docs/performance.md"),
    **dict.fromkeys(("distributed", "bytes"), "docs/processes.md"),
}


@pytest.fixture
def results() -> Record:
    return fictitious.results()


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's rows, by the first of them."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def test_readme_agrees_with_the_committed_results() -> None:
    assert render.stale(machine.tracked(), ROOT) == []


@pytest.mark.parametrize("page", ["gpu.md", "relatives.md", "views.md"])
def test_the_other_pages_say_what_was_measured(page: str) -> None:
    found = {path.name: (path, text) for path, text in render.other_pages().items()}
    if page not in found:
        pytest.skip("the page is not part of a source distribution")
    path, text = found[page]
    assert path.read_text(encoding="utf-8") == text


def test_another_page_that_is_stale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {path: text.replace("0", "1") for path, text in render.other_pages().items()}
    monkeypatch.setattr(render, "other_pages", lambda: pages)
    with pytest.raises(SystemExit, match=r"(?s)gpu.md: expected the figures of gpu.json.*python benches/render.py"):
        render.main(["--check"])


def test_speed_is_ours_in_ms_and_the_others_over_it(results: Record) -> None:
    found = rows(tables.speed(results))
    assert found["N × D"] == ["algorithm", "ours, ms", "FFT relaxation", "textbook", "lightly", "solo-learn"]
    assert found["100 × 1000"] == ["dual", "10", "0.50×", "5.0×", "6.0×", "20×"]
    assert found["100 × 4000"] == ["dual", "40", "0.50×", "20×", "—", "—"]


def test_several_thread_counts_have_a_column(results: Record) -> None:
    results["cells"].append(fictitious.cell(300, 3000, threads=2))
    assert rows(tables.speed(results))["300 × 3000"][:2] == ["2", "dual"]
    assert "1 thread or 2 threads" in tables.setting(results)


def test_a_cell_that_only_later_contenders_share_keeps_its_columns(results: Record) -> None:
    results["cells"].insert(0, fictitious.cell(50, 500, but=("textbook",)))
    assert rows(tables.speed(results))["100 × 1000"][2:5] == ["0.50×", "6.0×", "20×"]
    assert rows(tables.speed(results))["50 × 500"][-1] == "—"


def test_memory_is_in_millions_of_bytes(results: Record) -> None:
    found = rows(tables.memory(results))
    assert found["100 × 2000"] == ["4.0", "4.0", "64.0", "64.0", "64.0"]
    assert found["100 × 4000"] == ["8.0", "8.0", "256", "—", "—"]


def test_growth_gives_exponents_and_the_largest_d(results: Record) -> None:
    text = tables.growth(results)
    assert rows(text)["barlow_loss"] == ["D^1.00", "1000", "4000", "N^1.00", "100", "200", "800,000", "≈ 300,000"]
    assert rows(text)["textbook"] == ["D^2.00", "1000", "2000", "—", "—", "—", "≈ 11,000", "≈ 10,900"]
    assert "2.00 times as long with ours, 4.00 times with textbook and 2.00 times with FFT relaxation" in text
    assert (
        "2 GB of working memory hold a step of ours up to D = 800,000, of the others up to 11,000 (textbook)." in text
    )


def test_exactness_takes_the_largest_error_and_says_what_differs(results: Record) -> None:
    results["cells"][1]["contenders"]["textbook"]["error_of_own"]["loss"] = 5e-7
    text = tables.exactness(results)
    assert rows(text)["textbook"] == ["the paper's loss", "5.0e-07", "2.0e-07", "", ""]
    assert rows(text)["FFT relaxation"] == ["relaxed sum", "1.0e-07", "2.0e-07", "8.0e-02", "2.5e+00"]
    assert "of another value and gradient: FFT relaxation by up to 8 % and 250 %." in text


def test_limits_say_where_a_step_goes(results: Record) -> None:
    text = tables.limits(results)
    found = rows(text)["100 × 1000"]
    assert found[:6] == ["1", "dual", "10", "8", "1.25", "0.25"]
    assert found[7:] == ["50", "60", "10", "8", "1.25", "60 %", "30 %", "10 %"]
    assert (
        "At 200 × 1000 a step takes 3.00 times its matrix products alone: elementwise 70 %, products 20 % and "
        "rest 10 % of it." in text
    )


def test_the_host_is_told_by_what_it_stands_beside(results: Record) -> None:
    text = tables.host(results)
    assert rows(text)["eager"] == ["4 × 16", "float32", "100", "textbook", "125", "0.80×"]
    assert rows(text)["Triton on a pretended GPU"][3:] == ["an empty autograd.Function", "30", "3.0×"]
    assert "dispatches 50 operations at 4 × 16 and 60 operations at 64 × 2048" in text
    assert "executes none of the 3 launches" in text
    results["host"]["left_out"] = {results["host"]["steps"].pop()["what"]: "triton is not installed"}
    text = tables.host(results)
    assert "launches" not in text
    assert text.endswith("Not measured: Triton on a pretended GPU, because triton is not installed.")


def test_processes_are_right_too_short_or_refuse(results: Record) -> None:
    text = tables.over_processes(results)
    assert "Right everywhere (errors below 0.001): barlow_loss." in text
    assert "right direction and a wrong length with textbook (1/W of it)." in text
    assert "lightly refuses: “shards must be even \\| or else”." in text
    assert rows(text)["textbook"] == ["1.0e-07 / 5.0e-01 / 1.0000", "1.0e-01 / 6.0e-01 / 0.9500"]
    assert rows(text)["lightly"][1] == "refuses"


def test_nobody_is_called_right_who_is_not(results: Record) -> None:
    for setting in results["distributed"]["exactness"]:
        setting["contenders"]["barlow_loss"] = {"loss_error": 0.1, "gradient_error": 0.1, "gradient_cosine": 0.9}
    assert "Right everywhere (errors below 0.001): none." in tables.over_processes(results)


def test_distributed_gives_time_and_bytes(results: Record) -> None:
    text = tables.distributed(results)
    assert rows(text)["100 × 1000"] == ["2", "20", "16×", "5.0×", "4.00", "64.00"]
    assert "The loopback's own counter shows 1.500 times" in text


def test_training_before_and_after(results: Record) -> None:
    text = tables.training(results)
    assert rows(text)["projector alone"] == ["256", "3", "10", "9.2", "1.09×", "10 %", "2.2 %"]
    assert "the loss takes 200 ms in place of 1,000 (5.0× as fast), 8 % of the step saved." in text
    results["training"][0]["speed_up"] = 0.5
    assert "the step 100 % longer." in tables.training(results)


def test_who_was_not_measured_is_not_spoken_of(results: Record) -> None:
    for cell in results["cells"]:
        cell["contenders"].pop("solo-learn", None)
        del cell["contenders"]["FFT relaxation"]
    del results["growth"]["features"]["contenders"]["FFT relaxation"]
    text = render.markdown(results, Path("2001-01-01-nowhere.json"))
    assert "solo-learn" not in text
    assert "FFT" not in text
    assert "Another loss than the paper's" not in text


@pytest.mark.parametrize("section", ["cells", "growth", "limits", "host", "distributed", "training"])
def test_a_section_that_is_missing_is_said(results: Record, section: str) -> None:
    results["cells"].append(fictitious.cell(256, 8192))
    del results[section]
    missing = [
        name for name, text in render.blocks(results, {}).items() if text == "Not among the results of 2001-01-01."
    ]
    assert missing == {"cells": ["gain", "bench", "exactness"]}.get(section, [section])
    render.markdown(results, Path("2001-01-01-nowhere.json"))


def test_the_page_has_every_figure_with_its_quartiles(results: Record) -> None:
    page = render.markdown(results, Path("2001-01-01-nowhere.json"))
    assert "barlow_loss, primal" in page
    assert "10 (9–11)" in page
    assert (
        "![Time and working memory of each contender over those of barlow_loss](2001-01-01-nowhere-comparison.png)"
        in page
    )


def test_a_line_for_the_terminal(results: Record) -> None:
    said = tables.line(results["cells"][0])
    assert said.startswith("100 × 1000, 1 thread, dual: 10 ms; FFT relaxation 0.50×; textbook 5.0×")
    assert said.endswith("errors 1.0e-07 2.0e-07; 7 rounds")


class Folder:
    """Pages and results in a folder of their own, with pictures that carry the digests of what they would show."""

    def __init__(self, root: Path) -> None:
        self.root, self.results = root, root / "benches" / "results" / "2001-01-01-nowhere.json"
        self.results.parent.mkdir(parents=True)
        (root / "docs").mkdir()
        for name in PLACES:
            with self.page(name).open("a") as file:
                file.write(f"# A\n<!-- {name}:begin -->\n<!-- {name}:end -->\n")
        figures = fictitious.results()
        figures["cells"].append(fictitious.cell(256, 8192))
        self.results.write_text(json.dumps(figures))
        for kind, shown in pictures.pictures(figures).items():
            pictures.picture(self.results, kind).write_bytes(fictitious.png(pictures.KEYWORD, pictures.digest(shown)))
        self.flags = ["--results", str(self.results.parent), "--root", str(self.root)]
        render.main(self.flags)

    def page(self, block: str) -> Path:
        return self.root / PLACES[block]

    def change(self, figure: Callable[[Record], None]) -> None:
        """Another figure in the JSON."""
        figures = json.loads(self.results.read_text())
        figure(figures)
        self.results.write_text(json.dumps(figures))

    def complaints(self) -> list[str]:
        return render.stale(self.results, self.root)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_what_was_written_passes_the_check(folder: Folder) -> None:
    assert folder.complaints() == []
    before = folder.page("bench").read_text()
    render.main([*folder.flags, "--check"])
    assert folder.page("bench").read_text() == before
    assert "(../benches/results/2001-01-01-nowhere-growth.png)" in before
    assert before.startswith("# A\n<!-- bench:begin -->\nForward and backward, float32, 1 thread, on Fictitious 9000")


def test_the_readme_says_what_is_gained(folder: Folder) -> None:
    text = folder.page("gain").read_text()
    assert "(benches/results/2001-01-01-nowhere-comparison.png)" in text
    assert "| one CPU thread, float32 | 8,590 ms, 1,074 MB | — | 210 ms, 41.9 MB | — |" in text
    gpu = {"textbook, eager": 2e-3, "ours, Triton": 1e-3}
    contenders = {name: {"seconds": fictitious.spread(s), "peak_bytes": 5e8} for name, s in gpu.items()}
    cell = {"n": 256, "d": 8192, "setting": "fp32", "contenders": contenders | {"textbook, compiled": None}}
    record = {"environment": {"device": "Fictitious GPU"}, "cells": [cell]}
    assert "| Fictitious GPU, fp32 | 2 ms, 500 MB | — | 1 ms, 500 MB | — |" in tables.gain(
        json.loads(folder.results.read_text()), record
    )


@pytest.mark.parametrize("name", PLACES)
def test_a_block_that_was_edited_is_named(folder: Folder, name: str) -> None:
    page = folder.page(name)
    text = page.read_text()
    block = re.compile(rf"(<!-- {name}:begin -->.*?)(\d)(?=[^\d].*?<!-- {name}:end -->)", re.DOTALL)
    edited = block.sub(lambda found: found[1] + str((int(found[2]) + 1) % 10), text, count=1)
    assert edited != text
    page.write_text(edited)
    assert folder.complaints() == [
        f"{page.name}: the block “{name}” does not hold the figures of 2001-01-01-nowhere.json"
    ]
    with pytest.raises(SystemExit, match=f"(?s)“{name}”.*python benches/render.py"):
        render.main([*folder.flags, "--check"])
    assert page.read_text() == edited


def test_a_figure_that_changed_is_named_everywhere(folder: Folder) -> None:
    folder.change(lambda results: results["cells"][0]["contenders"]["textbook"].update(working_bytes=77_000_000))
    assert folder.complaints() == [
        "performance.md: the block “bench” does not hold the figures of 2001-01-01-nowhere.json",
        "2001-01-01-nowhere.md: expected the figures of 2001-01-01-nowhere.json",
        "2001-01-01-nowhere-growth.png: drawn from other figures than those of 2001-01-01-nowhere.json",
    ]


def test_a_picture_that_is_missing_broken_or_another_is_named(folder: Folder) -> None:
    picture = pictures.picture(folder.results, pictures.COMPARISON)
    whole = picture.read_bytes()
    for content in (b"", whole[:60], whole.replace(b"sha256\0", b"sha256\0f"), fictitious.png("Author", "nobody")):
        picture.write_bytes(content)
        assert folder.complaints() == [f"{picture.name}: drawn from other figures than those of {folder.results.name}"]
    picture.unlink()
    assert folder.complaints() == [f"{picture.name}: expected a picture of {folder.results.name}, there is none"]


def test_a_missing_marker_is_named(folder: Folder) -> None:
    page = folder.page("limits")
    page.write_text(page.read_text().replace("<!-- limits:end -->", ""))
    with pytest.raises(SystemExit, match="<!-- limits:end -->"):
        folder.complaints()


def test_a_block_without_figures_needs_no_place(folder: Folder) -> None:
    folder.change(lambda results: results.pop("host"))
    page = folder.page("host")
    page.write_text(re.sub(r"<!-- host:.*?-->\n", "", page.read_text()))
    render.main(folder.flags)
    assert folder.complaints() == []
    folder.change(lambda results: results.update(host=fictitious.host()))
    with pytest.raises(SystemExit, match="<!-- host:begin -->"):
        folder.complaints()


def test_the_newest_results_are_taken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make bench"):
        machine.newest(tmp_path)
    for name in ("2025-12-31-zen.json", "2026-01-02-arm.json", "2026-01-01-zen.json", "loader.json", "2027-01-01-x.md"):
        (tmp_path / name).touch()
    assert machine.newest(tmp_path).name == "2026-01-02-arm.json"
    with pytest.raises(SystemExit, match="make bench"):
        render.main(["--results", str(tmp_path / "nowhere"), "--check"])
