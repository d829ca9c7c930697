"""⟨A, B⟩ = Σ A_ij B_ij of two matrices of our own, in parts that the next kernel adds up.

A program adds up every P-th block, P the number of programs, so that the order, and with it every bit, depends on the
size alone. Bytes: both matrices once. Sums within a program are float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from barlow_loss._backends.triton._launch import TL_DTYPES, Kernel, compute_dtype, operation

__all__ = ["frobenius"]

_BLOCK = 4096
_MOST_PROGRAMS = 1024  # eight for each multiprocessor of an H100; more would only be more parts to add up


@triton.jit
def frobenius_kernel(a, b, parts, elements, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), COMPUTE)
    while block * BLOCK < elements:
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(a + index, mask=index < elements, other=0.0).to(COMPUTE)
        y = tl.load(b + index, mask=index < elements, other=0.0).to(COMPUTE)
        total += x * y
        block += tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


_frobenius = Kernel(frobenius_kernel)


def _parts(a: Tensor) -> Tensor:
    """A number for each program: two at least, since a compiled graph for any size must not ask whether it is one."""
    blocks = (a.numel() + _BLOCK - 1) // _BLOCK
    if isinstance(blocks, int):
        programs = max(2, min(blocks, _MOST_PROGRAMS))
    else:
        programs = torch.sym_max(2, torch.sym_min(blocks, _MOST_PROGRAMS))
    return a.new_empty((programs,), dtype=compute_dtype(a.dtype))


@operation("frobenius")
def frobenius(a: Tensor, b: Tensor) -> Tensor:
    """⟨A, B⟩ of two contiguous matrices of one shape, as the parts of a sum, (P,)."""
    parts = _parts(a)
    elements = a.numel()
    key = a.dtype, elements
    _frobenius.launch(a, len(parts), key, (a, b, parts, elements), (_BLOCK, TL_DTYPES[parts.dtype]), num_warps=8)
    return parts


@frobenius.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return _parts(a)
