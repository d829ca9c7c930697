"""The section "host": what a step costs the host where its numbers cost nothing, at sizes of a few rows.

There a step takes what Python, autograd and the start of its operations take. The clock is the processor time of the
thread, which whatever else the machine does leaves out; two take turns, round by round, and ratios are taken within a
round.

* *eager*, 4×16 in float32, beside the textbook. Both answers are held to float64 before they are timed.
* *Triton on a pretended GPU*, 16×32 in bfloat16, beside an autograd.Function that computes nothing. No kernel runs:
  triton's own launch code does, on CPU tensors, and a driver that is not there records each launch
  (tests/kernels/compiled/fake_driver.py). What comes out is whatever lay in memory. The products are torch.mm on the
  CPU; the time includes them and the recording.
* the operations that a step dispatches, forward and backward, views and allocations too: the same on every machine.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import deque
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from barlow_loss import BarlowTwinsLoss, _plan
from baselines import EPS, LAMBD, OURS, TEXTBOOK, build
from limits import work
from timing import interleave, processor_time, ratios, spread
from workload import Cell, check, errors, step, truth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from timing import Turn

    Record = dict[str, Any]

EAGER = "eager"
TRITON = "Triton on a pretended GPU"
NOTHING = "an empty autograd.Function"
EAGER_CELL, TRITON_CELL = Cell(4, 16), Cell(16, 32)
COUNTED = (Cell(4, 16), Cell(64, 2048))
DRIVER = Path(__file__).parents[1] / "tests" / "kernels" / "compiled"
WARM_UPS = 10


def host(rounds: int, seconds: float) -> Record:
    """Both steps, why one is left out, and how many operations a step dispatches."""
    torch.set_num_threads(1)
    reason = obstacle()
    steps = [eager(rounds, seconds)] if reason else [eager(rounds, seconds), on_pretended_gpu(rounds, seconds)]
    return {
        "steps": steps,
        "left_out": {TRITON: reason} if reason else {},
        "operations": [{"n": cell.n, "d": cell.d, "operations": operations(cell)} for cell in COUNTED],
    }


def operations(cell: Cell) -> int:
    """How many operations a step of ours dispatches on the CPU, forward and backward."""
    return work(partial(step, build(OURS, cell.d), *cell.views())).operations


def eager(rounds: int, seconds: float) -> Record:
    """Ours beside the textbook.

    Raises:
        AssertionError: an answer is wrong.
    """
    cell = EAGER_CELL
    views = cell.views()
    right = truth(*views)
    turns: dict[str, Turn] = {}
    for name in (OURS, TEXTBOOK):
        contender = build(name, cell.d)
        check(name, cell, errors(step(contender, *views), right))
        turns[name] = partial(step, contender, *views)
    return {"what": EAGER, "n": cell.n, "d": cell.d, "dtype": "float32", **_timed(turns, rounds, seconds)}


def on_pretended_gpu(rounds: int, seconds: float) -> Record:
    """The launches of a step, beside an autograd.Function that computes nothing."""
    cell = TRITON_CELL
    views = [z.detach().bfloat16().requires_grad_() for z in cell.views()]
    loss = BarlowTwinsLoss(LAMBD, eps=EPS, algorithm="dual", backend="triton")
    turns: dict[str, Turn] = {OURS: partial(step, loss, *views), NOTHING: partial(step, nothing, *views)}
    with pretended_gpu() as gpu:
        turns[OURS]()
        launches = [launch.kernel for launch in gpu.launches]
        gpu.launches = deque(maxlen=1)  # of millions
        timed = _timed(turns, rounds, seconds)
    return {"what": TRITON, "n": cell.n, "d": cell.d, "dtype": "bfloat16", "launches": launches, **timed}


def _timed(turns: dict[str, Turn], rounds: int, seconds: float) -> Record:
    """The first of two ``turns`` over the second, its reference."""
    for turn in turns.values():
        for _ in range(WARM_UPS):
            turn()
    times = interleave(turns, rounds, seconds, processor_time)
    ours, reference = times
    return {
        "reference": reference,
        "rounds": len(times[ours]),
        "seconds": spread(times[ours]),
        "reference_seconds": spread(times[reference]),
        "over_reference": ratios(times, reference)[ours],
    }


def obstacle() -> str | None:
    """Why launches cannot be pretended here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton interprets kernels here"
    version, known = importlib.import_module("triton").__version__, _from_tests("fake_driver").KNOWN_TRITON
    return None if version.startswith(known) else f"triton {version} is not among {', '.join(known)}"


@contextmanager
def pretended_gpu() -> Iterator[Any]:
    """CPU tensors are launched as on an H100 that is not there, with the backend and the products that it would get."""
    forget = _plan._remembered.cache_clear
    forget()
    try:
        with (
            _from_tests("fake_driver").pretended(_from_tests("chips").CHIPS["sm_90"]) as gpu,
            mock.patch.object(_plan, "choose_backend", return_value="triton"),
            mock.patch.object(_plan, "_FLOAT16_MATMUL_DEVICES", ("cpu",)),
        ):
            yield gpu
    finally:
        forget()


def _from_tests(module: str) -> Any:
    if str(DRIVER) not in sys.path:
        sys.path.append(str(DRIVER))
    return importlib.import_module(module)


def nothing(z1: Tensor, z2: Tensor) -> Tensor:
    """A scalar that is not computed, of gradients that are not."""
    loss: Tensor = _Nothing.apply(z1, z2)[0]
    return loss


class _Nothing(torch.autograd.Function):
    """Three outputs, two saved tensors, two fresh gradients: the least that a loss with two terms asks of autograd."""

    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z1, z2)
        loss, on_diagonal, off_diagonal = (z1.new_empty((), dtype=torch.float32) for _ in range(3))
        return loss, on_diagonal, off_diagonal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor]:
        z1, z2 = ctx.saved_tensors
        return torch.empty_like(z1), torch.empty_like(z2)
