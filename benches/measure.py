"""How everything is measured: the cells, a step and its right answer, time in turns, working memory, work dispatched.

*Turns.* Whatever else the machine does falls on all contenders, which take turns round by round; ratios are taken
within a round. A turn repeats a fast step until it lasts 0.1 s.

*Clocks* take a turn and how often it is called, and return seconds per call: ``wall``, ``processor`` (the thread's own
time, in which other programs are not) and ``Events`` (of a GPU).

*Truth* is float64, by plain autograd. *Working memory* is what a step allocates beyond its inputs and the gradients
that it returns. PyTorch's allocator tells its profiler of every block, so the buffers inside its kernels count, and
those of code that ``torch.compile`` generated; the scratch of MKL and oneDNN does not.
"""

from __future__ import annotations

import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from barlow_loss import reference
from contenders import EPS, LAMBD, PAPER, build, entry
from machine import all_cores

Turn = Callable[[], object]
Clock = Callable[[Turn, int], float]
Answer = tuple[Tensor, ...]  # the loss, and its gradient with respect to each view

SEED = 0  # of contenders that draw in a step
LARGEST_ORACLE = 4096  # features; its float64 matrices take 128 MB each
TURN_SECONDS = 0.1
LEAST_ROUNDS = 3

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start and stop


@dataclass(frozen=True)
class Cell:
    """A point of a grid: a batch of ``n`` samples with ``d`` features."""

    n: int
    d: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """``Cell.parse("256x8192")``."""
        match = re.fullmatch(r"(\d+)[x×](\d+)", text)
        if match is None:
            raise ValueError(f"cell: expected N×D as in 256x8192, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}×{self.d}"

    @property
    def algorithm(self) -> Literal["primal", "dual"]:
        """What ``algorithm="auto"`` runs here."""
        return "dual" if 2 * self.n <= self.d else "primal"

    def views(
        self, count: int = 2, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Views that agree as those of a half-trained encoder do: the same signal, each with its own noise."""
        generator = torch.Generator(device).manual_seed(self.n * 100_003 + self.d)
        signal, *noise = torch.randn(1 + count, self.n, self.d, generator=generator, device=device)
        return tuple((signal + 0.5 * own).to(dtype).requires_grad_() for own in noise)


def cells(*texts: str) -> tuple[Cell, ...]:
    """``cells("256x8192", "64x2048")``."""
    return tuple(map(Cell.parse, texts))


class Errors(NamedTuple):
    """Distance to float64, relative: of the loss, and of the gradient by its norm over all views."""

    loss: float
    gradient: float


OURS_ALLOWED, OTHERS_ALLOWED = Errors(2e-6, 1e-5), Errors(1e-4, 1e-3)  # what ours promises; what D×D float32 gives


def step(contender: Callable[..., Tensor], *views: Tensor) -> Answer:
    """What is timed: the loss and its gradient with respect to all views."""
    loss = contender(*views)
    return loss.detach(), *torch.autograd.grad(loss, views)


def truth(*views: Tensor) -> Answer:
    """The same step in float64: the package's oracle, or the Gram form for more views or where D×D is too much."""
    return in_float64(_oracle if len(views) == 2 and views[0].shape[1] <= LARGEST_ORACLE else gram_form, *views)


def in_float64(contender: Callable[..., Tensor], *views: Tensor) -> Answer:
    """A contender's step on these numbers in float64."""
    with all_cores():
        return step(contender, *(z.detach().double().requires_grad_() for z in views))


def _oracle(z1: Tensor, z2: Tensor) -> Tensor:
    return reference.barlow_twins_loss(z1, z2, lambd=LAMBD, eps=EPS).loss


def gram_form(*views: Tensor) -> Tensor:
    """The loss through ‖C‖² = ⟨K1, K2⟩/N², the mean over the pairs of views; in float64 as right as the oracle."""
    n = views[0].shape[0]
    standardized = [(z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + EPS).sqrt() for z in views]
    losses = []
    for (u1, k1), (u2, k2) in combinations([(u, u @ u.T) for u in standardized], 2):
        diagonal = (u1 * u2).sum(dim=0) / n
        off_diagonal = (k1 * k2).sum() / n**2 - diagonal.square().sum()
        losses.append((diagonal - 1).square().sum() + LAMBD * off_diagonal)
    return torch.stack(losses).mean()


def errors(answer: Answer, right: Answer) -> Errors:
    """How far ``answer`` is from the ``right`` one."""
    loss = (answer[0].double() - right[0]).abs() / right[0].abs()
    difference = [g.double() - r for g, r in zip(answer[1:], right[1:], strict=True)]
    return Errors(loss.item(), (torch.cat(difference).norm() / torch.cat(right[1:]).norm()).item())


def error_of_own(name: str, answer: Answer, right: Answer, *views: Tensor) -> Errors:
    """The distance of an ``answer`` to float64 of what its contender computes: ``right`` if it is the paper's."""
    if entry(name).definition == PAPER:
        return errors(answer, right)
    torch.manual_seed(SEED)
    return errors(answer, in_float64(build(name, views[0].shape[1]), *views))


def check(name: str, cell: Cell, found: Errors, allowed: Errors | None = None) -> None:
    """Refuse to time a wrong answer.

    Raises:
        AssertionError: an error is larger than ``allowed``, which follows from the name where it is not given.
    """
    allowed = allowed or (OURS_ALLOWED if entry(name).ours else OTHERS_ALLOWED)
    if not (found.loss <= allowed.loss and found.gradient <= allowed.gradient):
        raise AssertionError(f"{name} at {cell}: expected errors of at most {allowed}, found {found}")


def gemms(cell: Cell, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[str], Turn]:
    """The shapes of the GEMMs that the algorithm chosen for ``cell`` needs, and a turn that does them alone."""

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) / math.sqrt(rows)).to(dtype)  # no float16 overflows

    n, d = cell.n, cell.d
    a1, a2 = matrix(n, d), matrix(n, d)
    if cell.algorithm == "dual":
        k = matrix(n, n)
        pairs = [(a1, a1.T), (a2, a2.T), (k, a1), (k, a2)]
    else:
        m = matrix(d, d)
        pairs = [(a1.T, a2), (a2, m.T), (a1, m)]
    shapes = ["·".join(f"({'×'.join(map(str, factor.shape))})" for factor in pair) for pair in pairs]
    return shapes, lambda: [torch.mm(left, right) for left, right in pairs]


def wall(turn: Turn, calls: int = 1, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call of ``turn``."""
    start = now()
    for _ in range(calls):
        turn()
    return (now() - start) / calls


processor = partial(wall, now=time.thread_time)


class Events:
    """The clock of a GPU: an event before and after each step, its inputs in memory as after a large network.

    The L2 cache is overwritten before each. The host issues the step while that runs, so its own launch gaps show only
    where the host needs longer than the overwriting and the step together; ``in_a_row`` leaves the overwriting out.
    """

    LEAST_FLUSH = 256 * 2**20
    MOST_CALLS = 300  # in a turn: the overwriting takes longer than a small step

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._other = torch.empty(max(4 * cache, self.LEAST_FLUSH), dtype=torch.int8, device=device)

    def __call__(self, turn: Turn, calls: int) -> float:
        pairs = []
        for _ in range(min(calls, self.MOST_CALLS)):
            self._other.zero_()
            pairs.append(self._around(turn, 1))
        torch.cuda.synchronize()
        milliseconds: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / 1e3

    def in_a_row(self, turn: Turn, calls: int) -> float:
        """Seconds per call of ``calls`` in a row: with the host's share, and inputs in the cache where they fit."""
        torch.cuda.synchronize()
        start, end = self._around(turn, calls)
        torch.cuda.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds / calls

    def _around(self, turn: Turn, calls: int) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            turn()
        end.record()
        return start, end


def interleave(turns: dict[str, Turn], rounds: int, seconds: float, clock: Clock = wall) -> dict[str, list[float]]:
    """Seconds per call of each of ``turns``, round by round; after ``seconds`` only the least number of rounds.

    All have run before, so that nothing is set up here; a fast one is repeated until its turn lasts.
    """
    taken = {name: _Repeated(turn, clock) for name, turn in turns.items()}
    for _ in _rounds(taken, rounds, seconds):
        for repeated in taken.values():
            repeated.take()
    return {name: repeated.times for name, repeated in taken.items()}


def beside(
    turns: dict[str, Turn], reference: str, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The same, with a turn of ``reference`` right before that of every other one; and the ratios of these pairs.

    A round in which others take seconds is long; two turns that follow each other share what the machine does.
    """
    taken = {name: _Repeated(turn, wall) for name, turn in turns.items()}
    over: dict[str, list[float]] = {name: [] for name in turns}
    for _ in _rounds(taken, rounds, seconds):
        for name, repeated in taken.items():
            own = taken[reference].take()
            over[name].append(1.0 if name == reference else repeated.take() / own)
    return {name: repeated.times for name, repeated in taken.items()}, over


class _Repeated:
    """Takes turns, and keeps their ``times`` per call, and the seconds ``spent``."""

    def __init__(self, turn: Turn, clock: Clock) -> None:
        self._turn = turn
        self._clock = clock
        self._calls = 0
        self.times: list[float] = []
        self.spent = 0.0

    def take(self) -> float:
        """Seconds per call in this turn; the first call of a slow one is its first turn."""
        seconds = None
        if self._calls == 0:
            seconds = self._clock(self._turn, 1)
            self._calls = max(1, math.ceil(TURN_SECONDS / seconds))
        if seconds is None or self._calls > 1:
            seconds = self._clock(self._turn, self._calls)
        self.times.append(seconds)
        self.spent += self._calls * seconds
        return seconds


def _rounds(taken: dict[str, _Repeated], rounds: int, seconds: float) -> Iterator[int]:
    """Counts rounds, without garbage collection, until there is enough."""
    gc.disable()
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and sum(repeated.spent for repeated in taken.values()) > seconds:
                return
            yield done
    finally:
        gc.enable()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Each one's time over that of ``over``, taken within each round."""
    return {name: spread([t / base for t, base in zip(own, times[over], strict=True)]) for name, own in times.items()}


def watched(run: Callable[[], Answer]) -> tuple[Answer, int]:
    """What ``run`` returns, tensors, and the peak bytes alive at once in it, without these.

    Compiled code must have run before: its compiler allocates too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = run()
    tree: Any = profiler.profiler
    changes = sorted(_changes(tree.kineto_results.experimental_event_tree()))
    results = {tensor.data_ptr() for tensor in answer}
    born = {address: i for i, (_, address, size) in enumerate(changes) if size > 0 and address in results}
    live = peak = 0
    for i, (_, address, size) in enumerate(changes):
        if born.get(address) != i:
            live += size
            peak = max(peak, live)
    return answer, peak


def _changes(events: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of every block given out (+) or taken back (−)."""
    pending = list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag.name == "Allocation":
            block = event.typed[1]
            yield event.start_time_ns, block.ptr, block.alloc_size


def work(turn: Turn) -> Work:
    """What ``turn`` dispatches."""
    counted = Work()
    with counted:
        turn()
    return counted


class Work(TorchDispatchMode):
    """FLOPs of the products; bytes that they, and that all other operations, read and write; and how many there are.

    A block that is still in the cache when the next operation reads it counts again. ``operations`` are all, views and
    allocations too; ``launches`` those that read or write.
    """

    _NOTHING_MOVES = ("empty", "new_empty", "detach", "_unsafe_view", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operations = self.launches = 0
        self.bytes = self.bytes_of_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations += 1
        if func.is_view or name.startswith(self._NOTHING_MOVES):
            return result
        moved = sum(map(_own_bytes, _operands(name, args, result)))
        self.launches += 1 + (name == "slice_backward")
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.bytes_of_products += moved
        elif name in ("mv", "addmv"):
            raise NotImplementedError(
                f"work: expected products of matrices, got {name}, whose FLOPs torch cannot count"
            )
        else:
            self.bytes += moved
        return result


def _operands(name: str, args: Any, result: Any) -> list[Tensor]:
    """What an operation reads, each tensor once (x∘x and u uᵀ have one operand), and what it writes."""
    written, found = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (result, args))
    read = list({(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in found}.values())
    if name == "copy_":
        read = read[1:]
    if name == "index_select":  # the rows that come out, not all there are
        read = written
    if name == "slice_backward":  # zeros first, then the copy over them
        written = 2 * written
    return read + written


def _own_bytes(t: Tensor) -> int:
    """The bytes of a tensor's own elements: one of an expanded dimension counts once."""
    return t.element_size() * math.prod(
        size if stride else min(size, 1) for size, stride in zip(t.shape, t.stride(), strict=True)
    )
