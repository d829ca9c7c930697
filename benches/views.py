"""More than two views: a call with all of them against a loop over the pairs, and against two views.

A step is the value and the gradients of all views, in float32, on one thread. Four take turns in one process: two
views, four, eight, and the mean over the 28 pairs of eight by our own loss of two. What is told is the median of the
ratios of neighbouring turns, of the thread's processor time, each after a call that is not timed. Each is held to
float64 before it is timed.

FLOP model: 8·N²·D for two views, 4·V·N²·D for V, 8·N²·D·V(V − 1)/2 for the loop, in all of which the symmetry of the
Gram matrices saves a quarter. Byte model: (V + 3)·N·D + (V + 4)·N² elements beyond the views and their gradients.

Writes ``docs/views.json`` and the table of it in ``docs/views.md``.

    python benches/views.py                       # two minutes
    python benches/views.py --rounds 3 --dry-run  # measure and print alone
    python benches/views.py --check               # does the page say what was measured?
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import machine
from barlow_loss import barlow_twins_loss
from memory import watched
from timing import Turn, interleave, processor_time, ratios, spread
from workload import Cell, gram_form

if TYPE_CHECKING:
    from collections.abc import Callable

    Loss = Callable[..., Tensor]
    Record = dict[str, Any]

DOCS = Path(__file__).parents[1] / "docs"
TWO, FOUR, EIGHT, LOOP = "2 views", "4 views", "8 views", "28 pairs of 8 views"
LARGEST_ERRORS = 3e-7, 3e-6  # of the loss, of the gradients


def loop_over_pairs(*views: Tensor) -> Tensor:
    """What everybody with more than two views does."""
    losses = [barlow_twins_loss(*pair) for pair in itertools.combinations(views, 2)]
    return torch.stack(losses).mean()


CONTENDERS: dict[str, tuple[int, Loss]] = {
    TWO: (2, barlow_twins_loss),
    FOUR: (4, barlow_twins_loss),
    EIGHT: (8, barlow_twins_loss),
    LOOP: (8, loop_over_pairs),
}


def views_of(cell: Cell, count: int) -> list[Tensor]:
    """One signal, each view with its own noise."""
    generator = torch.Generator().manual_seed(cell.n * 100_003 + cell.d)
    signal = torch.randn(cell.n, cell.d, generator=generator)
    noise = torch.randn(count, cell.n, cell.d, generator=generator)
    return [(signal + 0.5 * of_view).requires_grad_() for of_view in noise]


def step(loss_fn: Loss, views: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss and the gradients of all views."""
    loss = loss_fn(*views)
    return loss.detach(), *torch.autograd.grad(loss, views)


def errors(answer: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the loss, and of all gradients together."""
    loss = float((answer[0].double() - right[0]).abs() / right[0].abs())
    of_views = [(own.double() - r).square().sum() for own, r in zip(answer[1:], right[1:], strict=True)]
    norms = [r.square().sum() for r in right[1:]]
    return loss, float((torch.stack(of_views).sum() / torch.stack(norms).sum()).sqrt())


def truth(views: list[Tensor]) -> tuple[Tensor, ...]:
    """The mean over the pairs in float64, pair by pair, so that the graph of one is alive at once."""
    doubles = [view.detach().double().requires_grad_() for view in views]
    pairs = list(itertools.combinations(range(len(views)), 2))
    total = torch.zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(double) for double in doubles]
    for i, j in pairs:
        loss = gram_form(doubles[i], doubles[j]) / len(pairs)
        for view, gradient in zip((i, j), torch.autograd.grad(loss, (doubles[i], doubles[j])), strict=True):
            gradients[view] += gradient
        total += loss.detach()
    return total, *gradients


def measure(cell: Cell, rounds: int, seconds: float) -> Record:
    """Times, their ratios, working memory and errors at a cell."""
    torch.set_num_threads(1)
    views = views_of(cell, 8)
    with machine.all_cores():
        right = {count: truth(views[:count]) for count in (2, 4, 8)}
    records: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name, (count, loss_fn) in CONTENDERS.items():
        run = _turn(loss_fn, views[:count])
        answer, working = watched(run)
        found = errors(answer, right[count])
        if not all(error <= most for error, most in zip(found, LARGEST_ERRORS, strict=True)):
            raise AssertionError(f"{name}: expected errors of at most {LARGEST_ERRORS}, found {found}")
        model = 4 * ((count + 3) * cell.n * cell.d + (count + 4) * cell.n**2)
        records[name] = {"errors": found, "working_bytes": working, "model_bytes": model}
        turns[name] = run
    times = interleave(turns, rounds, seconds, _warm_time)
    of_two, of_eight = ratios(times, TWO), ratios(times, EIGHT)
    for name, record in records.items():
        record["seconds"] = spread(times[name])
        record["times_two"] = of_two[name] if name != TWO else None
    return {
        "cell": str(cell),
        "rounds": len(times[TWO]),
        "contenders": records,
        "loop_over_eight": of_eight[LOOP],
    }


def _warm_time(turn: Turn, calls: int) -> float:
    """After a call that is not timed: the turn before has left other data in the cache, and other memory free."""
    turn()
    return processor_time(turn, calls)


def _turn(loss_fn: Loss, views: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: step(loss_fn, views)


def table(report: Record) -> str:
    """What stands in the page between its marks."""
    environment, cell = report["environment"], report["record"]["cell"].replace("×", " × ")
    lines = [
        f"N × D = {cell}, forward and backward, float32, 1 thread, on {environment['cpu']} "
        f"({environment['instructions']}), torch {environment['versions']['torch']}; {report['date']}. "
        "Processor time; medians, quartiles in brackets.",
        "",
        "| | ms | × two views | working memory, MB | over (V + 3)·N·D + (V + 4)·N² | error of the loss | gradients |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, record in report["record"]["contenders"].items():
        ratio = record["times_two"]
        times = "1" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
        loss, gradient = record["errors"]
        lines.append(
            f"| {name} | {1e3 * record['seconds']['median']:.0f} | {times} | {record['working_bytes'] / 1e6:.0f} "
            f"| {record['working_bytes'] / record['model_bytes']:.2f} | {loss:.1e} | {gradient:.1e} |"
        )
    loop = report["record"]["loop_over_eight"]
    lines += ["", f"The loop takes {loop['median']:.1f} times ({loop['q1']:.1f} to {loop['q3']:.1f}) the one call."]
    return "\n".join(lines)


def page_with(report: Record) -> str:
    """The page with the table of a report."""
    page = (DOCS / "views.md").read_text(encoding="utf-8")
    block = f"<!-- views:begin -->\n{table(report)}\n<!-- views:end -->"
    page, count = re.subn(r"<!-- views:begin -->.*<!-- views:end -->", lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError("views.md: expected the marks views:begin and views:end, once each")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Cell.parse, default=Cell(256, 8192), help="N×D")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120.0, help="after them only three rounds")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--check", action="store_true", help="compare the page with the committed figures")
    options = parser.parse_args()
    results = DOCS / "views.json"
    if options.check:
        current = (DOCS / "views.md").read_text(encoding="utf-8")
        if page_with(json.loads(results.read_text(encoding="utf-8"))) != current:
            raise SystemExit("docs/views.md does not say what docs/views.json does")
        return
    record = measure(options.cell, options.rounds, options.seconds)
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    report = {"date": date, "environment": machine.environment(), "record": record}
    print(table(report))
    if not options.dry_run:
        results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (DOCS / "views.md").write_text(page_with(report), encoding="utf-8")


if __name__ == "__main__":
    main()
