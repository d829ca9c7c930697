"""What the pictures of the results show, where they lie, and whether one is stale.

Each picture keeps in its PNG the SHA-256 of the figures that it shows, so that a stale one can be told without drawing
it anew, and without matplotlib, which plots.py draws with.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from baselines import OURS, OURS_COMPILED
from table_speed import FULL_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Record = dict[str, Any]

KEYWORD = "figures-sha256"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GROWTH, COMPARISON = "growth", "comparison"
SHOWN = (256, 8192)  # the cell of the comparison
NOT_DRAWN = (*FULL_ONLY, OURS_COMPILED)  # in the picture of growth, where its lines would cover those of ours


class Line(NamedTuple):
    """A contender's figures along an axis, and the exponent fitted to them where there is one."""

    name: str
    x: list[float]
    y: list[float]
    exponent: float | None


class Bar(NamedTuple):
    """A contender in the cell of the comparison: time over ours with quartiles, and memory over ours."""

    name: str
    definition: str
    median: float
    q1: float
    q3: float
    memory: float


def growth_figures(results: Record) -> Record:
    """What the picture of growth shows; empty where it was not measured."""
    found = results.get("growth")
    if not found:
        return {}
    n, d = found["features"]["n"], found["samples"]["d"]
    return {
        "n": n,
        "d": d,
        "time by features": _fits(found["features"], "d"),
        "time by samples": _fits(found["samples"], "n"),
        "memory by features": _memory(results.get("cells", []), n),
    }


def _fits(line: Record, axis: str) -> list[Line]:
    return [
        Line(name, fit[axis], [1e3 * s for s in fit["seconds"]], fit["exponent"])
        for name, fit in line["contenders"].items()
        if name not in NOT_DRAWN
    ]


def _memory(cells: list[Record], n: int) -> list[Line]:
    points: dict[str, dict[float, float]] = {}
    for cell in cells:
        if cell["n"] == n:
            for name, contender in cell["contenders"].items():
                points.setdefault(name, {})[cell["d"]] = contender["working_bytes"] / 1e6
    return [
        Line(name, sorted(at), [at[d] for d in sorted(at)], None)
        for name, at in points.items()
        if len(at) > 1 and name not in NOT_DRAWN
    ]


def comparison_figures(results: Record) -> Record:
    """What the picture of the comparison shows: the cell 256 × 8192, or the largest where most were measured."""
    cells = results.get("cells", [])
    if not cells:
        return {}
    cell = max(cells, key=lambda c: ((c["n"], c["d"]) == SHOWN, len(c["contenders"]), c["d"], -c["threads"]))
    ours = cell["contenders"][OURS]
    bars = [
        Bar(name, c["definition"], **c["times_ours"], memory=c["working_bytes"] / ours["working_bytes"])
        for name, c in cell["contenders"].items()
        if name not in FULL_ONLY
    ]
    base = {"ms": 1e3 * ours["seconds"]["median"], "MB": ours["working_bytes"] / 1e6}
    return {"n": cell["n"], "d": cell["d"], "threads": cell["threads"], "ours": base, "bars": bars}


def pictures(results: Record) -> dict[str, Record]:
    """The figures of each picture that these results have, by the end of its name."""
    figures = {GROWTH: growth_figures(results), COMPARISON: comparison_figures(results)}
    return {kind: found for kind, found in figures.items() if found}


def picture(results_path: Path, kind: str) -> Path:
    """Where the picture of a file of results lies: beside it."""
    return results_path.with_name(f"{results_path.stem}-{kind}.png")


def digest(figures: Record) -> str:
    """SHA-256 of what a picture shows."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a PNG keeps, or None; a broken file has none.

    A PNG is its signature and then chunks: length, type, content, checksum. A tEXt chunk holds keyword, zero, text.
    """
    for kind, content in _chunks(path.read_bytes()):
        keyword, _, text = content.partition(b"\0")
        if kind == b"tEXt" and keyword.decode("latin-1") == KEYWORD:
            return text.decode("latin-1")
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        content, checksum = data[position + 8 : position + 8 + length], data[position + 8 + length :][:4]
        if checksum != struct.pack(">I", zlib.crc32(kind + content)):
            return
        yield kind, content
        position += 12 + length
