"""The pages and pictures say what the results say, and the check sees when they do not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fictitious
import pytest
from fictitious import Record

import measure
import render
from contenders import DUAL, OURS, PRIMAL, TEXTBOOK

ROOT = Path(__file__).parents[2]
PLACES = {  # of the blocks
    "gain": "README.md",
    **dict.fromkeys(("bench", "growth", "exactness", "limits", "host", "training"), "docs/performance.md"),
    **dict.fromkeys(("distributed", "bytes"), "docs/processes.md"),
}
MOST_BYTES = 150_000  # of a picture


@pytest.fixture
def results() -> Record:
    return fictitious.results()


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's rows, by the first of them."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def test_every_page_and_picture_agrees_with_the_committed_results() -> None:
    render.main(["--check"])


def test_another_page_that_is_stale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {path: text.replace("0", "1") for path, text in render.other_pages().items()}
    monkeypatch.setattr(render, "other_pages", lambda: pages)
    with pytest.raises(SystemExit, match=r"gpu.md.*python benches/render.py"):
        render.main(["--check"])


def test_what_the_pages_say_of_several_processes_is_so() -> None:
    """Ours alone is right everywhere, and the gradient of the published program is 1/W of the right one."""
    for setting in measure.load(measure.newest(committed=True))["distributed"]["exactness"]:
        found = {name: own for name, own in setting["contenders"].items() if "refused" not in own}
        right = [name for name, own in found.items() if max(own["loss_error"], own["gradient_error"]) < 1e-3]
        assert right == [OURS]
        assert found[TEXTBOOK]["gradient_error"] == pytest.approx(1 - 1 / setting["processes"], abs=1e-3)
        assert found[TEXTBOOK]["gradient_cosine"] > 0.9999


def test_speed_is_ours_in_ms_and_the_others_over_it(results: Record) -> None:
    text, _, memory = render.speed(results).rpartition("\n\n")
    found = rows(text)
    assert found["N × D"] == ["algorithm", "ours, ms", "FFT relaxation", "textbook", "lightly", "solo-learn"]
    assert found["100 × 1000"] == ["dual", "10", "0.5", "5", "6", "20"]
    assert found["100 × 4000"] == ["dual", "40", "0.5", "20", "—", "—"]
    assert rows(memory)["100 × 2000"] == ["4", "4", "64", "64", "64"]
    assert rows(memory)["100 × 4000"] == ["8", "8", "256", "—", "—"]


def test_a_cell_that_only_later_contenders_share_keeps_its_columns(results: Record) -> None:
    results["cells"].insert(0, fictitious.cell(50, 500, but=("textbook",)))
    found = rows(render.speed(results).rpartition("\n\n")[0])
    assert found["100 × 1000"][2:5] == ["0.5", "6", "20"]
    assert found["50 × 500"][-1] == "—"


def test_growth_gives_exponents_and_the_largest_d(results: Record) -> None:
    found = rows(render.growth(results))
    assert found["barlow_loss"] == ["D^1.00", "N^1.00", "800,000", "≈ 300,000"]
    assert found["textbook"] == ["D^2.00", "—", "≈ 11,000", "≈ 10,900"]


def test_exactness_takes_the_largest_error_and_says_what_differs(results: Record) -> None:
    results["cells"][1]["contenders"]["textbook"]["error_of_own"]["loss"] = 5e-7
    found = rows(render.exactness(results))
    assert found["textbook"] == ["paper", "5e-07", "2e-07", "—", "—"]
    assert found["FFT relaxation"] == ["relaxed", "1e-07", "2e-07", "0.08", "2.5"]


def test_limits_say_where_a_step_goes(results: Record) -> None:
    found = rows(render.table(results["limits"], render.LIMITS))["100 × 1000"]
    assert found == ["dual", "10", "8", "1.25", "8", "6", "3", "1"]


def test_the_host_is_told_by_what_it_stands_beside(results: Record) -> None:
    text = render.host(results)
    assert rows(text)["eager"] == ["4 × 16", "float32", "0.1", "textbook", "0.125", "0.8"]
    assert rows(text)["Triton on a pretended GPU"][3:] == ["an empty autograd.Function", "0.03", "3"]
    assert (rows(text)["4 × 16"], rows(text)["64 × 2048"]) == (["50"], ["60"])
    results["host"]["left_out"] = {results["host"]["steps"].pop()["what"]: "triton is not installed"}
    assert render.host(results).endswith("Triton on a pretended GPU, because triton is not installed.")


def test_processes_have_time_and_bytes_and_everybodys_errors(results: Record) -> None:
    found = rows(render.distributed(results))
    assert found["100 × 1000"] == ["2", "20", "16", "5", "0.5", "4", "64"]
    assert found["textbook"] == ["1.0e-07 / 5.0e-01 / 1.0000", "1.0e-01 / 6.0e-01 / 0.9500"]
    assert "| refuses: shards must be even \\| or else |" in render.distributed(results)


def test_training_before_and_after(results: Record) -> None:
    found = rows(render.table(results["training"], render.TRAINING))["projector alone"]
    assert found == ["256", "3", "10", "9.2", "1.09", "1,000", "200", "10", "2.17"]


def test_who_was_not_measured_is_not_spoken_of(results: Record) -> None:
    for cell in results["cells"]:
        cell["contenders"].pop("solo-learn", None)
        del cell["contenders"]["FFT relaxation"]
    del results["growth"]["features"]["contenders"]["FFT relaxation"]
    text = render.page(results, Path("2001-01-01-nowhere.json"))
    assert "solo-learn" not in text
    assert "FFT" not in text


@pytest.mark.parametrize("section", ["cells", "growth", "limits", "host", "distributed", "training"])
def test_a_section_that_is_missing_is_said(results: Record, section: str) -> None:
    del results[section]
    where = Path("2001-01-01-nowhere.json")
    blocks = render.blocks(results, where, where.parent)
    missing = [name for name, text in blocks.items() if text == "Not among the results of 2001-01-01."]
    assert missing == {"cells": ["gain", "bench", "exactness"]}.get(section, [section])
    assert render.page(results, where).count("Not among the results") == len(missing)


class Folder:
    """Pages and results in a folder of their own, with pictures that carry the digest of what they would show."""

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
        for kind in render.TITLES:
            self.picture(kind).write_bytes(fictitious.png(render.KEYWORD, render.digest(figures)))
        self.write()

    def page(self, block: str) -> Path:
        return self.root / PLACES[block]

    def picture(self, kind: str) -> Path:
        return render.picture(self.results, kind)

    def write(self) -> None:
        render.write(render.pages(self.results, self.root), self.results)

    def change(self, figure: Callable[[Record], None]) -> None:
        """Another figure in the JSON."""
        figures = json.loads(self.results.read_text())
        figure(figures)
        self.results.write_text(json.dumps(figures))

    def complaints(self) -> list[str]:
        return render.stale(render.pages(self.results, self.root)) + render.stale_pictures(self.results)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_what_was_written_passes_the_check(folder: Folder) -> None:
    assert folder.complaints() == []
    text = folder.page("bench").read_text()
    assert "(../benches/results/2001-01-01-nowhere-growth.png)" in text
    assert text.startswith("# A\n<!-- bench:begin -->\nForward and backward, float32, one thread, on Fictitious 9000")


def test_the_readme_says_what_is_gained(folder: Folder) -> None:
    text = folder.page("gain").read_text()
    assert "(benches/results/2001-01-01-nowhere-comparison.png)" in text
    assert "| one CPU thread, float32 | 8,590 ms, 1,074 MB | — | 210 ms, 41.9 MB | — |" in text
    gpu = {"textbook, eager": 2e-3, "ours, Triton": 1e-3}
    contenders = {name: {"seconds": fictitious.spread(s), "peak_bytes": 5e8} for name, s in gpu.items()}
    cell = {"n": 256, "d": 8192, "setting": "fp32", "contenders": contenders}
    record = {"environment": {"device": "Fictitious GPU"}, "cells": [cell]}
    text = render.gain({**json.loads(folder.results.read_text()), "gpu": record})
    assert "| Fictitious GPU, fp32 | 2 ms, 500 MB | — | 1 ms, 500 MB | — |" in text


@pytest.mark.parametrize("name", PLACES)
def test_a_page_with_a_block_that_was_edited_is_named(folder: Folder, name: str) -> None:
    page = folder.page(name)
    text = page.read_text()
    block = re.compile(rf"(<!-- {name}:begin -->.*?)(\d)(?=[^\d].*?<!-- {name}:end -->)", re.DOTALL)
    edited = block.sub(lambda found: found[1] + str((int(found[2]) + 1) % 10), text, count=1)
    assert edited != text
    page.write_text(edited)
    assert folder.complaints() == [page.name]


def test_a_figure_that_changed_is_named_everywhere(folder: Folder) -> None:
    folder.change(lambda results: results["cells"][0]["contenders"]["textbook"].update(working_bytes=77_000_000))
    assert folder.complaints() == [
        "2001-01-01-nowhere.md",
        "performance.md",
        "2001-01-01-nowhere-comparison.png",
        "2001-01-01-nowhere-growth.png",
    ]


def test_a_picture_that_is_missing_broken_or_another_is_named(folder: Folder) -> None:
    picture = folder.picture(render.COMPARISON)
    whole = picture.read_bytes()
    for content in (b"", whole[:60], whole.replace(b"sha256\0", b"sha256\0f"), fictitious.png("Author", "nobody")):
        picture.write_bytes(content)
        assert folder.complaints() == [picture.name]
    picture.unlink()
    assert folder.complaints() == [picture.name]


def test_a_missing_marker_is_named(folder: Folder) -> None:
    page = folder.page("limits")
    page.write_text(page.read_text().replace("<!-- limits:end -->", ""))
    with pytest.raises(SystemExit, match="<!-- limits:end -->"):
        folder.complaints()


def test_a_part_without_cells_has_no_pictures_and_needs_none(folder: Folder) -> None:
    folder.change(lambda results: [results.pop(name) for name in ("cells", "growth")])
    assert render.stale_pictures(folder.results) == []
    folder.write()
    assert "![" not in folder.page("growth").read_text()


def test_a_block_without_figures_needs_no_place(folder: Folder) -> None:
    folder.change(lambda results: results.pop("host"))
    page = folder.page("host")
    page.write_text(re.sub(r"<!-- host:.*?-->\n", "", page.read_text()))
    folder.write()
    assert folder.complaints() == []
    folder.change(lambda results: results.update(host=fictitious.host()))
    with pytest.raises(SystemExit, match="<!-- host:begin -->"):
        folder.complaints()


def test_the_newest_results_are_taken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make bench"):
        measure.newest(tmp_path)
    for name in ("2025-12-31-zen.json", "2026-01-02-arm.json", "2026-01-01-zen.json", "loader.json", "2027-01-01-x.md"):
        (tmp_path / name).touch()
    assert measure.newest(tmp_path).name == "2026-01-02-arm.json"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("matplotlib")
    return render.draw(fictitious.results(), tmp_path_factory.mktemp("drawn") / "2001-01-01-nowhere.json")


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_two_pictures_that_load_fast_on_a_white_ground(drawn: list[Path]) -> None:
    from PIL import Image

    assert [path.name for path in drawn] == ["2001-01-01-nowhere-comparison.png", "2001-01-01-nowhere-growth.png"]
    for path in drawn:
        assert path.stat().st_size < MOST_BYTES
        assert render.digest(fictitious.results()).encode() in path.read_bytes()
        with Image.open(path) as picture:
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert picture.width > 1000


def test_the_few_colours_of_the_file_tell_the_contenders_apart(drawn: list[Path]) -> None:
    from PIL import Image

    with Image.open(drawn[1]) as picture:
        present = {colour for _, colour in picture.convert("RGB").getcolors(2**16)}
    for colour in (render.BLUE, *render.OTHERS[:2]):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(wanted, found, strict=True)) for found in present) <= 16, colour


def test_the_digest_depends_on_the_figures_and_is_that_of_the_stored_ones(results: Record) -> None:
    before = render.digest(results)
    assert render.digest(json.loads(json.dumps(results))) == before
    results["cells"][0]["contenders"]["barlow_loss"]["working_bytes"] += 1
    assert render.digest(results) != before


def test_all_contenders_are_named_at_their_lines_and_bars(results: Record) -> None:
    pytest.importorskip("matplotlib")
    for figure in (render.draw_growth(results), render.draw_comparison(results)):
        said = texts(figure)
        for name in results["cells"][0]["contenders"]:
            assert (name in said) == (name not in (PRIMAL, DUAL)), name


def test_the_comparison_shows_its_cell_or_the_fullest(results: Record) -> None:
    pytest.importorskip("matplotlib")
    shown = render.compared(results)
    assert (shown["n"], shown["d"]) == (100, 2000)  # at D = 4000 some are missing
    results["cells"].append(fictitious.cell(256, 8192, but=("lightly",)))
    assert "Time of a step at 256 × 8192" in texts(render.draw_comparison(results))
