"""Puts the results into README, docs, and the page and pictures beside them; or checks that they are what stands there.

Each block of a page stands between two markers. The figures are those of the newest file of results; those of the
block on bytes are the model's in distributed.py. A picture keeps in its PNG the SHA-256 of the figures that it shows.

    python benches/render.py             takes over the newest results: blocks, and the pages and pictures beside them
    python benches/render.py --check     writes nothing; names what is not as the newest results that git tracks say
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import COMPILED, DUAL, OURS, OURS_COMPILED, PAPER, PRIMAL, TEXTBOOK, entry
from measure import RESULTS, Record, cells, load, newest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Columns = Sequence[tuple[str, str, Any]]  # title, path in a record, what shows the figure there or is its factor

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/processes.md")  # of a repository, with markers for the blocks
NONE = "—"  # not measured
HIDDEN = (PRIMAL, DUAL)  # they tell where "auto" should change over, which the pages do not discuss
SHOWN = (256, 8192)  # the cell of the README's table and picture
GPUS = (8, 16, 64, 256, 1024)
GPU_CELLS = cells("2048x8192", "4096x32768")


def figure(record: Any, path: str) -> Any:
    """What lies in a record under ``path``, as in "contenders/lightly/working_bytes"; None if nothing does."""
    for key in filter(None, path.split("/")):
        record = record.get(key) if record is not None else None
    return record


def table(records: Iterable[Record], columns: Columns) -> str:
    """A row for each of the records; the first column to the left, the others to the right."""
    rows = [[title for title, *_ in columns], ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[shown(figure(record, path), show) for _, path, show in columns] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: Any, show: Any) -> str:
    if value is None:
        return NONE
    return plain(show * value) if isinstance(show, float) else str(show(value))


def insert(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{text}\n{end}{after}"


def paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def plain(value: float) -> str:
    """Three digits, and all of those before the point: 0.0123, 4.56, 78.9, 1,234."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def spread(values: Record) -> str:
    median, q1, q3 = (f"{values[key]:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def shape(record: Record) -> str:
    return f"{record['n']} × {record['d']}"


def setting(results: Record) -> str:
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"Forward and backward, float32, one thread, on {machine['cpu']} ({machine['instructions']}, cores: "
        f"{machine['cores']}), {machine['system']}, Python {machine['python']}, {versions}; {results['date']}."
    )


GAIN = ("textbook", "textbook, torch.compile", "barlow_loss", "in a CUDA graph")
CELL = ("N × D", "", shape)
OURS_MS = ("ours, ms", f"contenders/{OURS}/seconds/median", 1e3)
EXACTNESS: Columns = (
    ("", "name", str),
    ("computes", "definition", str),
    ("from its own float64: loss", "own loss", 1.0),
    ("gradient", "own gradient", 1.0),
    ("from the paper's: loss", "loss_error", 1.0),
    ("and gradient", "gradient_error", 1.0),
)
LIMITS: Columns = (
    CELL,
    ("algorithm", "algorithm", str),
    ("ours, ms", "seconds/median", 1e3),
    ("its GEMMs alone, ms", "gemms/seconds/median", 1e3),
    ("ours / GEMMs", "ours_over_gemms/median", 1.0),
    ("model, ms", "model_seconds", 1e3),
    ("of the step, ms: products", "parts/products", 1e3),
    ("elementwise", "parts/elementwise", 1e3),
    ("rest", "parts/rest", 1e3),
)
HOST: Columns = (
    ("a small step", "what", str),
    CELL,
    ("dtype", "dtype", str),
    ("ours, ms", "seconds/median", 1e3),
    ("beside", "reference", str),
    ("takes, ms", "reference_seconds/median", 1e3),
    ("ours / that", "over_reference/median", 1.0),
)
DISTRIBUTED: Columns = (
    CELL,
    ("processes", "processes", str),
    OURS_MS,
    ("textbook, × ours", f"contenders/{TEXTBOOK}/times_ours/median", 1.0),
    ("its products and all-reduce alone, × ours", "floor/times_ours/median", 1.0),
    ("the header, ms", "header/seconds/median", 1e3),
    ("a rank sends, MB: ours", f"contenders/{OURS}/sent/collectives", 1e-6),
    ("textbook", f"contenders/{TEXTBOOK}/sent/collectives", 1e-6),
)
TRAINING: Columns = (
    ("", "what", str),
    ("pairs", "batch_size", str),
    ("threads", "threads", str),
    ("a step with the textbook, s", f"steps/{TEXTBOOK}", 1.0),
    ("with ours, s", f"steps/{OURS}", 1.0),
    ("times as fast", "speed_up", 1.0),
    ("the loss by itself, ms: textbook", f"losses/{TEXTBOOK}/median", 1e3),
    ("ours", f"losses/{OURS}/median", 1e3),
    ("its share of the step, %: textbook", f"shares/{TEXTBOOK}", 100.0),
    ("ours", f"shares/{OURS}", 100.0),
)
BYTES: Columns = (
    CELL,
    ("GPUs", "count", str),
    ("all-reduce of C, MB", "textbook/sent", 1e-6),
    ("ours, float32, MB", "ours/sent", 1e-6),
    ("ours, 16 bit, MB", "half/sent", 1e-6),
    ("vectors in either, MB", "ours/vectors", 1e-6),
    ("textbook, GFLOP", "textbook/flops", 1e-9),
    ("ours, GFLOP", "ours/flops", 1e-9),
)


def _names(records: Iterable[Record]) -> list[str]:
    found = dict.fromkeys(name for record in records for name in record["contenders"])
    return [name for name in found if name not in HIDDEN]


def gain(results: Record) -> str:
    import gpu

    found = [(cell, "one CPU thread", (TEXTBOOK, COMPILED, OURS, "")) for cell in results["cells"]]
    for cell in figure(results, "gpu/cells") or []:
        names = (gpu.TEXTBOOK, gpu.COMPILED, gpu.TRITON, gpu.GRAPH)
        found.append((cell, results["gpu"]["environment"]["device"], names))
    rows = [
        {"where": f"{where}, {cell.get('setting', 'float32')}"}
        | {head: cell["contenders"].get(name) for head, name in zip(GAIN, names, strict=True)}
        for cell, where, names in found
        if (cell["n"], cell["d"]) == SHOWN
    ]

    def cost(own: Record) -> str:
        size = own["working_bytes"] if "working_bytes" in own else own["peak_bytes"]
        return f"{plain(1e3 * own['seconds']['median'])} ms, {plain(size / 1e6)} MB"

    head = f"{SHOWN[0]} × {SHOWN[1]}, forward and backward"
    return table(rows, [(head, "where", str), *((head, head, cost) for head in GAIN)])


def speed(results: Record) -> str:
    found = sorted(results["cells"], key=lambda cell: (cell["n"], cell["d"]))
    names = _names(found)
    ratios = [(name, f"contenders/{name}/times_ours/median", 1.0) for name in names if name != OURS]
    memory = [(name, f"contenders/{name}/working_bytes", 1e-6) for name in names]
    # Where "auto" chose the dual, ours is there twice.
    twice = [figure(cell, f"contenders/{DUAL}/times_ours/median") for cell in found if cell["algorithm"] == "dual"]
    noise = [ratio for ratio in twice if ratio] or [1.0]
    return paragraphs(
        setting(results),
        table(found, [CELL, ("algorithm", "algorithm", str), OURS_MS, *ratios]),
        f"Ours against itself in the same way: {min(noise):.2f} to {max(noise):.2f}. {NONE}: not measured there.",
        table(found, [("working memory, MB", "", shape), *memory]),
    )


def growth(results: Record) -> str:
    found = results["growth"]
    lines = {kind: each["contenders"] for kind, each in found.items()}
    rows = [{"name": name} | {kind: own.get(name) for kind, own in lines.items()} for name in _names(found.values())]
    largest = f"largest D in {found['budget']['bytes'] / 1e9:g} GB of working memory (N = {found['budget']['n']})"
    columns: Columns = [
        ("", "name", str),
        (f"time grows as, in D (N = {found['features']['n']})", "features/exponent", lambda k: f"D^{k:.2f}"),
        (f"in N (D = {found['samples']['d']})", "samples/exponent", lambda k: f"N^{k:.2f}"),
        (largest, "budget", lambda own: f"{'' if own['measured'] else '≈ '}{own['features']:,}"),
        ("with inputs and gradients in it", "budget/features_in_all", lambda d: f"≈ {d:,}"),
    ]
    return table(rows, columns)


def exactness(results: Record) -> str:
    """The largest distance of each contender to float64: of its own function, and of the paper's where it differs."""
    rows = []
    for name in _names(results["cells"]):
        found = [cell["contenders"][name] for cell in results["cells"] if name in cell["contenders"]]
        own = {f"own {of}": max(each["error_of_own"][of] for each in found) for of in ("loss", "gradient")}
        papers = {of: max(each[of] for each in found) for of in ("loss_error", "gradient_error")}
        definition = found[0]["definition"]
        rows.append({"name": name, "definition": definition, **own, **(papers if definition != PAPER else {})})
    return table(rows, EXACTNESS)


def host(results: Record) -> str:
    found = results["host"]
    counts = [CELL, ("operations that a step dispatches in eager mode, views among them", "operations", str)]
    absent = [f"Not measured: {what}, because {reason}." for what, reason in found["left_out"].items()]
    return paragraphs(table(found["steps"], HOST), table(found["operations"], counts), *absent)


def distributed(results: Record) -> str:
    settings = results["distributed"]["exactness"]
    of = {" + ".join(map(str, each["rows"])): each["contenders"] for each in settings}
    rows = [{"name": name} | {rows: own.get(name) for rows, own in of.items()} for name in _names(settings)]
    columns = [("rows of the ranks: loss error / gradient error / cosine", "name", str), *((r, r, _shards) for r in of)]
    return paragraphs(table(results["distributed"]["cells"], DISTRIBUTED), table(rows, columns))


def _shards(found: Record) -> str:
    if "refused" in found:
        return f"refuses: {' '.join(found['refused'].split())}".replace("|", "\\|")
    return f"{found['loss_error']:.1e} / {found['gradient_error']:.1e} / {found['gradient_cosine']:.4f}"


def bytes_on_gpus(results: Record) -> str:
    from distributed import sent_by_dual, sent_by_textbook

    rows = []
    for cell, count in product(GPU_CELLS, GPUS):
        sent = {"textbook": sent_by_textbook(cell, count), "ours": sent_by_dual(cell, count)}
        sent["half"] = sent_by_dual(cell, count, itemsize=2)
        rows.append({"n": cell.n, "d": cell.d, "count": count} | {name: of._asdict() for name, of in sent.items()})
    return table(rows, BYTES)


GROWTH, COMPARISON = "growth", "comparison"
TITLES = {
    COMPARISON: "Time and working memory of each contender over those of barlow_loss",
    GROWTH: "Time against D and against N, and working memory against D, of each contender",
}
# By name: the section that a block stands on, what writes it, and the picture above it.
BLOCKS: dict[str, tuple[str, Callable[[Record], str], str]] = {
    "gain": ("cells", gain, COMPARISON),
    "bench": ("cells", speed, ""),
    "growth": ("growth", growth, GROWTH),
    "exactness": ("cells", exactness, ""),
    "limits": ("limits", lambda results: table(results["limits"], LIMITS), ""),
    "host": ("host", host, ""),
    "distributed": ("distributed", distributed, ""),
    "training": ("training", lambda results: table(results["training"], TRAINING), ""),
    "bytes": ("environment", bytes_on_gpus, ""),
}

KEYWORD = "figures-sha256"
AXES = {"d": "D, features", "n": "N, samples"}
PANELS = (  # title, axis, what is fixed, and the figure in which unit
    ("Time of a step, ms", "d", "n", "seconds/median", 1e3),
    ("Time of a step, ms", "n", "d", "seconds/median", 1e3),
    ("Memory, MB", "d", "n", "working_bytes", 1e-6),
)
# Near to Okabe and Ito's colours, which the colour-blind can tell apart, dark enough for text on white.
BLUE, INK = "#0072B2", "#222222"
OTHERS = ("#C85200", "#007A5A", "#B0558A", "#857700", "#7B5EA7", "#666666", "#8C4A3C", "#A87000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: Any = {"axes.spines.right": False, "axes.spines.top": False, "font.size": 9.5, "legend.frameon": False}
STYLE |= {"axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold"}


def picture(results_path: Path, kind: str) -> Path:
    return results_path.with_name(f"{results_path.stem}-{kind}.png")


def digest(results: Record) -> str:
    return hashlib.sha256(json.dumps(results["cells"], sort_keys=True).encode()).hexdigest()


def draw(results: Record, results_path: Path) -> list[Path]:
    """Draw the pictures of these results beside their file; returns where. Needs matplotlib."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        for kind, drawing in ((GROWTH, draw_growth(results)), (COMPARISON, draw_comparison(results))):
            text = {KEYWORD: digest(results)}
            drawing.savefig(picture(results_path, kind), dpi=120, bbox_inches="tight", metadata=text)
    return [picture(results_path, kind) for kind in TITLES]


def draw_growth(results: Record) -> Figure:
    from matplotlib.figure import Figure

    names = [name for name in _names(results["cells"]) if name not in (OURS, OURS_COMPILED)]  # which would cover ours
    others = zip(names, cycle(OTHERS), cycle(DASHES), strict=False)
    styles: Any = {name: {"color": colour, "linestyle": dash, "markersize": 3} for name, colour, dash in others}
    styles[OURS] = {"color": BLUE, "linewidth": 3.4, "markersize": 6.5}
    drawing = Figure(figsize=(9.2, 5.2), layout="constrained")
    for axes, (title, axis, fixed, path, unit) in zip(drawing.subplots(1, 3), PANELS, strict=True):
        at = statistics.mode(cell[fixed] for cell in results["cells"])  # the longest line of the grid
        line = sorted((cell for cell in results["cells"] if cell[fixed] == at), key=lambda cell: int(cell[axis]))
        for name, style in styles.items():
            found = {c[axis]: unit * figure(c, f"contenders/{name}/{path}") for c in line if name in c["contenders"]}
            axes.plot(list(found), list(found.values()), marker="o", label=name, **style)
        axes.set(title=f"{title},\nat {fixed.upper()} = {at:,}", xlabel=AXES[axis], yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks([cell[axis] for cell in line], [cell[axis] for cell in line], rotation=45)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawing


def compared(results: Record) -> Record:
    """The cell of the picture of the comparison: 256 × 8192, or the largest where most were measured."""
    cells: list[Record] = results["cells"]
    return max(cells, key=lambda cell: ((cell["n"], cell["d"]) == SHOWN, len(cell["contenders"]), cell["d"]))


def draw_comparison(results: Record) -> Figure:
    """Everybody's time and working memory over ours, in one cell: bars from ours, at 1×, on logarithmic axes."""
    from matplotlib.figure import Figure

    cell = compared(results)
    found, ours = cell["contenders"], cell["contenders"][OURS]
    names = sorted(_names([cell]), key=lambda name: float(found[name]["times_ours"]["median"]))
    ticks = range(len(names))
    drawing = Figure(figsize=(9.2, 0.34 * len(names) + 1.5), layout="constrained")
    panels = (
        (f"Time of a step at {shape(cell)}", f"{plain(1e3 * ours['seconds']['median'])} ms", "times_ours/median", 1),
        (f"Working memory at {shape(cell)}", f"{plain(ours['working_bytes'] / 1e6)} MB", "working_bytes", None),
    )
    for axes, (title, of_ours, path, unit) in zip(drawing.subplots(1, 2, sharey=True), panels, strict=True):
        values = [figure(found[name], path) / (unit or figure(ours, path)) for name in names]
        axes.set_title(f"{title}\n{OURS}: {of_ours}")
        axes.set_xscale("log")
        colours = ["#8fbfdd" if entry(name).ours else "#a6a6a6" for name in names]
        bars = axes.barh(ticks, [value - 1 for value in values], left=1, color=colours, height=0.7)
        axes.bar_label(bars, [f"{plain(value)}×" for value in values], padding=6, color=INK)
        axes.axvline(1, color=BLUE, linewidth=1.6)
        room = max(max(values) / min(values), 10) ** 0.24  # for the numbers at the bars' ends
        axes.set_xlim(min(values) / room, max(values) * room)
        axes.tick_params(axis="both", which="both", length=0, labelbottom=False)
        axes.spines[["left", "bottom"]].set_visible(False)
    left = drawing.axes[0]
    left.set_yticks(ticks, names)
    left.invert_yaxis()
    for label, name in zip(left.get_yticklabels(), names, strict=True):
        label.set(color=BLUE if entry(name).ours else INK)
        label.set(fontstyle="normal" if found[name]["definition"] == PAPER else "italic")
    drawing.supxlabel("Logarithmic scale. In italics: another loss than the paper's.", fontsize=8.5)
    return drawing


def page(results: Record, results_path: Path) -> str:
    parts = [f"## {name}\n\n{text}" for name, text in blocks(results, results_path, results_path.parent).items()]
    return paragraphs("# Benches", *parts) + "\n"


def blocks(results: Record, results_path: Path, folder: Path) -> dict[str, str]:
    """What stands in the pages of ``folder`` between the markers, by their name."""
    found = dict.fromkeys(BLOCKS, f"Not among the results of {results['date']}.")
    for name, (section, write, kind) in BLOCKS.items():
        if results.get(section):
            path = Path(os.path.relpath(picture(results_path, kind), folder)).as_posix()
            image = f"![{TITLES[kind]}]({path})" if kind and results.get("cells") else ""
            found[name] = paragraphs(image, write(results))
    return found


def pages(results_path: Path, root: Path = ROOT) -> dict[Path, str]:
    """What is to stand in the pages that are made of a file of results; raises where a block has no place in any."""
    results, on_gpu = load(results_path), results_path.with_name("gpu.json")
    found = {results_path.with_suffix(".md"): page(results, results_path)}
    results |= {"gpu": load(on_gpu)} if on_gpu.exists() else {}
    sought = {name for name, (section, *_) in BLOCKS.items() if results.get(section)}
    for path in [root / name for name in PAGES if (root / name).exists()]:
        text = path.read_text(encoding="utf-8")
        for name, block in blocks(results, results_path, path.parent).items():
            if f"<!-- {name}:begin -->" in text:
                sought.discard(name)
                text = insert(text, name, block)
        found[path] = text
    if sought:
        raise SystemExit(f"expected <!-- {min(sought)}:begin --> and its end in one of {', '.join(PAGES)}, found none")
    return found


def other_pages() -> dict[Path, str]:
    import gpu
    import relatives

    found = {RESULTS / "gpu.md": gpu.markdown(load(RESULTS / "gpu.json"))}
    for name in relatives.PAGES:
        path = relatives.DOCS / f"{name}.md"
        if path.exists():  # no part of a source distribution
            found[path] = relatives.page_with(name, load(path.with_suffix(".json")))
    return found


def stale(wanted: dict[Path, str]) -> list[str]:
    return [p.name for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def stale_pictures(results_path: Path) -> list[str]:
    """The pictures that were drawn from other figures, or not at all."""
    results = load(results_path)
    paths = [picture(results_path, kind) for kind in TITLES] if results.get("cells") else []
    wanted = f"{KEYWORD}\0{digest(results)}".encode() if paths else b""
    return [path.name for path in paths if not path.exists() or wanted not in path.read_bytes()]


def write(wanted: dict[Path, str], results_path: Path) -> None:
    """Writes the pages, and draws the pictures anew where their figures have changed."""
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    if stale_pictures(results_path):
        draw(load(results_path), results_path)


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put the figures of the benches into README and documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    checking = parser.parse_args(flags).check
    results_path = newest(committed=checking)
    wanted = pages(results_path) | other_pages()
    if not checking:
        write(wanted, results_path)
    elif found := stale(wanted) + stale_pictures(results_path):
        sys.exit(f"Not as the results say: {', '.join(found)}. Run python benches/render.py")


if __name__ == "__main__":
    main()
