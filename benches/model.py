"""What a step costs by counting: a GPU FLOPs, bytes, working memory, launches and time; a rank the bytes that it sends.

Nothing here is measured. N samples, D features, e = 2·N·D elements of both views of ``view`` bytes each; the matrix
products take elements of ``product`` bytes. "bf16 autocast": view = product = 2, the views are bfloat16, as a linear
layer under autocast returns them. "fp32": view = product = 4, ``torch.get_float32_matmul_precision() == "highest"``.

**FLOPs**, those of the matrix products: dual 8·N²·D, 4 of them; the D×D formula 6·N·D².

**Bytes**, three levels:

* *least*: the views read once, the gradients written once, 2·e·view. No kernel can have less. With the FLOPs it makes
  the floor: the larger of FLOPs over the rate of a matrix product and least bytes over the bandwidth of a copy.
* *moved*: every kernel reads its operands once and writes its results once.
* *again*: kernels that pass twice over an operand read it a second time, from the L2 cache where the columns in work
  fit there, from memory where they do not. A prediction is a range: without and with these bytes.

Moved, per contender. A pass is over all e elements of both views, or over a D×D or N×N matrix:

* dual, Triton: standardise reads z (view), writes u (product); Gram matrices read u, write K1, K2; Frobenius sums read
  K1, K2; the products of the backward read K1, K2 and u, write P; the last kernel reads P and u, writes the
  gradient (view). e·(2·view + 6·product) + 2N²·3·product. Again: z, P and u once more, e·(view + 2·product). 8
  launches: standardise, 2 products, Frobenius, loss terms, 2 products, input gradients.
* dual, eager: one operation per pass, float32 (c = 4) between products. Standardise: z to x, both views put together,
  its sum, centred, its square, the sum of that, scaled, diagonal: view + 13c, and c + product for the cast where the
  products have 16 bits.
  Four products: e·3·product, 2N²·2·product. Frobenius: 2N²·2c, and 2N²·(product + c) for the casts, in 16 bits.
  Input gradients: of either view P scaled, twice another term added, a product and its sum, scaled: 14c; in 16 bits
  the casts of P, of u twice and of the gradient besides: 4c + 3·product + view. Some 90 float32 vectors.
* textbook, eager: a D×D matrix is passed 36 times in 16 bits (34 in fp32): product 1, divide 2, two copies off the
  diagonal 4, square 2, sum 1; backward of the sum 1 (0), of the square 7 (6), two slices back 6, zeros and their sum 4,
  the diagonal's two copies 4, divide 2, two products 2. Both views: 8 passes, batch norm forward 2 and backward 3,
  products 3. Again: batch norm passes twice, forward 1, backward 2.
* textbook, compiled: 9 passes over D×D and 11 over the views, as inductor schedules it for sm_90.

**Working memory**, beyond the views, without the gradients (e·view): Triton u, K1, K2 and P; eager u, K1, K2 and
float32 matrices of one view, five before the gradients take the place of one (one in fp32); textbook 5 (4) D×D matrices
and both outputs of batch norm, of which the gradients take the place; compiled C and ∂L/∂C at least.

**Time** = FLOPs/rate + bytes/bandwidth + launches·launch: as if products and everything else took turns; or
launches·host where the host cannot keep up. A graph is launched once.

**Bytes sent** by each of W ranks, by ring algorithms: to gather what each of them has, it sends that, and what comes
in, W − 1 times in all; to sum a tensor over them it sends 2 (W − 1)/W times the tensor. As much arrives.

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

TEXTBOOK = "textbook, eager"
COMPILED = "textbook, compiled"
LIGHTLY = "lightly"
EAGER = "ours, eager"
TRITON = "ours, Triton"
GRAPH = "ours, CUDA graph"
CONTENDERS = (TEXTBOOK, COMPILED, LIGHTLY, EAGER, TRITON, GRAPH)

_ACCUMULATOR = 4  # bytes of float32


class Setting(NamedTuple):
    """How the contenders are run: bytes of an element of the views and of the operands of the products."""

    name: str
    view: int
    product: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the views."""
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
        """FLOP/s of a matrix product."""
        return self.single if setting == FLOAT32 else self.half


# Assumed until a run measures them: copy and 16-bit product as reported for H100 SXM boards, the float32 product as
# three quarters of the data sheet's 67 TFLOP/s, launch and host as rules of thumb.
H100 = Chip("H100", 3.0e12, 790e12, 50e12)


def chip(name: str, ceilings: dict[str, float]) -> Chip:
    """Measured ceilings as the model takes them; ours multiplies in float16."""
    launch = ceilings.get("launch_seconds", ceilings["host_seconds"])
    rates = ceilings["float16_flops"], ceilings["float32_flops"]
    return Chip(name, ceilings["copy_bytes_per_second"], *rates, launch, ceilings["host_seconds"])


class Cost(NamedTuple):
    """FLOPs of the products; bytes moved, and passed over again; working memory without the gradients; launches."""

    flops: float
    moved: float
    again: float
    working: float
    launches: int


def least_bytes(cell: Cell, setting: Setting) -> float:
    """Both views read once, both gradients written once."""
    return 4 * cell.n * cell.d * setting.view


def floor(cell: Cell, setting: Setting, chip: Chip) -> float:
    """Seconds that no implementation of the dual without symmetry can go below: FLOPs or least bytes."""
    return max(8 * cell.n**2 * cell.d / chip.rate(setting), least_bytes(cell, setting) / chip.bandwidth)


def dual_triton(cell: Cell, setting: Setting) -> Cost:
    """Four kernels, four products."""
    n, e = cell.n, 2 * cell.n * cell.d
    view, product = setting.view, setting.product
    return Cost(
        flops=8 * n**2 * cell.d,
        moved=e * (2 * view + 6 * product) + 2 * n**2 * 3 * product,
        again=e * (view + 2 * product),
        working=e * 2 * product + 2 * n**2 * product,
        launches=8,
    )


def dual_eager(cell: Cell, setting: Setting) -> Cost:
    """One operation per pass, float32 between the products."""
    n, e = cell.n, 2 * cell.n * cell.d
    view, product, c = setting.view, setting.product, _ACCUMULATOR
    half = product < c
    standardize = view + 13 * c + half * (c + product)
    input_gradients = 14 * c + half * (4 * c + 3 * product + view)
    frobenius = 4 * c + half * 2 * (product + c)
    return Cost(
        flops=8 * n**2 * cell.d,
        moved=e * (standardize + 3 * product + input_gradients) + n**2 * (4 * product + frobenius) + 90 * c * cell.d,
        again=0,
        working=e * (product + (8 if half else 2)) + 2 * n**2 * product,
        launches=73 if half else 61,
    )


def textbook_eager(cell: Cell, setting: Setting) -> Cost:
    """The D×D formula, operation by operation."""
    e, matrix = 2 * cell.n * cell.d, cell.d**2 * setting.product
    half = setting.product < _ACCUMULATOR
    return Cost(
        flops=6 * cell.n * cell.d**2,
        moved=(36 if half else 34) * matrix + 8 * e * setting.view,
        again=3 * e * setting.view,
        working=(5 if half else 4) * matrix,
        launches=44 if half else 42,
    )


def textbook_compiled(cell: Cell, setting: Setting) -> Cost:
    """The D×D formula as inductor fuses it."""
    e, matrix = 2 * cell.n * cell.d, cell.d**2 * setting.product
    return Cost(6 * cell.n * cell.d**2, 9 * matrix + 11 * e * setting.view, 0, 2 * matrix, 22)


# lightly's figures are those of the textbook within what batch norm costs; it gets no line of its own.
MODELS: dict[str, Callable[[Cell, Setting], Cost]] = {
    TEXTBOOK: textbook_eager,
    COMPILED: textbook_compiled,
    EAGER: dual_eager,
    TRITON: dual_triton,
    GRAPH: dual_triton,
}


COUNTED = (TEXTBOOK, EAGER, TRITON)


def predicted(cost: Cost, name: str, setting: Setting, chip: Chip) -> tuple[float, float]:
    """Seconds of a step that costs so much, without and with the bytes that are passed over again."""
    host = chip.host * (1 if name == GRAPH else cost.launches)
    device = cost.flops / chip.rate(setting) + chip.launch * cost.launches
    low, high = (max(device + moved / chip.bandwidth, host) for moved in (cost.moved, cost.moved + cost.again))
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
    """What a step costs one rank: bytes sent of large matrices, bytes sent of vectors of D numbers, and FLOPs."""

    matrices: float
    vectors: float
    flops: float

    @property
    def sent(self) -> float:
        """All bytes."""
        return self.matrices + self.vectors


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
    return Sent(
        matrices=2 * gathered(itemsize * n * d / processes, processes),
        vectors=gathered(3 * 8, processes) + vectors + summed(2 * 4, processes),
        flops=8 * n * n * d / processes,
    )


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
    for setting, cell, (name, model) in product(SETTINGS, GRID, MODELS.items()):
        cost = model(cell, setting)
        low, high = (1e6 * seconds for seconds in predicted(cost, name, setting, H100))
        said = f"{cost.moved / 1e6:,.0f} MB moved, {cost.working / 1e6:,.0f} held, {cost.launches} launches"
        print(f"{setting.name}, {cell}, {name}: {said}, {low:,.0f} to {high:,.0f} µs")
        if verify and name in COUNTED and (name != TRITON or find_spec("triton")):
            moved, launches = counted(name, cell, setting)
            print(f"  counted: {moved / 1e6:,.0f} MB moved, {launches} launches")
            if abs(cost.moved / moved - 1) > 0.03 or abs(cost.launches - launches) > 1:  # the fill of ∂L/∂L
                raise SystemExit(f"model.py no longer describes {name!r}: bring its docstring and terms in line")


if __name__ == "__main__":
    main()
