"""The tables of the results in Markdown, and the sentences under them.

Each section's function takes all results and returns an empty text where they do not have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import model
from contenders import DUAL, FULL_ONLY, JOINT, OURS, OURS_COMPILED, PAPER, RELAXED, TEXTBOOK, UNBIASED
from measure import cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from machine import Record
    from measure import Cell

NONE = "—"  # not measured
DIFFERENCES = {
    PAPER: "the paper's loss",
    UNBIASED: "unbiased deviation",
    JOINT: "statistics of both views together",
    RELAXED: "relaxed sum",
}
SAME_DIRECTION = 0.9999  # of cosines: the rest is length
RIGHT = 1e-3  # a gradient error below it is rounding, above it another function
GPUS = (8, 16, 64, 256, 1024)
GPU_CELLS = cells("2048x8192", "4096x32768")
_GAIN_ON_CPU = ("textbook", "textbook, torch.compile", OURS)
_GAIN_ON_GPU = ("textbook, eager", "textbook, compiled", "ours, Triton", "ours, CUDA graph")


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column to the left, the others to the right."""
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def tabulated(records: Iterable[Any], columns: dict[str, Callable[[Any], str]]) -> str:
    """A table with a row for each of the records, by what stands in which column."""
    return grid(list(columns), [[cell(record) for cell in columns.values()] for record in records])


def insert(page: str, name: str, text: str) -> str:
    """A page with ``text`` between its markers ``name``.

    Raises:
        SystemExit: it lacks one of them.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{text}\n{end}{after}"


def paragraphs(*texts: str) -> str:
    """Those that are not empty, an empty line between them."""
    return "\n\n".join(filter(None, texts))


def plain(value: float) -> str:
    """Three digits: 0.0123, 4.56, 78.9, 1,234."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def ms(seconds: Record) -> str:
    """The median, in milliseconds."""
    return plain(1e3 * seconds["median"])


def times(ratio: float) -> str:
    """A ratio as a factor: 0.43×, 5.6×, 78×."""
    return f"{ratio:#.2g}×" if ratio < 0.995 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def percent(share: float) -> str:
    """A share of one: 0.07 %, 2.6 %, 47 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def megabytes(size: float) -> str:
    """Millions of bytes."""
    return f"{size / 1e6:.2g}" if size < 1e6 else f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def error(value: float) -> str:
    """A relative distance."""
    return f"{value:.1e}"


def spread(values: Record, unit: float = 1) -> str:
    """Median, and quartiles in brackets."""
    median, q1, q3 = (f"{unit * values[key]:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def between(values: Sequence[float], digits: int) -> str:
    """``"1.25 to 3.40"``, or ``"1.25"`` where all are the same."""
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))


def listed(items: Iterable[str]) -> str:
    """``"a, b and c"``."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def shape(record: Record) -> str:
    """The cell of a record."""
    return f"{record['n']} × {record['d']}"


def counted(number: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def names(records: Iterable[Record]) -> list[str]:
    """The contenders of all ``records``, in the order in which they are first met."""
    return list(dict.fromkeys(name for record in records for name in record["contenders"]))


def setting(results: Record, threads: str | None = None) -> str:
    """The machine, the versions, and the day."""
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    counts = sorted({cell["threads"] for cell in results.get("cells", [])})
    threads = threads or " or ".join(counted(count, "thread") for count in counts) or "one process"
    return (
        f"Forward and backward, float32, {threads}, on {machine['cpu']} "
        f"({counted(machine['cores'], 'core')}, {machine['instructions']}), {machine['system']}, "
        f"Python {machine['python']}, {versions}; {results['date']}."
    )


def line(cell: Record) -> str:
    """One cell of the section "cells", for the terminal."""
    ours = cell["contenders"][OURS]
    found = [f"{shape(cell)}, {counted(cell['threads'], 'thread')}, {cell['algorithm']}: {ms(ours['seconds'])} ms"]
    found += [f"{name} {_over_ours(cell, name)}" for name in cell["contenders"] if name != OURS]
    found.append(f"errors {error(ours['loss_error'])} {error(ours['gradient_error'])}")
    return "; ".join([*found, counted(cell["rounds"], "round")])


def _compact(records: Iterable[Record]) -> list[str]:
    """The contenders that the README's tables have a column or row for."""
    return [name for name in names(records) if name not in FULL_ONLY]


def _others(contenders: Iterable[str]) -> list[str]:
    """Those that are not ours."""
    return [name for name in contenders if name not in (OURS, OURS_COMPILED, *FULL_ONLY)]


def _over_ours(cell: Record, name: str) -> str:
    found = cell["contenders"].get(name)
    return times(found["times_ours"]["median"]) if found else NONE


def gain(results: Record, on_gpu: Record | None) -> str:
    """What a step takes by the textbook and with ours, by device and mode: N, D = 256, 8192."""
    found = [cell for cell in results.get("cells", []) if (cell["n"], cell["d"], cell["threads"]) == (256, 8192, 1)]
    if not found:
        return ""

    def cost(record: Record | None, memory: str) -> str:
        return f"{ms(record['seconds'])} ms, {megabytes(record[memory])} MB" if record else NONE

    get = found[0]["contenders"].get
    rows = [["one CPU thread, float32", *(cost(get(name), "working_bytes") for name in _GAIN_ON_CPU), NONE]]
    for cell in (on_gpu or {}).get("cells", []):
        if (cell["n"], cell["d"]) == (256, 8192):
            device = on_gpu["environment"]["device"] if on_gpu else ""
            costs = [cost(cell["contenders"].get(name), "peak_bytes") for name in _GAIN_ON_GPU]
            rows.append([f"{device}, {cell['setting']}", *costs])
    heads = [
        "256 × 8192, forward and backward",
        "textbook",
        "textbook, torch.compile",
        "barlow_loss",
        "in a CUDA graph",
    ]
    note = "Memory: on the CPU what a step allocates beyond inputs and gradients, on the GPU beyond the inputs."
    return paragraphs(grid(heads, rows), note)


def speed(results: Record) -> str:
    """Ours in milliseconds, the others in multiples of it."""
    found = sorted(results.get("cells", []), key=lambda cell: (cell["n"], cell["d"], cell["threads"]))
    if not found:
        return ""
    others = [name for name in _compact(found) if name != OURS]
    columns: dict[str, Callable[[Record], str]] = {"N × D": shape}
    if len({cell["threads"] for cell in found}) > 1:
        columns["threads"] = lambda cell: str(cell["threads"])
    columns |= {"algorithm": lambda cell: cell["algorithm"], "ours, ms": lambda cell: ms(_ours(cell)["seconds"])}
    columns |= {name: lambda cell, name=name: _over_ours(cell, name) for name in others}  # type: ignore[misc]
    notes = ["Medians of ratios to a turn of ours right before, in one process: 5× is five times as long as ours."]
    # Where "auto" chose the dual, ours is there twice.
    twice = [cell["contenders"][DUAL] for cell in found if cell["algorithm"] == "dual" and DUAL in cell["contenders"]]
    if twice:
        noise = between([each["times_ours"]["median"] for each in twice], 2)
        notes.append(f"Ours against itself in the same way, {counted(len(twice), 'shape')}: {noise}×.")
    if any(name not in cell["contenders"] for cell in found for name in others):
        notes.append(f"{NONE}: not measured there.")
    return paragraphs(tabulated(found, columns), " ".join(notes))


def _ours(cell: Record) -> Record:
    ours: Record = cell["contenders"][OURS]
    return ours


def memory(results: Record) -> str:
    """Working memory of all, a row for each shape."""
    found: dict[str, Record] = {}  # of several thread counts the first: the bytes are those of all
    for cell in sorted(results.get("cells", []), key=lambda cell: (cell["n"], cell["d"], cell["threads"])):
        found.setdefault(shape(cell), cell["contenders"])
    if not found:
        return ""
    columns = _compact(results["cells"])
    rows = [
        [where, *(megabytes(own[name]["working_bytes"]) if name in own else NONE for name in columns)]
        for where, own in found.items()
    ]
    note = (
        "Working memory is what a step allocates beyond its inputs and gradients: the peak of PyTorch's own "
        "allocations, those inside its kernels and of generated code too, without the scratch of MKL and oneDNN."
    )
    return paragraphs(grid(["working memory, MB", *columns], rows), note)


def growth(results: Record) -> str:
    """Fitted exponents of time, and the largest D that a budget of memory holds."""
    if not (found := results.get("growth")):
        return ""
    features, samples, budget = found["features"], found["samples"], found["budget"]
    gigabytes = f"{budget['bytes'] / 1e9:g} GB of working memory"
    head = ["", f"time grows as, in D (N = {features['n']})", "from D", "to D"]
    head += [f"in N (D = {samples['d']})", "from N", "to N"]
    head += [f"largest D in {gigabytes} (N = {budget['n']})", "with inputs and gradients in it"]
    rows = [
        [name, *_fit(features, name, "d"), *_fit(samples, name, "n"), *_largest_of(budget["contenders"].get(name))]
        for name in _compact([features, samples, budget])
    ]
    sentences = [_doubling(features, f"D at N = {features['n']}"), _doubling(samples, f"N at D = {samples['d']}")]
    sentences.append(_largest(budget["contenders"], gigabytes))
    if not all(each["measured"] for each in budget["contenders"].values()):
        sentences.append("≈: computed from the working memory at smaller D; the others took that step.")
    return paragraphs(grid(head, rows), " ".join(filter(None, sentences)))


def _fit(found: Record, name: str, axis: str) -> list[str]:
    if not (fit := found["contenders"].get(name)):
        return [NONE] * 3
    return [f"{axis.upper()}^{fit['exponent']:.2f}", str(min(fit[axis])), str(max(fit[axis]))]


def _largest_of(found: Record | None) -> list[str]:
    """Both D, and whether a step of it was taken or its memory follows from that of smaller ones."""
    if found is None:
        return [NONE] * 2
    return [f"{'' if found['measured'] else '≈ '}{found['features']:,}", f"≈ {found['features_in_all']:,}"]


def _doubling(found: Record, what: str) -> str:
    """What doubling costs ours, and the best and the worst of the others."""
    factors = {name: 2 ** fit["exponent"] for name, fit in found["contenders"].items()}
    if OURS not in factors:
        return ""
    ends = sorted(_others(factors), key=factors.__getitem__, reverse=True)
    shown = dict.fromkeys([ends[0], ends[-1]] if ends else [])
    said = [f"{factors[OURS]:.2f} times as long with ours", *(f"{factors[n]:.2f} times with {n}" for n in shown)]
    return f"Twice the {what} takes {listed(said)}."


def _largest(found: Record, gigabytes: str) -> str:
    """Ours beside all others, each with its own D; the variants of ours are no others."""
    sizes = {name: each["features"] for name, each in found.items()}
    ends = sorted(_others(sizes), key=sizes.__getitem__, reverse=True)
    if OURS not in sizes or not ends:
        return ""
    said = ", or ".join(f"{sizes[name]:,} ({name})" for name in dict.fromkeys([ends[0], ends[-1]]))
    return f"{gigabytes} hold a step of ours up to D = {sizes[OURS]:,}, of the others up to {said}."


def exactness(results: Record) -> str:
    """The largest distance of each contender to float64: of its own function, and of the paper's where it differs."""
    measured = results.get("cells", [])
    if not measured:
        return ""
    found = {name: [c["contenders"][name] for c in measured if name in c["contenders"]] for name in names(measured)}
    head = ["", "computes", "from its own float64: loss", "gradient", "from the paper's loss: loss", "gradient"]
    rows = []
    for name in _compact(measured):
        definition = found[name][0]["definition"]
        own = [error(max(c["error_of_own"][what] for c in found[name])) for what in ("loss", "gradient")]
        other = [""] * 2 if definition == PAPER else list(map(error, _farthest(found[name])))
        rows.append([name, DIFFERENCES[definition], *own, *other])
    loss, gradient = map(error, _farthest(found[OURS]))
    sentences = [
        f"The largest relative error over {len({shape(cell) for cell in measured})} shapes. Ours is at most {loss} "
        f"from the loss in float64 and {gradient} from its gradient."
    ]
    others = {name: map(percent, _farthest(own)) for name, own in found.items() if own[0]["definition"] != PAPER}
    if others:
        far = listed(f"{name} by up to {' and '.join(errors)}" for name, errors in others.items())
        sentences.append(f"Another loss than the paper's is computed, of another value and gradient: {far}.")
    return paragraphs(grid(head, rows), " ".join(sentences))


def _farthest(found: list[Record]) -> list[float]:
    return [max(c[what] for c in found) for what in ("loss_error", "gradient_error")]


def over_processes(results: Record) -> str:
    """What each contender makes of shards: distance to float64 of the whole batch's loss, after DDP's mean."""
    settings = results.get("distributed", {}).get("exactness", [])
    if not settings:
        return ""
    head = ["loss error / gradient error / cosine"]
    for each in settings:
        even = "even" if len(set(each["rows"])) == 1 else "uneven"
        head.append(f"{each['processes']} processes, {even}: {' + '.join(map(str, each['rows']))}")
    rows = [[name, *(_shards(each["contenders"].get(name)) for each in settings)] for name in names(settings)]
    return paragraphs(grid(head, rows), _who_is_right(settings))


def _shards(found: Record | None) -> str:
    if found is None:
        return NONE
    if "refused" in found:
        return "refuses"
    return f"{error(found['loss_error'])} / {error(found['gradient_error'])} / {found['gradient_cosine']:.4f}"


def _who_is_right(settings: list[Record]) -> str:
    """Who is right, whose gradient is only too short or too long, and who refused why."""
    found = {name: [s["contenders"][name] for s in settings if name in s["contenders"]] for name in names(settings)}
    right = [n for n, own in found.items() if len(own) == len(settings) and all(map(_is_right, own))]
    lines = [
        "The whole batch in one process, in float64, is the truth; gradients are those after DDP's mean. "
        f"Right everywhere (errors below {RIGHT:g}): {listed(right) if right else 'none'}."
    ]
    if any(scaled := [_wrong_length(settings, name) for name in found]):
        said = listed(filter(None, scaled))
        lines.append(f"The gradient has the right direction and a wrong length with {said}.")
    refusals = dict.fromkeys((name, c["refused"]) for name, own in found.items() for c in own if "refused" in c)
    lines += [f"{name} refuses: “{' '.join(why.split())}”.".replace("|", "\\|") for name, why in refusals]
    return "\n".join(lines)


def _is_right(found: Record) -> bool:
    return "refused" not in found and max(found["loss_error"], found["gradient_error"]) < RIGHT


def _wrong_length(settings: list[Record], name: str) -> str:
    """The name of one whose gradient has the right direction and a wrong length, and which; else nothing."""
    answered = [(each["processes"], each["contenders"].get(name, {})) for each in settings]
    straight = [(w, c["gradient_error"]) for w, c in answered if c.get("gradient_cosine", 0) > SAME_DIRECTION]
    if all(length <= RIGHT for _, length in straight):
        return ""
    return f"{name} (1/W of it)" if all(abs(off - (1 - 1 / w)) < RIGHT for w, off in straight) else name


def limits(results: Record) -> str:
    """Ours beside its matrix products alone, and beside what the machine's ceilings allow."""
    found = results.get("limits", [])
    if not found:
        return ""
    columns: dict[str, Callable[[Record], str]] = {
        "N × D": shape,
        "threads": lambda cell: str(cell["threads"]),
        "algorithm": lambda cell: cell["algorithm"],
        "ours, ms": lambda cell: ms(cell["seconds"]),
        "its GEMMs alone, ms": lambda cell: ms(cell["gemms"]["seconds"]),
        "ours / GEMMs": lambda cell: f"{cell['ours_over_gemms']['median']:.2f}",
        "GFLOP": lambda cell: plain(cell["flops"] / 1e9),
        "GB moved besides": lambda cell: plain(cell["bytes"] / 1e9),
        "ceilings: GFLOP/s in these shapes": lambda cell: plain(cell["ceilings"]["flops_per_second"] / 1e9),
        "in a square": lambda cell: plain(cell["ceilings"]["square_flops_per_second"] / 1e9),
        "GB/s": lambda cell: plain(cell["ceilings"]["bytes_per_second"] / 1e9),
        "model, ms": lambda cell: plain(1e3 * cell["model_seconds"]),
        "ours / model": lambda cell: f"{_over_model(cell):.2f}",
        "of the step: products": lambda cell: percent(_shares(cell)["products"]),
        "elementwise": lambda cell: percent(_shares(cell)["elementwise"]),
        "rest": lambda cell: percent(_shares(cell)["rest"]),
    }
    by_ratio = sorted(found, key=lambda cell: float(cell["ours_over_gemms"]["median"]))
    ends = by_ratio[:1] + by_ratio[1:][-1:]
    notes = [
        "Its GEMMs alone are whole products through torch.mm; a step uses the symmetry of two of the dual's.",
        "The model is the step's FLOPs and bytes at the measured ceilings, as if one waited for the other and no byte "
        f"came from the cache; the steps take {between(list(map(_over_model, found)), 2)} times that.",
    ]
    return paragraphs(tabulated(found, columns), " ".join([*map(_where_it_goes, ends), *notes]))


def _over_model(cell: Record) -> float:
    over: float = cell["seconds"]["median"] / cell["model_seconds"]
    return over


def _shares(cell: Record) -> dict[str, float]:
    """The parts of a step, as shares of their sum."""
    return {name: seconds / sum(cell["parts"].values()) for name, seconds in cell["parts"].items()}


def _where_it_goes(cell: Record) -> str:
    """Where the time of a step goes, and so what there is left to win."""
    shares = _shares(cell)
    parts = listed(f"{name} {percent(shares[name])}" for name in sorted(shares, key=shares.__getitem__, reverse=True))
    ratio = cell["ours_over_gemms"]["median"]
    return f"At {shape(cell)} a step takes {ratio:.2f} times its matrix products alone: {parts} of it."


def host(results: Record) -> str:
    """Small steps beside what they are measured against, and the operations of a step."""
    if not (section := results.get("host")):
        return ""
    columns: dict[str, Callable[[Record], str]] = {
        "a small step": lambda found: found["what"],
        "N × D": shape,
        "dtype": lambda found: found["dtype"],
        "ours, µs": lambda found: plain(1e6 * found["seconds"]["median"]),
        "beside": lambda found: found["reference"],
        "takes, µs": lambda found: plain(1e6 * found["reference_seconds"]["median"]),
        "ours / that": lambda found: times(found["over_reference"]["median"]),
    }
    counts = [f"{counted(each['operations'], 'operation')} at {shape(each)}" for each in section["operations"]]
    sentences = ["Processor time of one thread, forward and backward; medians, of ratios within a round."]
    sentences.append(f"In eager mode a step on the CPU dispatches {' and '.join(counts)}, views among them.")
    sentences += [
        f"The pretended GPU executes none of the {len(found['launches'])} launches of Triton's kernels: what is timed "
        "is the host's part of them, with the matrix products on the CPU."
        for found in section["steps"]
        if "launches" in found
    ]
    sentences += [f"Not measured: {what}, because {reason}." for what, reason in section["left_out"].items()]
    return paragraphs(tabulated(section["steps"], columns), " ".join(sentences))


def distributed(results: Record) -> str:
    """Time and bytes over several processes, and what becomes of everybody's answers there."""
    if not (section := results.get("distributed")):
        return ""
    columns: dict[str, Callable[[Record], str]] = {
        "N × D": shape,
        "processes": lambda cell: str(cell["processes"]),
        "ours, ms": lambda cell: ms(_ours(cell)["seconds"]),
        "textbook, × ours": lambda cell: _over_ours(cell, TEXTBOOK),
        "its products and all-reduce alone, × ours": lambda cell: times(cell["floor"]["times_ours"]["median"]),
        "a rank sends, MB: ours": lambda cell: _sent(cell, OURS),
        "textbook": lambda cell: _sent(cell, TEXTBOOK),
    }
    found, alone = section["cells"], setting(results, "one thread a process")
    measured = [tabulated(found, columns), _on_processes(found, results["environment"]["cores"])] if found else []
    return paragraphs(alone, *measured, over_processes(results))


def _sent(cell: Record, name: str) -> str:
    return f"{cell['contenders'][name]['sent']['collectives'] / 1e6:,.2f}"


def _on_processes(found: list[Record], cores: int) -> str:
    loss, gradient = map(error, _farthest(list(map(_ours, found))))
    sentences = [
        "Gloo over the loopback; the slowest rank's time; medians of per-round ratios.",
        f"Ours is at most {loss} from the loss of the whole batch in float64 and {gradient} from its gradient.",
        f"The header takes {ms(found[0]['header']['seconds'])} ms of a step at {found[0]['processes']} processes.",
    ]
    sentences += [
        f"{cell['processes']} processes share {counted(cores, 'core')}." for cell in found if cell["processes"] > cores
    ]
    sent = [_ours(cell)["sent"] for cell in found]
    counters = [each["loopback"] / each["collectives"] for each in sent if each["loopback"]]
    if counters:
        over = between(counters, 3)
        sentences.append(f"The loopback's own counter shows {over} times the bytes that stand here for ours.")
    return "\n".join(sentences)


def bytes_on_gpus() -> str:
    """What a step costs each of many GPUs, by the model."""
    head = ["N × D", "GPUs", "all-reduce of C, MB", "ours, float32, MB", "ours, 16 bit, MB", "vectors in either, MB"]
    sentence = (
        "What each of W GPUs sends in a step, forward and backward, by ring algorithms: W − 1 times what it gives to a "
        "gather, 2 (W − 1)/W times a sum's size. It receives as much. The vectors of the textbook's batch norm are not "
        "counted."
    )
    rows = [_on_gpus(cell, count) for cell in GPU_CELLS for count in GPUS]
    return paragraphs(sentence, grid([*head, "textbook, GFLOP", "ours, GFLOP"], rows))


def _on_gpus(cell: Cell, count: int) -> list[str]:
    textbook, ours, half = (
        model.sent_by_textbook(cell, count),
        model.sent_by_dual(cell, count),
        model.sent_by_dual(cell, count, 2),
    )
    sent = [f"{each.sent / 1e6:,.0f} ({100 * each.sent / textbook.sent:.1f} %)" for each in (ours, half)]
    flops = [plain(each.flops / 1e9) for each in (textbook, ours)]
    return [f"{cell.n} × {cell.d}", str(count), plain(textbook.sent / 1e6), *sent, f"{half.vectors / 1e6:.1f}", *flops]


def training(results: Record) -> str:
    """A whole step before and after the textbook loss is replaced by ours."""
    found = results.get("training", [])
    if not found:
        return ""
    columns: dict[str, Callable[[Record], str]] = {
        "": lambda record: record["what"],
        "pairs": lambda record: str(record["batch_size"]),
        "threads": lambda record: str(record["threads"]),
        "a step with the textbook, s": lambda record: plain(record["steps"][TEXTBOOK]),
        "with ours, s": lambda record: plain(record["steps"][OURS]),
        "speed-up": lambda record: f"{record['speed_up']:.2f}×",
        "the loss's share: textbook": lambda record: percent(_share(record, TEXTBOOK)),
        "ours": lambda record: percent(_share(record, OURS)),
    }
    return paragraphs(tabulated(found, columns), "\n".join(map(_saved, found)))


def _share(record: Record, name: str) -> float:
    """What a step takes beyond the rest, which is a step with ours but for our loss; over the step."""
    rest = record["steps"][OURS] - record["losses"][OURS]["median"]
    return 1 - float(rest / record["steps"][name])


def _saved(record: Record) -> str:
    """The change in one line; a step of features alone has no images."""
    ratio, saved = record["textbook_over_ours"]["median"], 1 - 1 / record["speed_up"]
    image = f" at {record['image_size']} pixels" if record.get("image_size") else ""
    change = f"{percent(saved)} of the step saved" if saved > 0 else f"the step {percent(-saved)} longer"
    sentence = (
        f"{record['what'][0].upper()}{record['what'][1:]}{image}, {record['batch_size']} pairs, "
        f"projector {record['projector']} wide: by itself the loss takes {ms(record['losses'][OURS])} ms in place of "
        f"{ms(record['losses'][TEXTBOOK])} ({times(ratio)} as fast), {change}."
    )
    if "backbone" not in record["parts"]:
        return sentence
    chunks, images = record["chunks"]
    return (
        f"{sentence} This step is the sum of its parts, each measured by itself; the backbone's is the median of a "
        f"chunk of {images} images, times {chunks}."
    )


def details(records: Iterable[Record]) -> str:
    """Every figure of these records: a row for each contender, a column for each figure, quartiles in brackets."""
    rows = [row for record in records for row in _rows(record)]
    head = list(dict.fromkeys(key for row in rows for key in row))
    return grid(head, [[row.get(key, "") for key in head] for row in rows]) if rows else ""


def _rows(record: Record) -> list[dict[str, str]]:
    where = _flat({key: value for key, value in record.items() if key != "contenders"})
    if "contenders" not in record:
        return [where]
    return [where | {"contender": name} | _flat(found) for name, found in record["contenders"].items()]


def _flat(record: Record, above: str = "") -> dict[str, str]:
    """The figures of a record as text, those of records in it by both names."""
    flat: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, dict) and "median" not in value:
            flat |= _flat(value, f"{above}{key}: ")
        else:
            flat[f"{above}{key}".replace("_", " ")] = _text(value)
    return flat


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return spread(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else " ".join(str(value).split())
