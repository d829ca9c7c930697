"""Turns results into Markdown, and puts them into the README; or checks that they are what stands there.

Each block of the README stands between two markers. The figures are those of the newest file of results; those of the
block on bytes are a model's, traffic.py. The tables are written by table_speed.py, table_growth.py, table_exactness.py,
table_limits.py and table_host.py (one process) and table_steps.py (several, and training); the pictures are drawn by
plots.py. A block that the README has no markers for is left out, if the results have nothing for it.

    python benches/table.py             takes over the newest results: the blocks, and the page and pictures beside them
    python benches/table.py --check     writes nothing; names what is not as the newest results that git tracks say
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plot_figures
import table_exactness
import table_growth
import table_host
import table_limits
import table_speed
import table_steps
from baselines import OURS
from committed import load, newest, tracked
from machine import RESULTS
from table_format import counted, error, ms, names, paragraphs, shape, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    Record = dict[str, Any]

README = Path(__file__).parents[1] / "README.md"
PICTURES = {
    plot_figures.COMPARISON: "Time and working memory of each contender over those of barlow_loss",
    plot_figures.GROWTH: "Time against D and against N, and working memory against D, of each contender",
}


def line(cell: Record) -> str:
    """One cell of compare.py, for the terminal."""
    ours = cell["contenders"][OURS]
    found = [f"{shape(cell)}, {counted(cell['threads'], 'thread')}, {cell['algorithm']}: {ms(ours['seconds'])} ms"]
    for name, other in cell["contenders"].items():
        if name != OURS:
            found.append(f"{name} {times(other['times_ours']['median'])}")
    found.append(f"errors {error(ours['loss_error'])} {error(ours['gradient_error'])}")
    return "; ".join([*found, counted(cell["rounds"], "round")])


def blocks(results: Record, images: dict[str, str]) -> dict[str, str]:
    """What stands in the README between the markers, by their name; ``images`` are what refers to the pictures."""
    setting = table_speed.setting(results)
    speed, memory = table_speed.speed(results), table_speed.memory(results)
    measured = {
        "bench": speed and paragraphs(setting, images.get(plot_figures.COMPARISON, ""), speed, memory),
        "growth": (growth := table_growth.growth(results)) and paragraphs(images.get(plot_figures.GROWTH, ""), growth),
        "exactness": table_exactness.exactness(results),
        "limits": table_limits.limits(results),
        "host": table_host.host(results),
        "distributed": table_steps.distributed(results),
        "training": table_steps.training(results),
    }
    return {name: text or _missing(results) for name, text in measured.items()} | {"bytes": table_steps.bytes_model()}


def _missing(results: Record) -> str:
    return f"Not among the results of {results['date']}."


def markdown(results: Record, results_path: Path) -> str:
    """The page beside the results: all of them, with quartiles."""
    sections = {
        "Time": (table_speed.speed(results), table_speed.details(results)),
        "Working memory": (table_speed.memory(results),),
        "Growth": (_image(results, results_path, plot_figures.GROWTH), table_growth.growth_details(results)),
        "Exactness": (table_exactness.exactness(results, names),),
        "Limits": (table_limits.limits(results), table_limits.limit_details(results)),
        "Host": (table_host.host(results), table_host.host_details(results)),
        "Several processes": (table_steps.distributed(results), table_steps.distributed_details(results)),
        "Training": (table_steps.training(results), table_steps.training_details(results)),
    }
    written = [f"## {title}\n\n{text}" for title, texts in sections.items() if (text := paragraphs(*texts))]
    head = ["# Benches", table_speed.setting(results), _image(results, results_path, plot_figures.COMPARISON)]
    return f"{paragraphs(*head, *written)}\n"


def _image(results: Record, results_path: Path, kind: str, folder: Path | None = None) -> str:
    """The Markdown that shows a picture in a page of ``folder``, if these results have it."""
    if kind not in plot_figures.pictures(results):
        return ""
    path = os.path.relpath(plot_figures.picture(results_path, kind), folder or results_path.parent)
    return f"![{PICTURES[kind]}]({Path(path).as_posix()})"


def readme_blocks(results: Record, results_path: Path, readme: Path) -> dict[str, str]:
    """The blocks of a README; those without figures only where it has a place for them."""
    images = {kind: _image(results, results_path, kind, readme.parent) for kind in PICTURES}
    now, missing = readme.read_text(encoding="utf-8"), _missing(results)
    found = blocks(results, images)
    return {name: text for name, text in found.items() if text != missing or f"<!-- {name}:begin -->" in now}


def insert(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` between the markers ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"README.md: expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{text}\n{end}{after}"


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
    return found + [
        reason for kind in plot_figures.pictures(results) if (reason := _stale_picture(results, results_path, kind))
    ]


def _stale_picture(results: Record, results_path: Path, kind: str) -> str:
    path = plot_figures.picture(results_path, kind)
    if not path.exists():
        return f"{path.name}: expected a picture of {results_path.name}, there is none"
    if plot_figures.drawn_from(path) != plot_figures.digest(plot_figures.pictures(results)[kind]):
        return f"{path.name}: drawn from other figures than those of {results_path.name}"
    return ""


def write(results_path: Path, readme: Path) -> None:
    """Set right what is stale; a picture is drawn anew only where its figures have changed."""
    results, now = load(results_path), readme.read_text(encoding="utf-8")
    for name, text in readme_blocks(results, results_path, readme).items():
        now = insert(now, name, text)
    readme.write_text(now, encoding="utf-8")
    results_path.with_suffix(".md").write_text(markdown(results, results_path), encoding="utf-8")
    if any(_stale_picture(results, results_path, kind) for kind in plot_figures.pictures(results)):
        from plots import draw  # needs matplotlib, the check does not

        draw(results, results_path)


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
    if not arguments.check:
        write(results_path, arguments.readme)
    elif found := stale(results_path, arguments.readme):
        sys.exit("\n".join([*found, "Run python benches/table.py"]))


if __name__ == "__main__":
    main()
