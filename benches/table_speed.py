"""The tables of one process: the setting, and what time and working memory a step takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baselines import DUAL, OURS, PRIMAL
from table_format import (
    NONE,
    between,
    counted,
    error,
    grid,
    megabytes,
    ms,
    names,
    paragraphs,
    shape,
    spread,
    times,
)

if TYPE_CHECKING:
    Record = dict[str, Any]

FULL_ONLY = (PRIMAL, DUAL)  # they tell where "auto" should change over, which the README does not discuss


def setting(results: Record, threads: str | None = None) -> str:
    """The machine, the versions, and the day."""
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"Forward and backward, float32, {threads or _threads(results)}, on {machine['cpu']} "
        f"({counted(machine['cores'], 'core')}, {machine['instructions']}), {machine['system']}, "
        f"Python {machine['python']}, {versions}; {results['date']}."
    )


def _threads(results: Record) -> str:
    counts = sorted({cell["threads"] for cell in results.get("cells", [])})
    return " or ".join(counted(count, "thread") for count in counts) or "one process"


def compact(records: list[Record]) -> list[str]:
    """The contenders that the README's tables have a column or row for."""
    return [name for name in names(records) if name not in FULL_ONLY]


def speed(results: Record) -> str:
    """Ours in milliseconds, the others in multiples of it."""
    cells = _in_order(results)
    if not cells:
        return ""
    others = [name for name in compact(cells) if name != OURS]
    head = ["N × D", "threads", "algorithm", "ours, ms", *others]
    rows = [[shape(cell), str(cell["threads"]), cell["algorithm"], *_speeds(cell, others)] for cell in cells]
    if len({cell["threads"] for cell in cells}) == 1:
        head, rows = _without_threads(head), [_without_threads(row) for row in rows]
    notes = ["Medians of ratios to a turn of ours right before, in one process: 5× is five times as long as ours."]
    noise = [cell["contenders"][DUAL]["times_ours"]["median"] for cell in cells if _is_the_same(cell)]
    if noise:
        notes.append(f"Ours against itself in the same way, {counted(len(noise), 'shape')}: {between(noise, 2)}×.")
    if any(NONE in row for row in rows):
        notes.append(f"{NONE}: not measured there.")
    return paragraphs(grid(head, rows), " ".join(notes))


def _is_the_same(cell: Record) -> bool:
    """Whether the cell has ours twice: as "auto", which chose the dual, and as the dual."""
    return cell["algorithm"] == "dual" and DUAL in cell["contenders"]


def _in_order(results: Record) -> list[Record]:
    return sorted(results.get("cells", []), key=lambda cell: (cell["n"], cell["d"], cell["threads"]))


def _without_threads(row: list[str]) -> list[str]:
    return [*row[:1], *row[2:]]


def _speeds(cell: Record, others: list[str]) -> list[str]:
    contenders = cell["contenders"]
    row = [ms(contenders[OURS]["seconds"])]
    return row + [times(contenders[name]["times_ours"]["median"]) if name in contenders else NONE for name in others]


def memory(results: Record) -> str:
    """Working memory of all, a row for each shape."""
    cells: dict[str, Record] = {}  # of several thread counts the first: the bytes are those of all
    for cell in _in_order(results):
        cells.setdefault(shape(cell), cell["contenders"])
    if not cells:
        return ""
    columns = compact(results["cells"])
    rows = []
    for where, contenders in cells.items():
        sizes = [contenders[name]["working_bytes"] if name in contenders else None for name in columns]
        rows.append([where, *(NONE if size is None else megabytes(size) for size in sizes)])
    note = (
        "Working memory is what a step allocates beyond its inputs and gradients: the peak of PyTorch's own "
        "allocations, those inside its kernels and of generated code too, without the scratch of MKL and oneDNN."
    )
    return paragraphs(grid(["working memory, MB", *columns], rows), note)


def details(results: Record) -> str:
    """Every contender in every cell, with quartiles."""
    cells = results.get("cells", [])
    if not cells:
        return ""
    head = ["N × D", "threads", "rounds", "what", "ms (quartiles)", "× ours (quartiles)", "working memory, MB"]
    head += ["computes", "loss error", "gradient error", "from the paper's: loss", "gradient"]
    rows = []
    for cell in cells:
        where = [shape(cell), str(cell["threads"]), str(cell["rounds"])]
        for name, c in cell["contenders"].items():
            row = [
                *where,
                name,
                spread(c["seconds"], 1e3),
                spread(c["times_ours"]),
                megabytes(c["working_bytes"]),
            ]
            own = c["error_of_own"]
            found = [own["loss"], own["gradient"], c["loss_error"], c["gradient_error"]]
            rows.append([*row, c["definition"], *map(error, found)])
    return grid(head, rows)
