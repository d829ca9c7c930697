"""The section "distributed": what several processes cost, and whether what they compute is the loss of their batch.

W processes of one thread each form a gloo group over the loopback; each holds rows of its own of both views.

``cells``: ours against the published program. All ranks start a turn together and it lasts as long as on the slowest of
them. ``floor`` is the published program's three products and its all-reduce of C alone; ``header`` the exchange of
shapes and settings that precedes a step of ours. Three counts of the bytes are made: the model, what the collectives
called send by it, which must be the same, and the loopback's counter, which sees TCP and other programs as well.

``exactness``: every contender's loss and gradient against those of the whole batch in float64, for shards of as many
rows and for uneven ones. The gradient is what DDP's mean over the ranks makes of theirs: 1/W of what arrives at all
rows. The cosine tells a wrong direction from a wrong length.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

import model
from barlow_loss._collectives import group_of
from barlow_loss._header import check_on_all_ranks
from contenders import OURS, TEXTBOOK, build, contenders, distributed_textbook, entry
from measure import SEED, Answer, Cell, check, errors, interleave, ratios, spread, step, truth, wall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from measure import Record, Turn

GRID = {2: [Cell(256, 4096)], 4: [Cell(256, 4096)]}
# Rows of each rank, 256 in all: as many everywhere, and not.
SHARES: dict[int, list[tuple[int, ...]]] = {2: [(128, 128), (96, 160)], 4: [(64, 64, 64, 64), (32, 96, 48, 80)]}
EXACTNESS_FEATURES = 512
TIMEOUT = timedelta(seconds=60)  # of a collective; the slowest step takes five
JOB_SECONDS = 300.0
COUNTED_STEPS = 2
IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Shards(Cell):
    """A batch of which each rank has so many ``rows``, in their order: a random split, as its rows are i.i.d."""

    rows: tuple[int, ...]

    @classmethod
    def even(cls, cell: Cell, processes: int) -> Shards:
        if cell.n % processes or cell.algorithm != "dual":  # the byte model of ours is the dual's
            raise ValueError(f"grid: expected an N that {processes} processes can share, of at most D/2, got {cell}")
        return cls(cell.n, cell.d, (cell.n // processes,) * processes)

    def __str__(self) -> str:
        return f"{super().__str__()} as {' + '.join(map(str, self.rows))} rows"

    def of(self, rank: int) -> list[Tensor]:
        return [torch.split(z.detach(), list(self.rows))[rank].clone().requires_grad_() for z in self.views()]


class Refusal(NamedTuple):
    """What it said on a rank, and when: the other ranks' errors follow from the first."""

    at: float
    why: str


class Place(NamedTuple):
    rank: int
    processes: int
    folder: str

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        store = f"file://{self.folder}/{name}"
        dist.init_process_group("gloo", store, rank=self.rank, world_size=self.processes, timeout=TIMEOUT)
        try:
            dist.barrier()  # a rank that is refused at once must not leave while another still connects to it
            yield
        finally:
            dist.destroy_process_group()


def preload(*modules: str) -> None:
    """Have the server of the ranks import so much besides torch when it starts, once for all of them.

    stable-pretraining takes 12 s of a core. Under the mode that counts bytes, each rank would import dynamo by itself.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torch._dynamo", *modules])


def together(job: Callable[..., Any], processes: int, *args: Any, limit: float = JOB_SECONDS) -> list[Any]:
    """What ``job(place, *args)`` returns on every rank, each a process of one thread that ends with it.

    Raises what a rank raised, and multiprocessing.TimeoutError after ``limit`` seconds without an answer.
    """
    workers = multiprocessing.get_context("forkserver").Pool(processes)
    with tempfile.TemporaryDirectory(prefix="barlow-loss-") as folder, workers:
        places = [Place(rank, processes, folder) for rank in range(processes)]
        answers = workers.imap_unordered(partial(_on_rank, job, args), places)
        by_rank = dict(answers.next(limit) for _ in places)
    return [pickle.loads(by_rank[rank]) for rank in range(processes)]


def _on_rank(job: Callable[..., Any], args: tuple[Any, ...], place: Place) -> tuple[int, bytes]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of torch, to the contenders
    return place.rank, pickle.dumps(job(place, *args))  # tensors by value: their process ends


def answers(place: Place, shards: Shards, names: tuple[str, ...]) -> dict[str, Answer | Refusal]:
    """A job: loss and gradients of the rank's rows by each contender, or what it says where it refuses.

    Each has a group of its own, so that one that gave up in the middle of a collective leaves nothing behind.
    """
    views = shards.of(place.rank)
    found: dict[str, Answer | Refusal] = {}
    for number, name in enumerate(names):
        contender = distributed_textbook if name == TEXTBOOK else build(name, shards.d)
        torch.manual_seed(SEED)
        with place.group(f"group-{number}"):
            try:
                found[name] = step(contender, *views)
            except Exception as error:  # whatever a contender raises is its answer
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                found[name] = Refusal(time.monotonic(), why)
    return found


def exactness(shards: Shards, names: tuple[str, ...]) -> Record:
    """How far each contender is from the whole batch's loss and gradient; raises where ours is too far."""
    right = truth(*shards.views())
    by_rank = together(answers, len(shards.rows), shards, names)
    found = {name: judged(name, shards, by_rank, right) for name in names}
    return {"processes": len(shards.rows), "rows": list(shards.rows), "d": shards.d, "contenders": found}


def judged(
    name: str, shards: Shards, by_rank: list[dict[str, Answer | Refusal]], right: Answer, factor: float | None = None
) -> Record:
    """How far a contender is; one whose gradient is known to be ``factor`` times the right one is held to that.

    Raises where ours refuses, and where ours, or one with a factor, is further than it may be.
    """
    parts = [own[name] for own in by_rank]
    if refusals := [part for part in parts if isinstance(part, Refusal)]:
        if entry(name).ours:
            raise RuntimeError(min(refusals).why)
        return {"refused": min(refusals).why}
    losses, *gradients = zip(*parts, strict=True)
    mean = [torch.cat(rows) / (len(by_rank) * (factor or 1.0)) for rows in gradients]
    found = max(errors((loss, *mean), right) for loss in losses)
    if entry(name).ours or factor:
        check(name, shards, found)
    flat, right_flat = (torch.cat(list(both)).double().flatten() for both in (mean, right[1:]))
    cosine = torch.cosine_similarity(flat, right_flat, dim=0).item()
    return {"loss_error": found.loss, "gradient_error": found.gradient, "gradient_cosine": cosine}


def measure(shards: Shards, rounds: int, seconds: float) -> Record:
    """The record of one cell: answers first, then bytes and times. Raises where an answer or the bytes are wrong."""
    processes, right = len(shards.rows), truth(*shards.views())
    factors = {OURS: 1.0, TEXTBOOK: 1 / processes}
    by_rank = together(answers, processes, shards, tuple(factors))
    record = together(costs, processes, shards, rounds, seconds)[0]
    called, sent = record["contenders"][OURS]["sent"]["collectives"], model.sent_by_dual(shards, processes).sent
    if abs(called - sent) > 0.5:
        raise AssertionError(f"{OURS} at {shards}: expected {sent:,.0f} bytes sent, counted {called:,.0f}")
    for name, factor in factors.items():
        found = judged(name, shards, by_rank, right, factor)
        record["contenders"][name] |= found | {"gradient_factor": factor}
    return {"n": shards.n, "d": shards.d, "processes": processes, **record}


def costs(place: Place, shards: Shards, rounds: int, seconds: float) -> Record:
    """A job: what is sent, and times; the same on every rank but for the loopback's counter."""
    views = shards.of(place.rank)
    steps: dict[str, Turn] = {OURS: partial(step, build(OURS, shards.d), *views)}
    steps[TEXTBOOK] = partial(step, distributed_textbook, *views)
    with place.group("costs"):
        sent = {name: _sent(turn) for name, turn in steps.items()}
        rest: dict[str, Turn] = {"floor": _floor(shards), "header": _header(*views)}
        times = interleave(steps | rest, rounds, seconds, _time_together)
    over_ours = ratios(times, OURS)
    told = {name: {"seconds": spread(own), "times_ours": over_ours[name]} for name, own in times.items()}
    found = {name: {"sent": sent[name], **told[name]} for name in steps}
    return {"rounds": len(times[OURS]), "contenders": found, "floor": told["floor"], "header": told["header"]}


def _floor(shards: Shards) -> Turn:
    a1, a2 = torch.randn(2, shards.rows[0], shards.d)
    m = torch.randn(shards.d, shards.d)

    def turn() -> None:
        dist.all_reduce(torch.mm(a1.T, a2))
        torch.mm(a2, m.T)
        torch.mm(a1, m)

    return turn


def _header(z1: Tensor, z2: Tensor) -> Turn:
    """The exchange that precedes each step, with as much to compare as the loss has."""
    group = group_of("header", None)
    must_match = {f"claim {i}": (z1.dtype, z2.shape[1]) for i in range(10)}
    return lambda: check_on_all_ranks("header", group, z1, lambda: (z1.shape[0], must_match))


def _time_together(turn: Turn, calls: int) -> float:
    """Seconds per call on the slowest rank, the same figure on all of them."""
    dist.barrier()
    slowest = torch.tensor(wall(turn, calls), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _sent(turn: Turn) -> Record:
    """Bytes that a rank sends in a step: by the collectives, and by the loopback's counter, less idle traffic."""

    def steps() -> None:
        with called:
            for _ in range(COUNTED_STEPS):
                turn()

    called = model.Collectives()
    idle = _bytes_meanwhile(partial(time.sleep, IDLE_SECONDS)) / IDLE_SECONDS
    start = time.perf_counter()
    busy = _bytes_meanwhile(steps)
    by_counter = (busy - idle * (time.perf_counter() - start)) / COUNTED_STEPS / dist.get_world_size()
    return {"collectives": called.sent / COUNTED_STEPS, "loopback": by_counter if by_counter > 0 else None}


def _bytes_meanwhile(turn: Turn) -> int:
    """What the loopback interface carries during a turn; nothing where there is none of that name."""

    def carried() -> int:
        counters = psutil.net_io_counters(pernic=True).get("lo")
        return counters.bytes_recv if counters else 0

    dist.barrier()
    before = carried()
    turn()
    dist.barrier()
    return carried() - before


def section(grid: dict[int, list[Cell]], rounds: int, seconds: float) -> Record:
    preload("lightly.loss", "stable_pretraining.losses")
    shares = [Shards(sum(rows), EXACTNESS_FEATURES, rows) for processes in grid for rows in SHARES[processes]]
    cells = [Shards.even(cell, processes) for processes, cells in grid.items() for cell in cells]
    return {
        "cells": [measure(shards, rounds, seconds) for shards in cells],
        "exactness": [exactness(shards, contenders(len(shards.rows))) for shards in shares],
    }
