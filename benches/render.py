"""Puts results into README, docs, and pages and pictures beside them; or checks that they are what stands there.

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
    from collections.abc import Iterator, Sequence

    from machine import Record

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/processes.md")  # of a repository, with markers for the blocks
TITLES = {
    COMPARISON: "Time and working memory of each contender over those of barlow_loss",
    GROWTH: "Time against D and against N, and working memory against D, of each contender",
}


def blocks(results: Record, images: dict[str, str], gpu_results: Record | None = None) -> dict[str, str]:
    """What stands in the pages between the markers, by their name; ``images`` are what refers to the pictures."""
    speed, growth, gain = tables.speed(results), tables.growth(results), tables.gain(results, gpu_results)
    head = tables.setting(results), images.get(COMPARISON, "")
    measured = {
        "gain": gain and paragraphs(images.get(COMPARISON, ""), gain),
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
    """The page beside the results: the tables of the pages, and all figures with quartiles."""
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


def _written(results: Record, results_path: Path, root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """A page, a block's name, what stands in the page and what it will be, for every block in the pages of ``root``.

    Raises:
        SystemExit: no page has a place for a block with figures.
    """
    on_gpu = results_path.with_name("gpu.json")
    on_gpu_results = load(on_gpu) if on_gpu.exists() else None
    sought = {name for name, text in blocks(results, {}).items() if text != _missing(results)}
    for page in [root / name for name in PAGES if (root / name).exists()]:
        images = {kind: _image(results, results_path, kind, page.parent) for kind in TITLES}
        for name, text in blocks(results, images, on_gpu_results).items():
            now = page.read_text(encoding="utf-8")
            if f"<!-- {name}:begin -->" in now:
                sought.discard(name)
                yield page, name, now, insert(now, name, text)
    if sought:
        raise SystemExit(f"expected <!-- {min(sought)}:begin --> and its end in one of {', '.join(PAGES)}, found none")


def other_pages() -> dict[Path, str]:
    """What the pages of a GPU, of the relatives and of more views are to say."""
    pages = {RESULTS / "gpu.md": gpu.markdown(load(RESULTS / "gpu.json"))}
    for name in relatives.TABLES:
        page = relatives.DOCS / f"{name}.md"
        if page.exists():  # no part of a source distribution
            pages[page] = relatives.page_with(name, load(page.with_suffix(".json")))
    return pages


def stale(results_path: Path, root: Path) -> list[str]:
    """What does not say what the results say: blocks of the pages, the page beside the results, the pictures."""
    results = load(results_path)
    found = [
        f"{page.name}: the block “{name}” does not hold the figures of {results_path.name}"
        for page, name, now, wanted in _written(results, results_path, root)
        if now != wanted
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


def write(results_path: Path, root: Path) -> None:
    """Set right what is stale; pictures are drawn anew only where their figures have changed."""
    results = load(results_path)
    for page, _, _, wanted in _written(results, results_path, root):
        page.write_text(wanted, encoding="utf-8")
    results_path.with_suffix(".md").write_text(markdown(results, results_path), encoding="utf-8")
    if _stale_pictures(results, results_path):
        pictures.draw(results, results_path)


def main(flags: Sequence[str] | None = None) -> None:
    """The program; ``flags`` in place of those of the command line."""
    parser = argparse.ArgumentParser(
        description="Put the figures of the benches into the README and the documentation."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results; the newest are taken")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    arguments = parser.parse_args(flags)
    try:
        results_path = (tracked if arguments.check else newest)(arguments.results)
    except FileNotFoundError as reason:
        sys.exit(str(reason))
    others = other_pages() if arguments.results == RESULTS else {}
    if not arguments.check:
        write(results_path, arguments.root)
        for page, text in others.items():
            page.write_text(text, encoding="utf-8")
        return
    found = stale(results_path, arguments.root)
    for page, text in others.items():
        if page.read_text(encoding="utf-8") != text:
            found.append(f"{page.name}: expected the figures of {page.stem}.json, and what the model says")
    if found:
        sys.exit("\n".join([*found, "Run python benches/render.py"]))


if __name__ == "__main__":
    main()
