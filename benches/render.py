"""Puts results into the README, and into pages and pictures beside them; or checks that they are what stands there.

Each block of the README stands between two markers. The figures are those of the newest file of results; those of the
block on bytes are a model's. A block without figures is left out where the README has no markers for it.

    python benches/render.py             takes over the newest results: blocks, and the pages and pictures beside them
    python benches/render.py --check     writes nothing; names what is not as the newest results that git tracks say
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gpu
import pictures
import relatives
import tables
from machine import RESULTS, load, newest, tracked
from pictures import COMPARISON, GROWTH
from tables import details, insert, paragraphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from machine import Record

README = Path(__file__).parents[1] / "README.md"
TITLES = {
    COMPARISON: "Time and working memory of each contender over those of barlow_loss",
    GROWTH: "Time against D and against N, and working memory against D, of each contender",
}


def blocks(results: Record, images: dict[str, str]) -> dict[str, str]:
    """What stands in the README between the markers, by their name; ``images`` are what refers to the pictures."""
    speed, growth = tables.speed(results), tables.growth(results)
    head = tables.setting(results), images.get(COMPARISON, "")
    measured = {
        "bench": speed and paragraphs(*head, speed, tables.memory(results)),
        "growth": growth and paragraphs(images.get(GROWTH, ""), growth),
        "exactness": tables.exactness(results),
        "limits": tables.limits(results),
        "host": tables.host(results),
        "distributed": tables.distributed(results),
        "training": tables.training(results),
    }
    return {name: text or _missing(results) for name, text in measured.items()} | {"bytes": tables.bytes_on_gpus()}


def _missing(results: Record) -> str:
    return f"Not among the results of {results['date']}."


def markdown(results: Record, results_path: Path) -> str:
    """The page beside the results: the README's tables, and all figures with quartiles."""
    get, growth = results.get, results.get("growth", {})
    sections = {
        "Time": (tables.speed(results), tables.memory(results), details(get("cells", []))),
        "Growth": (_image(results, results_path, GROWTH), tables.growth(results), details(growth.values())),
        "Exactness": (tables.exactness(results),),
        "Limits": (tables.limits(results), details(get("limits", []))),
        "Host": (tables.host(results), details(get("host", {}).get("steps", []))),
        "Several processes": (tables.distributed(results), details(get("distributed", {}).get("cells", []))),
        "Training": (tables.training(results), details(get("training", []))),
    }
    written = [f"## {title}\n\n{text}" for title, texts in sections.items() if (text := paragraphs(*texts))]
    head = ["# Benches", tables.setting(results), _image(results, results_path, COMPARISON)]
    return f"{paragraphs(*head, *written)}\n"


def _image(results: Record, results_path: Path, kind: str, folder: Path | None = None) -> str:
    """The Markdown that shows a picture in a page of ``folder``, if these results have it."""
    if kind not in pictures.pictures(results):
        return ""
    path = os.path.relpath(pictures.picture(results_path, kind), folder or results_path.parent)
    return f"![{TITLES[kind]}]({Path(path).as_posix()})"


def readme_blocks(results: Record, results_path: Path, readme: Path) -> dict[str, str]:
    """The blocks of a README; those without figures only where it has a place for them."""
    now, missing = readme.read_text(encoding="utf-8"), _missing(results)
    found = blocks(results, {kind: _image(results, results_path, kind, readme.parent) for kind in TITLES})
    return {name: text for name, text in found.items() if text != missing or f"<!-- {name}:begin -->" in now}


def other_pages() -> dict[Path, str]:
    """What the pages of a GPU, of the relatives and of more views are to say."""
    pages = {RESULTS / "gpu.md": gpu.markdown(load(RESULTS / "gpu.json"))}
    for name in relatives.TABLES:
        page = relatives.DOCS / f"{name}.md"
        if page.exists():  # no part of a source distribution
            pages[page] = relatives.page_with(name, load(page.with_suffix(".json")))
    return pages


def stale(results_path: Path, readme: Path) -> list[str]:
    """What does not say what the results say: blocks of the README, the page beside the results, the pictures."""
    results, now = load(results_path), readme.read_text(encoding="utf-8")
    found = [
        f"{readme.name}: the block “{name}” does not hold the figures of {results_path.name}"
        for name, text in readme_blocks(results, results_path, readme).items()
        if insert(now, name, text) != now
    ]
    page = results_path.with_suffix(".md")
    if not page.exists() or page.read_text(encoding="utf-8") != markdown(results, results_path):
        found.append(f"{page.name}: expected the figures of {results_path.name}")
    return found + _stale_pictures(results, results_path)


def _stale_pictures(results: Record, results_path: Path) -> list[str]:
    found = []
    for kind, shown in pictures.pictures(results).items():
        path = pictures.picture(results_path, kind)
        if not path.exists():
            found.append(f"{path.name}: expected a picture of {results_path.name}, there is none")
        elif pictures.drawn_from(path) != pictures.digest(shown):
            found.append(f"{path.name}: drawn from other figures than those of {results_path.name}")
    return found


def write(results_path: Path, readme: Path) -> None:
    """Set right what is stale; pictures are drawn anew only where their figures have changed."""
    results, now = load(results_path), readme.read_text(encoding="utf-8")
    for name, text in readme_blocks(results, results_path, readme).items():
        now = insert(now, name, text)
    readme.write_text(now, encoding="utf-8")
    results_path.with_suffix(".md").write_text(markdown(results, results_path), encoding="utf-8")
    if _stale_pictures(results, results_path):
        pictures.draw(results, results_path)


def main(flags: Sequence[str] | None = None) -> None:
    """The program; ``flags`` in place of those of the command line."""
    parser = argparse.ArgumentParser(description="Put the figures of the benches into the README.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results; the newest are taken")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    arguments = parser.parse_args(flags)
    try:
        results_path = (tracked if arguments.check else newest)(arguments.results)
    except FileNotFoundError as reason:
        sys.exit(str(reason))
    others = other_pages() if arguments.results == RESULTS else {}
    if not arguments.check:
        write(results_path, arguments.readme)
        for page, text in others.items():
            page.write_text(text, encoding="utf-8")
        return
    found = stale(results_path, arguments.readme)
    for page, text in others.items():
        if page.read_text(encoding="utf-8") != text:
            found.append(f"{page.name}: expected the figures of {page.stem}.json, and what the model says")
    if found:
        sys.exit("\n".join([*found, "Run python benches/render.py"]))


if __name__ == "__main__":
    main()
