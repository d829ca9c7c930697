"""What a step costs by counting: a GPU FLOPs, bytes, working memory, launches and time; a rank the bytes that it sends.

Nothing here is measured. N samples, D features; views of ``view`` bytes an element, operands of the matrix products of
``product`` bytes. *Moved* are the bytes where every kernel reads its operands once and writes its results once. *Again*
are those of kernels that pass twice over an operand: they come from the L2 cache where the columns in work fit there,
else from memory, so a prediction is a range: without and with them. Time = FLOPs/rate + bytes/bandwidth +
launches·launch: as if products and everything else took turns; or launches·host where the host cannot keep up.

Bytes sent by each of W ranks, by ring algorithms: to gather what each of them has, it sends that, and what comes in,
W − 1 times in all; to sum a tensor over them it sends 2 (W − 1)/W times the tensor. As much arrives.

    python benches/model.py               prints the model for the grid
    python benches/model.py --verify      counts operations on meta tensors beside it, but of compiled contenders
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan
from contenders import EPS, LAMBD, Textbook
from measure import Cell, cells, step, work

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GRID = cells("256x2048", "256x8192", "1024x8192", "2048x8192", "4096x8192", "2048x32768")

TEXTBOOK, COMPILED, LIGHTLY = "textbook, eager", "textbook, compiled", "lightly"
EAGER, TRITON, GRAPH = "ours, eager", "ours, Triton", "ours, CUDA graph"
CONTENDERS = (TEXTBOOK, COMPILED, LIGHTLY, EAGER, TRITON, GRAPH)
MODELLED = (TEXTBOOK, COMPILED, EAGER, TRITON, GRAPH)  # lightly's figures are the textbook's, but for its batch norm
COUNTED = (TEXTBOOK, EAGER, TRITON)


class Setting(NamedTuple):
    """Bytes of an element of the views, and of the operands of the products, without TF32."""

    name: str
    view: int
    product: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.view == 2 else torch.float32


FLOAT32 = Setting("fp32", 4, 4)
AUTOCAST = Setting("bf16 autocast", 2, 2)
SETTINGS = (AUTOCAST, FLOAT32)


class Chip(NamedTuple):
    """Ceilings: bytes per second of a copy, FLOP/s of a large product per setting, seconds per launch.

    launch: what the device needs from the end of one small kernel to the work of the next; host: what the host needs
    to issue one operation of eager PyTorch.
    """

    name: str
    bandwidth: float
    half: float
    single: float
    launch: float = 2e-6
    host: float = 5e-6

    def rate(self, setting: Setting) -> float:
        return self.single if setting == FLOAT32 else self.half


# Assumed until a run measures them: copy and 16-bit product as reported for H100 SXM boards, the float32 product as
# three quarters of the data sheet's 67 TFLOP/s, launch and host as rules of thumb.
H100 = Chip("H100", 3.0e12, 790e12, 50e12)


class Cost(NamedTuple):
    """FLOPs of the products; bytes moved, and passed over again; working memory without the gradients; launches."""

    flops: float
    moved: float
    again: float
    working: float
    launches: int


def floor(cell: Cell, setting: Setting, chip: Chip) -> float:
    """Seconds that no dual without symmetry can go below: FLOPs, or views read once and gradients written once."""
    least_bytes = 4 * cell.n * cell.d * setting.view
    return max(8 * cell.n**2 * cell.d / chip.rate(setting), least_bytes / chip.bandwidth)


def cost(name: str, cell: Cell, setting: Setting) -> Cost:
    """What a step of a contender costs. A pass is over all e elements of both views, or over a D×D or N×N matrix."""
    e, square, matrix = 2 * cell.n * cell.d, 2 * cell.n**2, cell.d**2 * setting.product
    dual, textbook = 8 * cell.n**2 * cell.d, 6 * cell.n * cell.d**2
    view, operand, c = setting.view, setting.product, 4  # c: float32, in which all is but the products
    half = operand < c
    if name == TEXTBOOK:
        # D×D: product 1, divide 2, two copies off the diagonal 4, square 2, sum 1; backward of the sum 1 (0), of the
        # square 7 (6), two slices back 6, zeros and their sum 4, the diagonal's two copies 4, divide 2, two products 2.
        # Views: batch norm forward 2 and backward 3, products 3.
        moved = (36 if half else 34) * matrix + 8 * e * view
        return Cost(textbook, moved, 3 * e * view, (5 if half else 4) * matrix, 44 if half else 42)
    if name == COMPILED:  # as inductor schedules it for sm_90
        return Cost(textbook, 9 * matrix + 11 * e * view, 0, 2 * matrix, 22)
    if name == EAGER:
        # One operation per pass. Standardise: z to x, both views put together, its sum, centred, its square, the sum of
        # that, scaled, diagonal, and a cast. Input gradients: of either view P scaled, twice another term added, a
        # product and its sum, scaled, and the casts of P, of u twice and of the gradient. Some 90 vectors.
        standardize = view + 13 * c + half * (c + operand)
        input_gradients = 14 * c + half * (4 * c + 3 * operand + view)
        frobenius = 2 * c + half * (operand + c)
        moved = e * (standardize + 3 * operand + input_gradients) + square * (2 * operand + frobenius) + 90 * c * cell.d
        working = e * (operand + (8 if half else 2)) + square * operand
        return Cost(dual, moved, 0, working, 73 if half else 61)
    # Standardise reads z, writes u; Gram matrices read u, write K1, K2; Frobenius sums read K1, K2; the products of the
    # backward read K1, K2 and u, write P; the last kernel reads P and u, writes the gradient. Again: z, P and u.
    moved = e * (2 * view + 6 * operand) + square * 3 * operand
    return Cost(dual, moved, e * (view + 2 * operand), e * 2 * operand + square * operand, 8)


def predicted(name: str, cell: Cell, setting: Setting, chip: Chip) -> tuple[float, float]:
    """Seconds of a step, without and with the bytes that are passed over again."""
    found = cost(name, cell, setting)
    host = chip.host * (1 if name == GRAPH else found.launches)
    device = found.flops / chip.rate(setting) + chip.launch * found.launches
    low, high = (max(device + moved / chip.bandwidth, host) for moved in (found.moved, found.moved + found.again))
    return low, high


def counted(name: str, cell: Cell, setting: Setting) -> tuple[float, int]:
    """Bytes and operations of a contender by what PyTorch is asked to do, on tensors without data."""
    views = [torch.empty(cell.n, cell.d, device="meta", dtype=setting.dtype).requires_grad_() for _ in range(2)]
    loss = Textbook(cell.d, torch.float32).to("meta") if name == TEXTBOOK else _ours(name, cell, setting)
    done = work(partial(step, loss, *views))
    return done.bytes + done.bytes_of_products, done.launches


def _ours(name: str, cell: Cell, setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """The dual with the products that a GPU would be given; on meta tensors "auto" would not choose float16.

    Triton's launches are seen as operations of torch wherever a TorchDispatchMode looks on.
    """
    backend = "eager" if name == EAGER else "triton"
    plan = Plan("dual", backend, torch.float32, torch.float16 if setting == AUTOCAST else torch.float32)
    return lambda z1, z2: loss_and_sums((z1, z2), LAMBD, EPS, plan, Shards(ALONE, (cell.n,)))[0]


class Sent(NamedTuple):
    """What a step costs one rank: bytes sent in all, those of vectors of D numbers among them, and FLOPs."""

    sent: float
    vectors: float
    flops: float


def gathered(size: float, processes: int) -> float:
    """Bytes that a rank sends to gather ``size`` bytes from each."""
    return size * (processes - 1)


def summed(size: float, processes: int) -> float:
    """Bytes that a rank sends to sum ``size`` bytes over all."""
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


# By operator: which argument holds what a rank puts in, and what it sends for that. Any other one is a KeyError.
_COLLECTIVES: dict[str, tuple[int, Callable[[float, int], float]]] = {
    "c10d::allreduce_": (0, summed),
    "c10d::allgather_": (1, gathered),
}


class Collectives(TorchDispatchMode):
    """Adds up in ``sent`` what the model says of every collective called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            inputs, sends = _COLLECTIVES[func.name()]
            self.sent += sum(sends(t.nbytes, dist.get_world_size()) for t in args[inputs])
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Prints the model; with ``--verify``, fails where its bytes differ by more than 3 % from those counted."""
    parser = argparse.ArgumentParser(description="The byte and FLOP model of a step; nothing is measured.")
    parser.add_argument("--verify", action="store_true", help="count the operations beside it")
    verify = parser.parse_args().verify
    for setting, cell, name in product(SETTINGS, GRID, MODELLED):
        found = cost(name, cell, setting)
        low, high = (1e6 * seconds for seconds in predicted(name, cell, setting, H100))
        said = f"{found.moved / 1e6:,.0f} MB moved, {found.working / 1e6:,.0f} held, {found.launches} launches"
        print(f"{setting.name}, {cell}, {name}: {said}, {low:,.0f} to {high:,.0f} µs")
        if verify and name in COUNTED and (name != TRITON or find_spec("triton")):
            moved, launches = counted(name, cell, setting)
            print(f"  counted: {moved / 1e6:,.0f} MB moved, {launches} launches")
            if abs(found.moved / moved - 1) > 0.03 or abs(found.launches - launches) > 1:  # the fill of ∂L/∂L
                raise SystemExit(f"model.py no longer describes {name!r}: bring its terms in line")


if __name__ == "__main__":
    main()
