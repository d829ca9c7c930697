"""The tables of how near a step is to what the machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from table_format import between, grid, listed, ms, paragraphs, percent, plain, shape, spread

if TYPE_CHECKING:
    Record = dict[str, Any]


def limits(results: Record) -> str:
    """Ours beside its matrix products alone, and beside what the machine's ceilings allow."""
    cells = results.get("limits", [])
    if not cells:
        return ""
    head = ["N × D", "threads", "algorithm", "ours, ms", "its GEMMs alone, ms", "ours / GEMMs"]
    head += ["GFLOP", "GB moved besides", "ceilings: GFLOP/s in these shapes", "in a square", "GB/s"]
    head += ["model, ms", "ours / model", "of the step: products", "elementwise", "rest"]
    return paragraphs(grid(head, map(_limit_row, cells)), _limit_sentences(cells))


def _limit_row(cell: Record) -> list[str]:
    ceilings = cell["ceilings"]
    return [
        shape(cell),
        str(cell["threads"]),
        cell["algorithm"],
        ms(cell["seconds"]),
        ms(cell["gemms"]["seconds"]),
        f"{cell['ours_over_gemms']['median']:.2f}",
        plain(cell["flops"] / 1e9),
        plain(cell["bytes"] / 1e9),
        plain(ceilings["flops_per_second"] / 1e9),
        plain(ceilings["square_flops_per_second"] / 1e9),
        plain(ceilings["bytes_per_second"] / 1e9),
        plain(1e3 * cell["model_seconds"]),
        f"{_over_model(cell):.2f}",
        *(percent(share) for share in _shares(cell).values()),
    ]


def _over_model(cell: Record) -> float:
    over: float = cell["seconds"]["median"] / cell["model_seconds"]
    return over


def _shares(cell: Record) -> dict[str, float]:
    """The parts of a step, as shares of their sum."""
    parts = {name: cell["parts"][name] for name in ("products", "elementwise", "rest")}
    return {name: seconds / sum(parts.values()) for name, seconds in parts.items()}


def _limit_sentences(cells: list[Record]) -> str:
    near = min(cells, key=lambda cell: float(cell["ours_over_gemms"]["median"]))
    far = max(cells, key=lambda cell: float(cell["ours_over_gemms"]["median"]))
    over = [_over_model(cell) for cell in cells]
    notes = [
        "Its GEMMs alone are whole products through torch.mm; a step uses the symmetry of two of the dual's.",
        "The model is the step's FLOPs and bytes at the measured ceilings, as if one waited for the other and no byte "
        f"came from the cache; the steps take {between(over, 2)} times that.",
    ]
    return " ".join([*(_limit_sentence(cell) for cell in ([near] if near is far else [near, far])), *notes])


def _limit_sentence(cell: Record) -> str:
    """Where the time of a step goes, and so what there is left to win."""
    shares = _shares(cell)
    parts = listed(f"{name} {percent(shares[name])}" for name in sorted(shares, key=shares.__getitem__, reverse=True))
    ratio = cell["ours_over_gemms"]["median"]
    return f"At {shape(cell)} a step takes {ratio:.2f} times its matrix products alone: {parts} of it."


def limit_details(results: Record) -> str:
    """The step and its products, with quartiles."""
    cells = results.get("limits", [])
    if not cells:
        return ""
    head = [
        "N × D",
        "threads",
        "rounds",
        "ours, ms (quartiles)",
        "GEMMs, ms (quartiles)",
        "ratio (quartiles)",
        "torch.mm of",
    ]
    rows = []
    for cell in cells:
        spreads = [spread(cell["seconds"], 1e3), spread(cell["gemms"]["seconds"], 1e3)]
        spreads.append(spread(cell["ours_over_gemms"]))
        shapes = ", ".join(cell["gemms"]["shapes"])
        rows.append([shape(cell), str(cell["threads"]), str(cell["rounds"]), *spreads, shapes])
    return grid(head, rows)
