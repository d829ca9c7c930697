"""What every launch shares: the device it goes to, and the sizes of tiles and buffers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["TL_DTYPES", "Tile", "column_tile", "compute_dtype", "in_contiguous_layout", "on_device_of", "padded"]

TL_DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float64: tl.float64}

# Rows of 16 elements are at least 32 bytes, which is what aligned loads, tensor cores and cuBLAS ask for.
_ALIGNMENT = 16
_MANY_FEATURES = 4096


def padded(length: int) -> int:
    """The length of a side of a buffer that is our own."""
    return (length + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of elementwise work on tensors of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


class Tile(NamedTuple):
    """What one program of a column kernel holds at once: ``BLOCK_N`` rows of ``BLOCK_D`` features."""

    block_n: int
    block_d: int
    warps: int

    def grid(self, d: int) -> tuple[int]:
        """One program for each block of features, which walks over all rows."""
        return (triton.cdiv(d, self.block_d),)


def column_tile(d: int, dtype: torch.dtype) -> Tile:
    """The tile of the column kernels: 16 elements of a matrix for each thread, 8 in float64.

    Reckoned, not measured: with D = 8192 there are 256 programs, and the at most 160 registers of a thread let all of
    them live on an H100's 132 multiprocessors at once; each has 4 KB of every 16-bit matrix on its way. Below 4096
    features narrower tiles, whose rows are one sector of 32 bytes, make more programs.
    """
    block_d = 32 if d >= _MANY_FEATURES else 16
    elements = 1024 if compute_dtype(dtype) == torch.float64 else 2048
    return Tile(elements // block_d, block_d, 4)


def in_contiguous_layout(z: Tensor) -> Tensor:
    """z, or a contiguous copy where z's strides or address would compile another kernel than those of the copy.

    Another kernel spreads a tile over its threads in another way and adds it up in another order, and a strided view
    would give other bits than its copy. Rows apart from each other are no reason, if all of them are as aligned.
    """
    d = z.shape[1]
    alike = d > 1 and z.stride(1) == 1 and (z.stride(0) % _ALIGNMENT == 0) == (d % _ALIGNMENT == 0)
    if (z.is_contiguous() or alike) and z.data_ptr() % _ALIGNMENT == 0:
        return z
    return z.clone(memory_format=torch.contiguous_format)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return nullcontext()
