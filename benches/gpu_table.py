"""Turns the figures of gpu.py, or the model alone where nothing was measured, into Markdown and a plot."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gpu_clock import chip
from gpu_model import (
    AUTOCAST,
    COMPILED,
    CONTENDERS,
    GRAPH,
    GRID,
    H100,
    MODELS,
    SETTINGS,
    TEXTBOOK,
    TRITON,
    Chip,
    Setting,
    floor,
    least_bytes,
    predicted,
)
from table_format import grid
from workload import Cell

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Record = dict[str, Any]

SMALL, LARGE = Cell(256, 8192), Cell(2048, 8192)
NOTHING_MEASURED = """\
# The loss on a GPU: predictions, nothing measured

**No GPU was at hand. No figure on this page was measured**: all of them are computed by the byte and FLOP model in
`benches/gpu_model.py` from ceilings that are assumptions. The columns "measured" are empty until `make gpu` has run on
a machine with a GPU, and are then filled by it."""
SMOKE = """\
# CPU smoke, no GPU figures

**These figures mean nothing**: `benches/gpu.py --smoke` ran on tiny CPU tensors to show that the program works."""


def line(record: Record) -> str:
    """One cell for the terminal."""
    parts = []
    for name, found in record["contenders"].items():
        if "seconds" in found:
            errors = f"errors {found['loss_error']:.0e} {found['gradient_error']:.0e}"
            parts.append(f"{name} {_ms(found['seconds']['median'])} ms ({errors})")
        else:
            parts.append(f"{name}: {_instead(found)}")
    return f"{record['n']}×{record['d']}, {record['setting']}: {'; '.join(parts)}; {record['rounds']} rounds"


def markdown(results: Record | None) -> str:
    """The page: what it stands on, the goals, and two tables for each setting."""
    card = H100 if results is None else chip(results["environment"]["device"], results["ceilings"])
    cells = {} if results is None else {(r["n"], r["d"], r["setting"]): r for r in results["cells"]}
    parts = [_head(results), _ceilings(card, measured=results is not None)]
    if results is None or not results["smoke"]:
        parts += ["## Goals, bf16 autocast on an H100", _goals(card, cells)]
    for setting in SETTINGS:
        rows = list(_rows(setting, cells))
        if rows:
            parts += [f"## {setting.name}", _times(setting, card, rows), _memory(setting, rows)]
    left_out = [] if results is None else [f"- {reason}" for reason in results["left_out"]]
    names = dict.fromkeys(name for record in cells.values() for name in record["contenders"] if name not in CONTENDERS)
    left_out += [f"- {name}: as it was measured; it is no contender any more" for name in names]
    return "\n\n".join([*parts, *left_out, _NOTES]) + "\n"


_NOTES = """\
Time: forward and backward to the gradients of both views, by events, the L2 cache overwritten before each step; median
and quartiles over rounds in which the contenders take turns; ratios are taken within a round. *Back to back*: steps in
a row, the host's share included. A predicted range is without and with a second pass over operands just read, which
the L2 cache serves where they fit there. TFLOP/s: those of the contender's own products; GB/s: the bytes that it moves
by the model. *Floor*: the larger of FLOPs of the dual over the rate of a large product and of views read once and
gradients written once over the rate of a copy. Memory: the rise during a step beyond the views; *held* leaves out the
returned gradients.
Errors: relative distance to float64 on the same views, of the loss and of both gradients by norm. What was measured is
the code of that day; predictions, and the bytes behind GB/s, are those of the model as it is now."""


def _head(results: Record | None) -> str:
    if results is None:
        return NOTHING_MEASURED
    if results["smoke"]:
        return SMOKE
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    absent = [name for name, version in machine["versions"].items() if not version]
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    gone = f" Not installed there: {', '.join(absent)}." if absent else ""
    return (
        f"# The loss on a GPU\n\nMeasured on {machine['device']}{driver}, CUDA or ROCm {machine['runtime']}, "
        f"{machine['system']}, Python {machine['python']}, {versions}.{gone}"
    )


def _ceilings(card: Chip, measured: bool) -> str:
    how = "Ceilings measured in the same run" if measured else f"Ceilings assumed ({card.name})"
    return (
        f"{how}: copy {card.bandwidth / 1e12:.2f} TB/s (read and written), products in 16 bits "
        f"{card.half / 1e12:.0f} TFLOP/s, in fp32 {card.single / 1e12:.1f} TFLOP/s, "
        f"{1e6 * card.launch:.1f} µs a launch on the device, {1e6 * card.host:.1f} µs an operation on the host."
    )


def _rows(setting: Setting, cells: dict[Any, Record]) -> Iterator[tuple[Cell, str, Record, Record]]:
    """Every contender of every cell: what was measured of it, and of the cell; both empty where nothing was."""
    if not cells:
        for cell in GRID:
            yield from ((cell, name, {}, {}) for name in CONTENDERS)
    for (n, d, where), record in sorted(cells.items()):
        if where == setting.name:
            yield from ((Cell(n, d), name, found, record) for name, found in record["contenders"].items())


def _times(setting: Setting, card: Chip, rows: list[tuple[Cell, str, Record, Record]]) -> str:
    head = ["N × D", "contender", "predicted, ms", "measured, ms (quartiles)", "back to back, ms"]
    head += ["× ours, Triton: predicted", "measured", "× floor: predicted", "measured", "TFLOP/s", "GB/s"]
    lines = []
    for cell, name, found, record in rows:
        low_high = predicted(name, cell, setting, card) if name in MODELS else None
        least = floor(cell, setting, card)
        cost = MODELS[name](cell, setting) if name in MODELS else None
        seconds = found["seconds"]["median"] if "seconds" in found else None
        times = found.get("times", {}).get(TRITON)
        row = [f"{cell.n} × {cell.d}", name, _range(low_high, 1e3)]
        row.append(_spread(found["seconds"], 1e3) if seconds else _instead(found))
        row.append(_ms(found["back_to_back"]) if seconds else "")
        row += [_ratio(low_high, predicted(TRITON, cell, setting, card)), _spread(times, 1) if times else ""]
        row += [_range(low_high, 1 / least), f"{seconds / least:.2f}" if seconds else ""]
        row += [_plain(cost.flops / seconds / 1e12) if seconds and cost else ""]
        row += [_plain(cost.moved / seconds / 1e9) if seconds and cost else ""]
        lines.append(row)
        if record and name == list(record["contenders"])[-1]:
            alone = ["products of the dual alone", _plain(1e3 * 8 * cell.n**2 * cell.d / card.rate(setting))]
            rate = _plain(8 * cell.n**2 * cell.d / record["products"]["median"] / 1e12)
            lines.append([f"{cell.n} × {cell.d}", *alone, _spread(record["products"], 1e3), *[""] * 5, rate, ""])
    return grid(head, lines)


def _memory(setting: Setting, rows: list[tuple[Cell, str, Record, Record]]) -> str:
    head = ["N × D", "contender", "least bytes, MB", "bytes moved by the model, MB", "GFLOP"]
    head += ["held, MB: predicted", "measured", "with the gradients, MB: predicted", "measured"]
    head += ["loss error", "gradient error"]
    lines = []
    for cell, name, found, _ in rows:
        cost = MODELS[name](cell, setting) if name in MODELS else None
        gradients = 2 * cell.n * cell.d * setting.view
        peak = found.get("peak_bytes")
        row = [f"{cell.n} × {cell.d}", name, _plain(least_bytes(cell, setting) / 1e6)]
        row += [_plain(cost.moved / 1e6), _plain(cost.flops / 1e9)] if cost else ["", ""]
        row += [_plain(cost.working / 1e6) if cost else "", _mb(peak, -found.get("gradient_bytes", 0))]
        row += [_plain((cost.working + gradients) / 1e6) if cost else "", _mb(peak)]
        row += [f"{found[key]:.1e}" if key in found else "" for key in ("loss_error", "gradient_error")]
        lines.append(row)
    return grid(head, lines)


def _goals(card: Chip, cells: dict[Any, Record]) -> str:
    """The figures to reach, beside what the model expects and what was measured."""
    rows = []
    for cell, ours, times in ((LARGE, TRITON, {TEXTBOOK: 5, COMPILED: 3}), (SMALL, GRAPH, {TEXTBOOK: 20, COMPILED: 6})):
        record = cells.get((cell.n, cell.d, AUTOCAST.name), {}).get("contenders", {})
        mine = record.get(ours, {})
        low_high = predicted(ours, cell, AUTOCAST, card)
        least = floor(cell, AUTOCAST, card)
        seconds = mine["seconds"]["median"] if "seconds" in mine else None
        where = f"{cell.n} × {cell.d}"
        if cell == LARGE:
            reached = f"{seconds / least:.2f} × floor" if seconds else ""
            rows.append([f"{where}: {ours}", "≤ 1.35 × floor", f"{_range(low_high, 1 / least)} × floor", reached])
        else:
            rows.append(
                [
                    f"{where}: {ours}",
                    "≤ 60 µs",
                    f"{_range(low_high, 1e6)} µs",
                    f"{1e6 * seconds:.1f} µs" if seconds else "",
                ]
            )
        for name, least_ratio in times.items():
            ratio = record.get(name, {}).get("times", {}).get(ours)
            expected = _ratio(predicted(name, cell, AUTOCAST, card), low_high)
            reached = f"{ratio['median']:.1f}×" if ratio else ""
            rows.append([f"{where}: {name} over {ours}", f"≥ {least_ratio}×", f"{expected}×", reached])
        bytes_allowed = 220 if cell == LARGE else 25
        cost = MODELS[TRITON](cell, AUTOCAST)
        with_gradients = (cost.working + 2 * cell.n * cell.d * AUTOCAST.view) / 1e6
        found = record.get(TRITON, {}).get("peak_bytes")
        title = f"{where}: {TRITON}, peak memory with the gradients"
        rows.append(
            [title, f"≤ {bytes_allowed} MB", f"{with_gradients:.1f} MB", f"{found / 1e6:.1f} MB" if found else ""]
        )
    return grid(["what", "goal", "predicted", "measured"], rows)


def plot(results: Record, path: Path) -> bool:
    """Times of all contenders over the cells, one panel for each setting; False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    card = chip(results["environment"]["device"], results["ceilings"])
    figure, panels = plt.subplots(1, len(SETTINGS), figsize=(13, 4.5), sharey=True, squeeze=False)
    width = 0.8 / len(CONTENDERS)
    for panel, setting in zip(panels[0], SETTINGS, strict=True):
        records = sorted(
            (r for r in results["cells"] if r["setting"] == setting.name), key=lambda r: (r["n"] * r["d"], r["d"])
        )
        labels = [f"{r['n']}×{r['d']}" for r in records]
        for offset, name in enumerate(CONTENDERS):
            found = [(i, r["contenders"][name]) for i, r in enumerate(records) if name in r["contenders"]]
            points = [
                (i + width * (offset + 0.5) - 0.4, 1e3 * c["seconds"]["median"]) for i, c in found if "seconds" in c
            ]
            if points:
                panel.bar(*zip(*points, strict=True), width=width, label=name, color=f"C{offset}")
        floors = [1e3 * floor(Cell(r["n"], r["d"]), setting, card) for r in records]
        panel.hlines(floors, *([i + edge for i in range(len(records))] for edge in (-0.4, 0.4)), "black", label="floor")
        panel.set(title=setting.name, yscale="log", xticks=range(len(records)))
        panel.set_xticklabels(labels, rotation=30, ha="right")
    panels[0][0].set_ylabel("forward + backward, ms")
    panels[0][0].legend(fontsize=8)
    figure.suptitle("CPU smoke, no GPU figures" if results["smoke"] else results["environment"]["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _instead(found: Record) -> str:
    text: str = found.get("failed") or found.get("left_out") or ""
    return text.replace("|", "/")


def _range(low_high: tuple[float, float] | None, unit: float) -> str:
    if low_high is None:
        return ""
    low, high = (_plain(unit * value) for value in low_high)
    return low if low == high else f"{low}–{high}"


def _ratio(over: tuple[float, float] | None, base: tuple[float, float]) -> str:
    """Least and largest ratio of two predicted ranges that pass over their operands alike."""
    if over is None:
        return ""
    low, high = sorted((over[1] / base[1], over[0] / base[0]))
    return _range((low, high), 1) if over != base else "1"


def _ms(seconds: float) -> str:
    return _plain(1e3 * seconds)


def _mb(size: int | None, more: int = 0) -> str:
    return "" if size is None else _plain((size + more) / 1e6)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Record, unit: float) -> str:
    median, q1, q3 = (_plain(unit * values[key]) for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"
