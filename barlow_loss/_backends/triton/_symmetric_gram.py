"""K1 = u1 u1ᵀ and K2 = u2 u2ᵀ in one launch, of 16-bit features.

K is symmetric: a program computes one tile on or below the diagonal of one of them and writes it and its mirror image.
FLOPs: 2·N·(N + BLOCK)·D, half of those of two torch.mm. Bytes: u, from the cache for the most part, and both K once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from barlow_loss._backends.triton._launch import on_device_of

__all__ = ["symmetric_grams"]


class _Config(NamedTuple):
    block: int
    block_k: int
    warps: int
    stages: int


# By the shared memory that a block of the chip may use, and fill with both operands, 16 bits, once for each stage.
_LARGE, _SMALL = _Config(128, 64, 8, 3), _Config(64, 64, 4, 3)
_LARGE_SHARED_MEMORY = 3 * 2 * 128 * 64 * 2


@triton.jit
def _tile_of(z, rows, depth, n, depths):
    inside = (rows < n)[:, None] & (depth < depths)[None, :]
    return tl.load(z + rows.to(tl.int64)[:, None] * depths + depth[None, :], mask=inside, other=0.0)


@triton.jit
def symmetric_grams_kernel(u, k1, k2, n, depths, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    tile = tl.program_id(0)
    # Tile i(i+1)/2 + j is (i, j), j ≤ i; the root in float32 may miss i by one.
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    j = tile - i * (i + 1) // 2
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    view = tl.program_id(1)
    u += view.to(tl.int64) * n * depths
    k = k1
    if view == 1:
        k = k2
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, depths, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        total = tl.dot(_tile_of(u, rows, depth, n, depths), tl.trans(_tile_of(u, cols, depth, n, depths)), total)
    rounded = total.to(k1.dtype.element_ty)
    inside = (rows < n)[:, None] & (cols < n)[None, :]
    tl.store(k + rows.to(tl.int64)[:, None] * n + cols[None, :], rounded, mask=inside)
    if i != j:
        mirrored = (cols < n)[:, None] & (rows < n)[None, :]
        tl.store(k + cols.to(tl.int64)[:, None] * n + rows[None, :], tl.trans(rounded), mask=mirrored)


def config(shared_memory: int) -> _Config:
    """Tiles and pipeline for a chip whose blocks may use so many bytes of shared memory."""
    return _LARGE if shared_memory >= _LARGE_SHARED_MEMORY else _SMALL


def _shared_memory(u: Tensor) -> int:
    if u.device.type == "cpu":  # the interpreter
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(u.device.index)["max_shared_mem"]


def _tiles(n: int, block: int) -> int:
    side = (n + block - 1) // block
    return side * (side + 1) // 2


@library.custom_op("barlow_loss::symmetric_grams", mutates_args=())
def symmetric_grams(u: Tensor) -> tuple[Tensor, Tensor]:
    """K1 and K2, (N, N), of 16-bit u, (2, N, D), N and D multiples of 16."""
    _, n, depths = u.shape
    chosen = config(_shared_memory(u))
    k1, k2 = u.new_empty((n, n)), u.new_empty((n, n))
    with on_device_of(u):
        symmetric_grams_kernel[_tiles(n, chosen.block), 2](
            u, k1, k2, n, depths, BLOCK=chosen.block, BLOCK_K=chosen.block_k,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return k1, k2


@symmetric_grams.register_fake
def _(u: Tensor) -> tuple[Tensor, Tensor]:
    n = u.shape[1]
    return u.new_empty((n, n)), u.new_empty((n, n))


@register_flop_formula(torch.ops.barlow_loss.symmetric_grams)
def _flops(shape: tuple[int, int, int], **_: object) -> int:
    """Two products on and below the diagonal, in whole tiles of the larger kind."""
    n, depths = shape[1:]
    return 2 * _tiles(n, _LARGE.block) * 2 * _LARGE.block**2 * depths
