"""Times the loss against the others over N×D, with working memory and the distance to float64.

One process; the contenders take turns, round by round, and a turn of ours goes right before each of the others (O A O B
O C, O A O B O C, …), so that whatever else the machine does falls on both of a pair; each ratio is that of a pair, and
the median over the rounds is reported with its quartiles. A turn repeats a fast step until it lasts 0.1 s. Where ours
chooses the dual, ``barlow_loss, dual`` runs the same code: its ratio shows the noise.

Each contender's loss and gradient are compared with float64 before it is timed; one that computes another function
than the paper's is held to its own in float64, and its distance to the paper's is reported. What is timed is one step's
share of the loss: forward and backward, down to the gradients of both views.

FLOP model, forward + backward, N samples, D features:

* dual: 4 GEMMs of 2·N²·D: K1 = ẑ1 ẑ1ᵀ, K2 = ẑ2 ẑ2ᵀ, K2 ẑ1, K1 ẑ2. Chosen for N ≤ D/2.
* primal: 3 GEMMs of 2·N·D²: C = ẑ1ᵀ ẑ2, ẑ2 Mᵀ, ẑ1 M. The textbook formula does the same three at every shape.

Byte model, float32: all pass some dozens of times over N×D matrices, 4·N·D bytes each; the textbook formula and lightly
read or write a D×D matrix 39 times besides, 4·D² bytes each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from baselines import OURS, build, entry
from memory import watched_step
from timing import beside, spread
from workload import SEED, Answer, Cell, check, error_of_own, errors, present, step, truth

if TYPE_CHECKING:
    from torch import Tensor

    from baselines import Contender
    from timing import Turn

    Record = dict[str, Any]


def compare(
    cell: Cell, names: tuple[str, ...], threads: int, rounds: int, seconds: float, *, patient: bool = False
) -> Record:
    """Errors, working memory, times and ratios at ``cell`` of those of ``names`` that ``workload.present`` admits."""
    torch.set_num_threads(threads)
    torch.compiler.reset()  # generated code is for one shape and one number of threads
    views = cell.views()
    right = truth(*views)
    contenders: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name in present(cell, names, patient=patient):
        contender = build(name, cell.d)
        if entry(name).compiled:
            step(contender, *views)
        contenders[name] = _checked(name, contender, cell, views, right)
        turns[name] = partial(step, contender, *views)
    times, over_ours = beside(turns, OURS, rounds, seconds)
    for name, record in contenders.items():
        record |= {"seconds": spread(times[name]), "times_ours": spread(over_ours[name])}
    return {
        "n": cell.n,
        "d": cell.d,
        "threads": threads,
        "algorithm": cell.algorithm,
        "rounds": len(over_ours[OURS]),
        "contenders": contenders,
    }


def _checked(name: str, contender: Contender, cell: Cell, views: tuple[Tensor, Tensor], right: Answer) -> Record:
    """What one step tells: distance to float64 and working memory; raises where the answer is wrong."""
    torch.manual_seed(SEED)
    answer, size = watched_step(contender, *views)
    own = error_of_own(name, answer, right, *views)
    check(name, cell, own)
    found = errors(answer, right)
    return {
        "definition": entry(name).definition,
        "loss_error": found.loss,
        "gradient_error": found.gradient,
        "error_of_own": own._asdict(),
        "working_bytes": size,
    }
