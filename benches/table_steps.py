"""The tables of whole steps: over several processes, on many GPUs by the model, and in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traffic
from baselines import OURS, TEXTBOOK
from table_exactness import over_processes
from table_format import between, counted, error, grid, ms, paragraphs, percent, plain, shape, spread, times
from table_speed import setting
from workload import Cell

if TYPE_CHECKING:
    Record = dict[str, Any]

GPUS = (8, 16, 64, 256, 1024)
GPU_CELLS = (Cell(2048, 8192), Cell(4096, 32768))


def distributed(results: Record) -> str:
    """Time and bytes over several processes, and what becomes of everybody's answers there."""
    section = results.get("distributed")
    if not section:
        return ""
    return paragraphs(
        setting(results, "one thread a process"),
        _distributed_table(section["cells"], results["environment"]["cores"]),
        over_processes(results),
    )


def _distributed_table(cells: list[Record], cores: int) -> str:
    if not cells:
        return ""
    head = ["N × D", "processes", "ours, ms", "textbook, × ours", "its products and all-reduce alone, × ours"]
    head += ["a rank sends, MB: ours", "textbook"]
    rows = []
    for cell in cells:
        ours, textbook = (cell["contenders"][name] for name in (OURS, TEXTBOOK))
        ratios = [times(found["times_ours"]["median"]) for found in (textbook, cell["floor"])]
        sent = [_sent(ours), _sent(textbook)]
        rows.append([shape(cell), str(cell["processes"]), ms(ours["seconds"]), *ratios, *sent])
    return paragraphs(grid(head, rows), _distributed_sentences(cells, cores))


def _distributed_sentences(cells: list[Record], cores: int) -> str:
    ours = [cell["contenders"][OURS] for cell in cells]
    loss, gradient = (error(max(c[field] for c in ours)) for field in ("loss_error", "gradient_error"))
    header = cells[0]["header"]["seconds"]
    sentences = [
        "Gloo over the loopback; the slowest rank's time; medians of per-round ratios.",
        f"Ours is at most {loss} from the loss of the whole batch in float64 and {gradient} from its gradient.",
        f"The header takes {ms(header)} ms of a step at {cells[0]['processes']} processes.",
    ]
    sentences += [
        f"{cell['processes']} processes share {counted(cores, 'core')}." for cell in cells if cell["processes"] > cores
    ]
    counters = [c["sent"]["loopback"] / c["sent"]["collectives"] for c in ours if c["sent"]["loopback"]]
    if counters:
        sentences.append(
            f"The loopback's own counter shows {between(counters, 3)} times the bytes that stand here for ours."
        )
    return "\n".join(sentences)


def distributed_details(results: Record) -> str:
    """Every figure of the steps over several processes, with quartiles."""
    cells = results.get("distributed", {}).get("cells", [])
    if not cells:
        return ""
    head = ["N × D", "processes", "rounds", "what", "ms (quartiles)", "× ours (quartiles)"]
    head += ["loss error", "gradient error", "gradient, × true", "MB sent: by the collectives", "by the loopback"]
    return grid(head, [row for cell in cells for row in _distributed_rows(cell)])


def _distributed_rows(cell: Record) -> list[list[str]]:
    where = [shape(cell), str(cell["processes"]), str(cell["rounds"])]
    rows = []
    for name, c in cell["contenders"].items():
        found = [error(c["loss_error"]), error(c["gradient_error"]), f"{c['gradient_factor']:g}"]
        found += [_sent(c), _sent(c, "loopback")]
        rows.append([*where, name, spread(c["seconds"], 1e3), spread(c["times_ours"]), *found])
    floor, header, nothing = cell["floor"], cell["header"], [""] * 5
    title = "textbook's products and all-reduce alone"
    rows.append([*where, title, spread(floor["seconds"], 1e3), spread(floor["times_ours"]), *nothing])
    rows.append([*where, "header of ours alone", spread(header["seconds"], 1e3), "", *nothing])
    return rows


def _sent(contender: Record, counted_by: str = "collectives") -> str:
    size: float | None = contender["sent"][counted_by]
    return "" if size is None else f"{size / 1e6:,.2f}"


def bytes_model() -> str:
    """What a step costs each of many GPUs, for the README: the model of traffic.py."""
    head = ["N × D", "GPUs", "all-reduce of C, MB", "ours, float32, MB", "ours, 16 bit, MB", "vectors in either, MB"]
    rows = [_gpu_row(cell, count) for cell in GPU_CELLS for count in GPUS]
    sentence = (
        "What each of W GPUs sends in a step, forward and backward, by ring algorithms: W − 1 times what it gives to a "
        "gather, 2 (W − 1)/W times a sum's size. It receives as much. The vectors of the textbook's batch norm are not "
        "counted."
    )
    return f"{sentence}\n\n{grid([*head, 'textbook, GFLOP', 'ours, GFLOP'], rows)}"


def _gpu_row(cell: Cell, count: int) -> list[str]:
    textbook, ours, half = traffic.textbook(cell, count), traffic.dual(cell, count), traffic.dual(cell, count, 2)
    sent = [f"{cost.sent / 1e6:,.0f} ({100 * cost.sent / textbook.sent:.1f} %)" for cost in (ours, half)]
    flops = [plain(cost.flops / 1e9) for cost in (textbook, ours)]
    return [
        f"{cell.n} × {cell.d}",
        str(count),
        plain(textbook.sent / 1e6),
        *sent,
        f"{half.vectors / 1e6:.1f}",
        *flops,
    ]


def training(results: Record) -> str:
    """A whole step before and after the textbook loss is replaced by ours."""
    records = results.get("training", [])
    if not records:
        return ""
    head = ["", "pairs", "threads", "a step with the textbook, s", "with ours, s", "speed-up"]
    head += ["the loss's share: textbook", "ours"]
    rows = []
    for record in records:
        steps = [plain(record["steps"][name]) for name in (TEXTBOOK, OURS)]
        shares = [percent(_share(record, name)) for name in (TEXTBOOK, OURS)]
        counts = [str(record["batch_size"]), str(record["threads"])]
        rows.append([record["what"], *counts, *steps, f"{record['speed_up']:.2f}×", *shares])
    return paragraphs(grid(head, rows), "\n".join(map(_training_sentence, records)))


def _share(record: Record, name: str) -> float:
    """What a step takes beyond the rest, which is a step with ours but for our loss; over the step."""
    rest = record["steps"][OURS] - record["losses"][OURS]["median"]
    return 1 - float(rest / record["steps"][name])


def _training_sentence(record: Record) -> str:
    """The change in one line; a step of features alone has no images."""
    ratio, factor = record["textbook_over_ours"]["median"], record["speed_up"]
    image = f" at {record['image_size']} pixels" if record.get("image_size") else ""
    saved = 1 - 1 / factor
    change = f"{percent(saved)} of the step saved" if saved > 0 else f"the step {percent(1 / factor - 1)} longer"
    return (
        f"{record['what'][0].upper()}{record['what'][1:]}{image}, {record['batch_size']} pairs, "
        f"projector {record['projector']} wide: by itself the loss takes "
        f"{plain(1e3 * record['losses'][OURS]['median'])} ms in place of "
        f"{plain(1e3 * record['losses'][TEXTBOOK]['median'])} ({times(ratio)} as fast), {change}.{_summed(record)}"
    )


def _summed(record: Record) -> str:
    """How a step with a backbone was put together; the others are timed as they are."""
    if "backbone" not in record["parts"]:
        return ""
    chunks, images = record["chunks"]
    return (
        " This step is the sum of its parts, each measured by itself; the backbone's is the median of a chunk of "
        f"{images} images, times {chunks}."
    )


def training_details(results: Record) -> str:
    """The parts of a step, and both losses with quartiles."""
    records = results.get("training", [])
    if not records:
        return ""
    rows = []
    for record in records:
        where = [record["what"], str(record["batch_size"]), str(record["rounds"])]
        rows += [[*where, part, plain(seconds)] for part, seconds in record["parts"].items()]
        rows += [[*where, f"loss: {name}", spread(found)] for name, found in record["losses"].items()]
    return grid(["", "pairs", "rounds", "part of a step", "s"], rows)
