"""The section "distributed": what several processes cost, and whether what they compute is the loss of their batch.

W processes of one thread each form a gloo group over the loopback; each holds rows of its own of both views.

``cells``: ours against the published program. All ranks start a turn together and it lasts as long as on the slowest of
them. ``floor`` is the published program's three products and its all-reduce of C alone; ``header`` the exchange of
shapes and settings that precedes a step of ours.

Three counts of the bytes are made: the model, what the collectives called send by it, which must be the same, and the
loopback's counter, which sees TCP and other programs as well. The model is that of ring algorithms: of W ranks each
sends what it has, and what comes in, W − 1 times in all to gather, and 2 (W − 1)/W times a tensor to sum it over them.
As much arrives.

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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss._collectives import group_of
from barlow_loss._header import check_on_all_ranks
from contenders import OURS, TEXTBOOK, build, contenders, distributed_textbook, entry
from measure import SEED, Answer, Cell, Record, Turn, check, errors, interleave, ratios, spread, step, truth, wall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GRID = {2: [Cell(256, 4096)], 4: [Cell(256, 4096)]}
# Rows of each rank, 256 in all: as many everywhere, and not.
SHARES: dict[int, list[tuple[int, ...]]] = {2: [(128, 128), (96, 160)], 4: [(64, 64, 64, 64), (32, 96, 48, 80)]}
EXACTNESS_FEATURES = 512
TIMEOUT = timedelta(seconds=60)  # of a collective; the slowest step takes five
JOB_SECONDS = 300.0
COUNTED_STEPS, IDLE_SECONDS = 2, 0.5


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


class Sent(NamedTuple):
    """What a step costs one rank: bytes sent in all, those of vectors of D numbers among them, and FLOPs."""

    sent: float
    vectors: float
    flops: float


def gathered(size: float, processes: int) -> float:
    return size * (processes - 1)


def summed(size: float, processes: int) -> float:
    return 2 * size * (processes - 1) / processes


def sent_by_dual(cell: Cell, processes: int, itemsize: int = 4) -> Sent:
    """Ours for N ≤ D/2: û of both views, gathered, four products, and what is per feature, in float64.

    The vectors: the pivot; N, s₁ and s₂ of both views; C_ii, ‖C‖² and q of both views. Besides, the header's three
    integers, and two float32 in backward.
    """
    n, d = cell.n, cell.d
    vectors = sum(summed(8 * numbers, processes) for numbers in (2 * d, 1 + 4 * d, 1 + 3 * d))
    vectors += gathered(3 * 8, processes) + summed(2 * 4, processes)
    matrices = 2 * gathered(itemsize * n * d / processes, processes)
    return Sent(matrices + vectors, vectors, 8 * n * n * d / processes)


def sent_by_textbook(cell: Cell, processes: int) -> Sent:
    """The published program: C summed in float32, three products; the vectors of its batch norm are left out."""
    return Sent(summed(4 * cell.d**2, processes), 0, 6 * cell.n * cell.d**2 / processes)


class Collectives(TorchDispatchMode):
    """Adds up in ``sent`` what the model says of every collective that a turn calls."""

    # By operator: which argument holds what a rank puts in, and what it sends for that. Any other one is a KeyError.
    _KNOWN: ClassVar = {"c10d::allreduce_": (0, summed), "c10d::allgather_": (1, gathered)}

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.sent = 0.0
        with self:
            turn()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            inputs, sends = self._KNOWN[func.name()]
            self.sent += sum(sends(t.nbytes, dist.get_world_size()) for t in args[inputs])
        return func(*args, **(kwargs or {}))


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
    right, by_rank = truth(*shards.views()), together(answers, len(shards.rows), shards, names)
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
    held = {name: judged(name, shards, by_rank, right, factor) for name, factor in factors.items()}
    record = together(costs, processes, shards, rounds, seconds)[0]
    for name, factor in factors.items():
        record["contenders"][name] |= held[name] | {"gradient_factor": factor}
    called, sent = record["contenders"][OURS]["sent"]["collectives"], sent_by_dual(shards, processes).sent
    if abs(called - sent) > 0.5:
        raise AssertionError(f"{OURS} at {shards}: expected {sent:,.0f} bytes sent, counted {called:,.0f}")
    return {"n": shards.n, "d": shards.d, "processes": processes, **record}


def costs(place: Place, shards: Shards, rounds: int, seconds: float) -> Record:
    """A job: what is sent, and times; the same on every rank but for the loopback's counter."""
    z1, z2 = shards.of(place.rank)
    steps: dict[str, Turn] = {OURS: partial(step, build(OURS, shards.d), z1, z2)}
    steps[TEXTBOOK] = partial(step, distributed_textbook, z1, z2)
    a1, a2, m = z1.detach(), z2.detach(), torch.randn(shards.d, shards.d)
    claims = {f"claim {i}": (z1.dtype, shards.d) for i in range(10)}  # as much to compare as the loss has
    with place.group("costs"):
        group = group_of("header", None)
        rest: dict[str, Turn] = {
            "floor": lambda: (dist.all_reduce(a1.T @ a2), a2 @ m.T, a1 @ m),
            "header": lambda: check_on_all_ranks("header", group, z1, lambda: (len(z1), claims)),
        }
        sent = {name: _sent(turn) for name, turn in steps.items()}
        times = interleave(steps | rest, rounds, seconds, _time_together)
    over_ours = ratios(times, OURS)
    told = {name: {"seconds": spread(own), "times_ours": over_ours[name]} for name, own in times.items()}
    found = {name: {"sent": sent[name], **told[name]} for name in steps}
    return {"rounds": len(times[OURS]), "contenders": found, "floor": told["floor"], "header": told["header"]}


def _time_together(turn: Turn, calls: int) -> float:
    dist.barrier()
    slowest = torch.tensor(wall(turn, calls), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _sent(turn: Turn) -> Record:
    """Bytes that a rank sends in a step: by the collectives, and by the loopback's counter, less idle traffic."""
    called = Collectives(turn)
    idle = _carried(partial(time.sleep, IDLE_SECONDS)) / IDLE_SECONDS
    start = time.perf_counter()
    busy = _carried(partial(wall, turn, COUNTED_STEPS))
    by_counter = (busy - idle * (time.perf_counter() - start)) / COUNTED_STEPS / dist.get_world_size()
    return {"collectives": called.sent, "loopback": by_counter if by_counter > 0 else None}


def _carried(turn: Turn) -> int:
    """Bytes that the loopback interface carries during a turn; none where there is none of that name."""

    def total() -> int:
        dist.barrier()
        counters = psutil.net_io_counters(pernic=True).get("lo")
        return counters.bytes_recv if counters else 0

    before = total()
    turn()
    return total() - before


def section(grid: dict[int, list[Cell]], rounds: int, seconds: float) -> Record:
    preload("lightly.loss", "stable_pretraining.losses")
    shares = [Shards(sum(rows), EXACTNESS_FEATURES, rows) for processes in grid for rows in SHARES[processes]]
    cells = [Shards.even(cell, processes) for processes, cells in grid.items() for cell in cells]
    return {
        "cells": [measure(shards, rounds, seconds) for shards in cells],
        "exactness": [exactness(shards, contenders(len(shards.rows))) for shards in shares],
    }
