"""What all benches share: cells, a step and its right answer, turns, memory, dispatched work, the machine, its results.

*Turns.* Whatever else the machine does falls on all contenders, which take turns round by round; ratios are taken
within a round. A turn repeats a fast step until it lasts 0.1 s. *Truth* is float64, by plain autograd. *Working memory*
is what a step allocates beyond its inputs and the gradients that it returns. PyTorch's allocator tells its profiler of
every block, so the buffers inside its kernels count, and those of code that ``torch.compile`` generated; the scratch of
MKL and oneDNN does not. *Results* of a run are nobody's reference until git knows them.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import barlow_loss
from contenders import EPS, LAMBD, PAPER, build, entry

Record = dict[str, Any]
Turn = Callable[[], object]
Clock = Callable[[Turn, int], float]  # of a turn and how often it is called: seconds per call
Answer = tuple[Tensor, ...]  # the loss, and its gradient with respect to each view

SEED = 0  # of contenders that draw in a step
TURN_SECONDS, LEAST_ROUNDS = 0.1, 3
RESULTS = Path(__file__).parent / "results"
PATTERN = "20??-??-??-*.json"

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start and stop


@dataclass(frozen=True)
class Cell:
    n: int
    d: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.n}×{self.d}"

    @property
    def algorithm(self) -> str:
        """What ``algorithm="auto"`` runs here."""
        return "dual" if 2 * self.n <= self.d else "primal"

    def views(self, count: int = 2, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Views that agree as those of a half-trained encoder do: the same signal, each with its own noise."""
        generator = torch.Generator(device).manual_seed(self.n * 100_003 + self.d)
        signal, *noise = torch.randn(1 + count, self.n, self.d, generator=generator, device=device)
        return tuple((signal + 0.5 * own).to(dtype).requires_grad_() for own in noise)


def cells(*texts: str) -> tuple[Cell, ...]:
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


def in_float64(contender: Callable[..., Tensor], *views: Tensor) -> Answer:
    with all_cores():
        return step(contender, *(z.detach().double().requires_grad_() for z in views))


def gram_form(*views: Tensor) -> Tensor:
    """The loss through ‖C‖² = ⟨K1, K2⟩/N², the mean over the pairs of views; no D×D matrix, no code of the package."""
    n = views[0].shape[0]
    standardized = [(z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + EPS).sqrt() for z in views]
    losses = []
    for (u1, k1), (u2, k2) in combinations([(u, u @ u.T) for u in standardized], 2):
        diagonal = (u1 * u2).sum(dim=0) / n
        off_diagonal = (k1 * k2).sum() / n**2 - diagonal.square().sum()
        losses.append((diagonal - 1).square().sum() + LAMBD * off_diagonal)
    return torch.stack(losses).mean()


truth = partial(in_float64, gram_form)


def errors(answer: Answer, right: Answer) -> Errors:
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
    """Raises where an error is larger than ``allowed``, which follows from the name where it is not given."""
    allowed = allowed or (OURS_ALLOWED if entry(name).ours else OTHERS_ALLOWED)
    if not (found.loss <= allowed.loss and found.gradient <= allowed.gradient):
        raise AssertionError(f"{name} at {cell}: expected errors of at most {allowed}, found {found}")


def checked_turns(cell: Cell, names: tuple[str, ...], *views: Tensor) -> dict[str, Turn]:
    """A turn of each of ``names`` on these views; raises where its answer is wrong."""
    right, turns = truth(*views), {name: partial(step, build(name, cell.d), *views) for name in names}
    for name, turn in turns.items():
        check(name, cell, errors(turn(), right))
    return dict(turns)


def gemms(cell: Cell, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Turn:
    """The GEMMs alone that the algorithm chosen for ``cell`` needs."""
    n, d = cell.n, cell.d
    size = n if cell.algorithm == "dual" else d
    square = (torch.randn(size, size, device=device) / math.sqrt(size)).to(dtype)  # no float16 overflows
    a1, a2 = (torch.randn(2, n, d, device=device) / math.sqrt(n)).to(dtype)
    pairs = [(a1.T, a2), (a2, square.T), (a1, square)]
    if cell.algorithm == "dual":
        pairs = [(a1, a1.T), (a2, a2.T), (square, a1), (square, a2)]
    return lambda: [torch.mm(left, right) for left, right in pairs]


def wall(turn: Turn, calls: int = 1, now: Callable[[], float] = time.perf_counter) -> float:
    start = now()
    for _ in range(calls):
        turn()
    return (now() - start) / calls


processor = partial(wall, now=time.thread_time)  # in which other programs are not


def interleave(turns: dict[Any, Turn], rounds: int, seconds: float, clock: Clock = wall) -> dict[Any, list[float]]:
    """Seconds per call of each of ``turns``, round by round; after ``seconds`` only the least number of rounds.

    The first call of each sets up what is kept, and tells how often a turn repeats it.
    """
    calls = {turn: max(1, math.ceil(TURN_SECONDS / clock(turn, 1))) for turn in dict.fromkeys(turns.values())}
    times: dict[Any, list[float]] = {name: [] for name in turns}
    spent = 0.0
    gc.disable()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and spent > seconds:
            break
        for name, turn in turns.items():
            times[name].append(clock(turn, calls[turn]))
            spent += calls[turn] * times[name][-1]
    gc.enable()
    return times


def beside(
    turns: dict[str, Turn], reference: str, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The same, with a turn of ``reference`` right before that of every other one; and the ratios of these pairs.

    A round in which others take seconds is long; two turns that follow each other share what the machine does.
    """
    others = [name for name in turns if name != reference] or [reference]
    pairs = {(name, who): turns[who] for name in others for who in (reference, name)}
    taken = interleave(pairs, rounds, seconds)
    times = {name: taken[name, name] for name in others}
    times[reference] = [t for name in others for t in taken[name, reference]]
    over = {name: [t / own for t, own in zip(times[name], taken[name, reference], strict=True)] for name in others}
    return times, over | {reference: [1.0] * len(over[others[0]])}


def spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    return {name: spread([t / base for t, base in zip(own, times[over], strict=True)]) for name, own in times.items()}


def watched(run: Callable[[], Answer]) -> tuple[Answer, int]:
    """What ``run`` returns, tensors, and the peak bytes alive at once in it, without these.

    Compiled code must have run before: its compiler allocates too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = run()
    tree: Any = profiler.profiler
    results = {tensor.data_ptr() for tensor in answer}
    changes = sorted(_changes(tree.kineto_results.experimental_event_tree()))
    born = {address: i for i, (_, address, size) in enumerate(changes) if size > 0 and address in results}
    sizes = (size for i, (_, address, size) in enumerate(changes) if born.get(address) != i)
    return answer, max(accumulate(sizes, initial=0))


def _changes(events: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of every block given out (+) or taken back (−)."""
    for event in events:
        if event.tag.name == "Allocation":
            block = event.typed[1]
            yield event.start_time_ns, block.ptr, block.alloc_size
        yield from _changes(event.children)


class Work(TorchDispatchMode):
    """Operations of a turn, views and allocations too; FLOPs of the products; bytes that all others read and write.

    A block that is still in the cache when the next operation reads it counts again.
    """

    _NOTHING_MOVES = ("empty", "new_empty", "detach", "_unsafe_view", "promote_types")

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.flops = self.bytes = self.operations = 0
        with self:
            turn()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations += 1
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif not (func.is_view or name.startswith(self._NOTHING_MOVES)):
            assert name not in ("mv", "addmv"), "a product whose FLOPs torch cannot count"
            read = result if name == "index_select" else args[1:] if name == "copy_" else args
            self.bytes += _bytes(result) + _bytes(read)
        return result


def _bytes(tree: Any) -> int:
    """Of the tensors in it, each once, as x∘x has one operand; and once the elements of an expanded dimension."""
    found = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    each = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in found}.values()
    own = ([size if stride else min(size, 1) for size, stride in zip(t.shape, t.stride(), strict=True)] for t in each)
    return sum(t.element_size() * math.prod(sizes) for t, sizes in zip(each, own, strict=True))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(*packages: str, device: torch.device | None = None) -> Record:
    """What stands at the head of every file of results; of a GPU where ``device`` is one."""
    machine: Record = {"cpu": _cpu(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": cores()}
    if device is not None:
        name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        machine = {"device": name, "driver": driver or None, "runtime": torch.version.hip or torch.version.cuda}
    installed = {name: next((each.version for each in metadata.distributions(name=name)), None) for name in packages}
    return {
        **machine,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {"barlow-loss": barlow_loss.__version__, "torch": torch.__version__, **installed},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name() -> str:
    words = re.sub(r"(\(.*?\)|@.*|[^a-z0-9])+", "-", f"{_cpu()} {torch.backends.cpu.get_cpu_capability()}".lower())
    return words.strip("-")


def newest(folder: Path = RESULTS, *, committed: bool = False) -> Path:
    """The newest results in ``folder``, by the date that begins their name; of those that git knows, if any."""
    known = said("git", "ls-files", PATTERN, folder=folder).split() if committed else []
    found = [folder / name for name in known] or sorted(folder.glob(PATTERN))
    if not found:
        raise FileNotFoundError(f"{folder}: expected results named {PATTERN}, found none: run make bench")
    return found[-1]


def baseline(folder: Path = RESULTS) -> tuple[str, Record]:
    """Name and content of the newest results of the last commit, whatever a later run has written over them."""
    path = newest(folder, committed=True)
    content = said("git", "show", f"HEAD:./{path.name}", folder=folder)
    return path.name, json.loads(content) if content else load(path)


def load(path: Path) -> Record:
    results: Record = json.loads(path.read_text(encoding="utf-8"))
    return results


def store(results: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def said(*command: str, folder: Path = RESULTS) -> str:
    """What a program says in ``folder``; nothing where it fails, is missing, or there is no such folder."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
