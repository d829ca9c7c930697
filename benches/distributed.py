"""Times the loss over several processes against the published program, and counts the bytes that a rank sends.

W processes of one thread each form a gloo group over the loopback; each holds its own N/W rows of both views. The
contenders take turns as in compare.py. All ranks start a turn together and it lasts as long as on the slowest of them;
ratios are taken within a round. What is timed is forward and backward, down to the gradients of the rank's rows.

Loss and gradient of the whole batch are compared with float64 in one process before anything is timed. The gradient is
what DDP's mean over the ranks makes of theirs: 1/W of what arrives at a rank's rows. Ours is then the gradient of the
loss, the published program's 1/W of it, and each is held to that.

FLOP model, each rank: ours 8·N²·D/W, the published program 6·N·D²/W, and it passes 39 times over D×D matrices besides,
whatever W is. Byte model: traffic.py. Three counts of the bytes are made: the model, what the collectives called send
by it, which must be the same, and the loopback's counter, which sees the headers of TCP as well, and other programs.

``floor`` in the results is the published program's three products and its all-reduce of C alone, all else free.

    python benches/distributed.py                                        everything (under four minutes on two cores)
    python benches/distributed.py --processes 2 --grid 256x4096 --update     measures a cell anew, keeps the others
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

import table
import traffic
from barlow_loss._collectives import group_of
from barlow_loss._header import agree
from baselines import OURS, TEXTBOOK, build, distributed_textbook
from compare import RESULTS, environment, interleave, ratios, spread, time_calls, updated
from workload import Answer, Cell, check, errors, step, truth

if TYPE_CHECKING:
    from collections.abc import Callable

    from compare import Turn

    Record = dict[str, Any]

GRID = {2: [Cell(256, 4096), Cell(1024, 4096), Cell(256, 8192)], 4: [Cell(256, 4096)]}
TIMEOUT = timedelta(seconds=60)  # of a collective; the slowest step takes five
COUNTED_STEPS = 3
IDLE_SECONDS = 0.5


def measure(cell: Cell, right: Answer, rounds: int, seconds: float) -> Record:
    """The record of one cell, the same on every rank but for the loopback's counter."""
    views = [_own_rows(z.detach()).requires_grad_() for z in cell.views()]
    steps = {OURS: partial(step, build(OURS, cell.d), *views), TEXTBOOK: partial(step, distributed_textbook, *views)}
    records = {name: _answer(name, cell, turn, right) for name, turn in steps.items()}
    turns: dict[str, Turn] = {**steps, "floor": _floor(cell), "header": _header(*views)}
    times = interleave(turns, rounds, seconds, _time_together)
    over_ours = ratios(times, OURS)
    for name, record in records.items():
        record.update(seconds=spread(times[name]), times_ours=over_ours[name])
    return {
        "n": cell.n,
        "d": cell.d,
        "processes": dist.get_world_size(),
        "rounds": len(times[OURS]),
        "contenders": records,
        "floor": {"seconds": spread(times["floor"]), "times_ours": over_ours["floor"]},
        "header": {"seconds": spread(times["header"])},
    }


def _answer(name: str, cell: Cell, turn: Callable[[], Answer], right: Answer) -> Record:
    """Errors of a contender and the bytes that a rank sends for it; raises where either is not what it must be."""
    processes = dist.get_world_size()
    factor = 1 if name == OURS else 1 / processes
    with traffic.Collectives() as called:
        answer = turn()
    found = errors(_of_all_rows(answer, factor), right)
    check(name, cell, found)
    model = traffic.dual(cell, processes).sent
    if name == OURS and abs(called.sent - model) > 0.5:
        raise AssertionError(f"{name} at {cell}: expected {model:,.0f} bytes sent, counted {called.sent:,.0f}")
    return {
        "loss_error": found.loss,
        "gradient_error": found.gradient,
        "gradient_factor": factor,
        "sent": {"collectives": called.sent, "loopback": _sent_over_loopback(turn)},
    }


def _own_rows(z: Tensor) -> Tensor:
    return z.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _of_all_rows(answer: Answer, factor: float) -> Answer:
    """The answer for the batch of all ranks, after DDP's mean of the gradients; those over ``factor``."""
    scale = factor * dist.get_world_size()
    return Answer(answer.loss, *(_gathered(gradient) / scale for gradient in answer[1:]))


def _gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def _floor(cell: Cell) -> Turn:
    a1, a2 = torch.randn(2, cell.n // dist.get_world_size(), cell.d)
    m = torch.randn(cell.d, cell.d)

    def turn() -> None:
        dist.all_reduce(torch.mm(a1.T, a2))
        torch.mm(a2, m.T)
        torch.mm(a1, m)

    return turn


def _header(z1: Tensor, z2: Tensor) -> Turn:
    """The exchange that precedes each step, with as many claims as the loss makes."""
    group = group_of("header", None)
    claims = {f"claim {i}": (z1.dtype, z2.shape[1]) for i in range(10)}
    return lambda: agree("header", group, z1, lambda: (z1.shape[0], claims))


def _time_together(turn: Turn, calls: int) -> float:
    """Seconds per call on the slowest rank, the same figure on all of them."""
    dist.barrier()
    slowest = torch.tensor(time_calls(turn, calls), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _sent_over_loopback(turn: Turn) -> float | None:
    """Bytes that a rank sends in a step by the interface's counter, less what passes in as much time of idleness."""
    if traffic.loopback_bytes() is None:
        return None
    idle = _bytes_meanwhile(partial(time.sleep, IDLE_SECONDS)) / IDLE_SECONDS
    start = time.perf_counter()
    busy = _bytes_meanwhile(lambda: [turn() for _ in range(COUNTED_STEPS)])
    seconds = time.perf_counter() - start
    return (busy - idle * seconds) / COUNTED_STEPS / dist.get_world_size()


def _bytes_meanwhile(turn: Turn) -> int:
    dist.barrier()
    before = traffic.loopback_bytes() or 0
    turn()
    dist.barrier()
    return (traffic.loopback_bytes() or 0) - before


def _on_rank(rank: int, processes: int, store: str, work: list[tuple[Cell, Answer]], *limits: Any) -> list[Record]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=TIMEOUT)
    try:
        records = []
        for cell, right in work:
            records.append(measure(cell, right, *limits))
            if rank == 0:
                print(table.distributed_line(records[-1]), flush=True)
        return records
    finally:
        dist.destroy_process_group()


def together(processes: int, cells: list[Cell], rounds: int, seconds: float) -> list[Record]:
    """The records of rank 0; what a rank raises is raised here."""
    work = [(cell, Answer(*(t.detach() for t in truth(*cell.views())))) for cell in cells]
    with (
        tempfile.TemporaryDirectory(prefix="barlow-loss-") as folder,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        store = str(Path(folder) / "store")
        ranks = [pool.submit(_on_rank, rank, processes, store, work, rounds, seconds) for rank in range(processes)]
        for done in as_completed(ranks):
            done.result()
        return ranks[0].result()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the loss over several processes; see the head of this file.")
    parser.add_argument("--processes", nargs="+", type=int, choices=GRID, default=list(GRID))
    parser.add_argument("--grid", nargs="+", type=Cell.parse, metavar="NxD", help="cells (default: all of them)")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many rounds for a cell (default: 15)")
    parser.add_argument("--seconds", type=float, default=15, help="after that, stop at three rounds (default: 15)")
    parser.add_argument("--update", action="store_true", help="keep what distributed.json says of other cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for distributed.json and distributed.md")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks, from their start
    results: Record = {"environment": environment(), "cells": []}
    for processes in arguments.processes:
        cells = arguments.grid or GRID[processes]
        results["cells"] += together(processes, cells, arguments.rounds, arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.update:
        results = updated(json.loads((arguments.out / "distributed.json").read_text()), results)
    (arguments.out / "distributed.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table.distributed_markdown(results)
    (arguments.out / "distributed.md").write_text(text)
    print(f"\n{text}\nWritten to {arguments.out / 'distributed'}.json and .md")


if __name__ == "__main__":
    main()
