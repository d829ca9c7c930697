"""The pictures: what they show, whom, how large they are, and the digest that they keep."""

import json
from pathlib import Path
from typing import Any

import fictitious
import pytest

import pictures
from contenders import DUAL, PRIMAL

pytest.importorskip("matplotlib")

MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures.draw(fictitious.results(), tmp_path_factory.mktemp("drawn") / "2001-01-01-nowhere.json")


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_two_pictures_that_load_fast_on_a_white_ground(drawn: list[Path]) -> None:
    from PIL import Image

    assert [path.name for path in drawn] == ["2001-01-01-nowhere-growth.png", "2001-01-01-nowhere-comparison.png"]
    for path in drawn:
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert picture.width > 1000


def test_the_few_colours_of_the_file_tell_the_contenders_apart(drawn: list[Path]) -> None:
    from PIL import Image

    colours = pictures.colours_of(pictures.growth_figures(fictitious.results())).values()
    with Image.open(drawn[0]) as picture:
        present = {colour for _, colour in picture.convert("RGB").getcolors(2**16)}
    for colour in set(colours):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(wanted, found, strict=True)) for found in present) <= 16, colour


def test_a_picture_keeps_the_digest_of_what_it_shows(drawn: list[Path]) -> None:
    shown = pictures.pictures(fictitious.results())
    assert [pictures.drawn_from(path) for path in drawn] == [pictures.digest(figures) for figures in shown.values()]


def test_the_digest_depends_on_every_figure_shown() -> None:
    results = fictitious.results()
    before = pictures.digest(pictures.growth_figures(results))
    results["growth"]["samples"]["contenders"]["barlow_loss"]["seconds"][0] += 1e-6
    assert pictures.digest(pictures.growth_figures(results)) != before


def test_the_digest_is_that_of_the_stored_figures() -> None:
    """What a file of results holds must give the digest of what was in memory when it was written."""
    results = fictitious.results()
    for kind, shown in pictures.pictures(json.loads(json.dumps(results))).items():
        assert pictures.digest(shown) == pictures.digest(pictures.pictures(results)[kind])


def test_all_contenders_are_named_at_their_lines_and_bars() -> None:
    results = fictitious.results()
    for figure in (
        pictures.draw_growth(pictures.growth_figures(results)),
        pictures.draw_comparison(pictures.comparison_figures(results)),
    ):
        said = texts(figure)
        for name in results["cells"][0]["contenders"]:
            assert (name in said) == (name not in (PRIMAL, DUAL)), name


def test_the_comparison_shows_its_cell_or_the_fullest() -> None:
    results = fictitious.results()
    shown = pictures.comparison_figures(results)
    assert (shown["n"], shown["d"]) == (100, 2000)  # at D = 4000 some are missing
    assert "256 × 8192" not in texts(pictures.draw_comparison(shown))
    results["cells"].append(fictitious.cell(256, 8192, but=("lightly",)))
    assert "Time of a step at 256 × 8192" in texts(pictures.draw_comparison(pictures.comparison_figures(results)))


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    results = fictitious.results()
    del results["growth"]
    assert [path.name for path in pictures.draw(results, tmp_path / "2001-01-01-x.json")] == [
        "2001-01-01-x-comparison.png"
    ]
    del results["cells"]
    assert pictures.draw(results, tmp_path / "2001-01-01-y.json") == []
