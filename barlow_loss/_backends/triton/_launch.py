"""What every launch shares: the device it goes to, the sizes of tiles and buffers, and how little of the host it takes.

Custom operations are for those who must see an operation: compilers, fake tensors, counters. Eager mode calls the
function behind one directly, which saves 20 µs, and launches a compiled kernel from a cache of ours, which saves 12 of
the 16 µs that triton takes to find it (one core of an EPYC, triton 3.8, on a pretended GPU).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from barlow_loss._plan import is_traced

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "TL_DTYPES",
    "Kernel",
    "Tile",
    "alignments",
    "column_tile",
    "compute_dtype",
    "in_contiguous_layout",
    "operation",
    "padded",
]

TL_DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float64: tl.float64}

# Rows of 16 elements are at least 32 bytes, which is what aligned loads, tensor cores and cuBLAS ask for.
_ALIGNMENT = 16
_MANY_FEATURES = 4096


def padded(length: int) -> int:
    """The length of a side of a buffer that is our own."""
    return (length + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of elementwise work on tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tile(NamedTuple):
    """What one program of a column kernel holds at once: ``block_n`` rows of ``block_d`` features."""

    block_n: int
    block_d: int
    compute: Any
    warps: int = 4

    def programs(self, d: int) -> int:
        """One for each block of features, which walks over all rows."""
        return (d + self.block_d - 1) // self.block_d


@functools.lru_cache(maxsize=256)
def column_tile(d: int, dtype: torch.dtype) -> Tile:
    """The tile of the column kernels: 16 elements of a matrix for each thread, 8 in float64.

    Estimated, not measured: with D = 8192 there are 256 programs, and with at most 160 registers per thread all of them
    are resident on an H100's 132 multiprocessors; each keeps 4 KB in flight per 16-bit matrix. Below 4096
    features narrower tiles, whose rows are one sector of 32 bytes, make more programs.
    """
    block_d = 32 if d >= _MANY_FEATURES else 16
    elements = 1024 if dtype == torch.float64 else 2048
    return Tile(elements // block_d, block_d, TL_DTYPES[compute_dtype(dtype)])


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


_modes = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]


class _Operation:
    """An operation of torch, and the function behind it where nobody needs the operation."""

    def __init__(self, name: str, launch: Callable[..., Any]) -> None:
        self.launch = launch
        self.operation = library.custom_op(name, launch, mutates_args=())
        self.register_fake = self.operation.register_fake
        self.__doc__ = launch.__doc__

    def __call__(self, of: Tensor, *args: Any) -> Any:
        if is_traced(of) or _modes():
            return self.operation(of, *args)
        return self.launch(of, *args)


def operation(name: str) -> Callable[[Callable[..., Any]], _Operation]:
    """The decorator of a function that launches a kernel; its first argument is a tensor of our own or of the user."""
    return lambda launch: _Operation(f"barlow_loss::{name}", launch)


class Kernel:
    """A kernel of triton, with a cache of what triton has compiled.

    A compiled kernel takes every argument in order, and calls the hooks of profilers itself. Triton's interpreter
    compiles nothing. A version of triton that is not known here is left to find its kernels by itself, and so is triton
    for ROCm, which also looks at the size of every storage.
    """

    KNOWN = ("3.6.", "3.7.", "3.8.")
    MOST = 1024

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        known = triton.__version__.startswith(self.KNOWN) and torch.version.hip is None
        self._caches = known and isinstance(kernel, triton.JITFunction)

    def launch(
        self,
        of: Tensor,
        programs: int,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """One launch of so many programs, on the device of ``of``, with the kernel's arguments and constexprs.

        The key holds all that triton compiles for: dtypes, integers that it may specialise, what is None, constants and
        options that vary, and ``alignments`` of what is neither aligned nor a fresh buffer of our own.
        """
        device: Any = of.get_device()
        if device < 0:  # the interpreter, or a test that pretends a GPU
            device = triton.runtime.driver.active.get_current_device() if self._caches else None
        elif device != torch.accelerator.current_device_index():  # where triton launches
            with torch.accelerator.device_index(device):
                self.launch(of, programs, key, args, constants, **options)
            return
        compiled = self._compiled.get((device, key))
        if compiled is None:
            compiled = self._kernel[programs, 1, 1](*args, *constants, **options)
            if self._caches:
                if len(self._compiled) >= self.MOST:
                    self._compiled.clear()
                self._compiled[device, key] = compiled
        else:
            compiled[programs, 1, 1](*args, *constants)


def alignments(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What triton sees of pointers: whether they are there, their dtype, and whether they are aligned."""
    return tuple([None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors])
