"""Standardisation of both views and the diagonal of C. Two stretches for several processes, fused in one for one.

    x = z − pivot,  s₁ = Σₙ x,  s₂ = Σₙ x²,    m = s₁/N,  M₂ = s₂ − s₁²/N,  ρ = 1/√(N (M₂/N + ε))
    u = x·ρ − m·ρ,    C_ii = Σₙ u1_ni u2_ni

A program owns a block of features of both views and walks over the rows twice, tile by tile, for the sums and for u.
Tiles are added in float32 and their columns summed once, at the end; all that is per feature is float64. The pivot is a
value near the mean, so that a large mean does not cancel the variance (``_statistics``). C_ii is summed from u before
it is rounded to the dtype of the products.

Bytes, fused, elements of z of s bytes, of u of t: 2·N·D·(2s + t); the second pass may find z in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from barlow_loss._backends.triton._launch import Kernel, column_tile, in_contiguous_layout, operation, padded

__all__ = ["column_sums", "fused_standardize", "standardize"]


@triton.jit
def _column_sum(tile):
    return tl.sum(tile, 0).to(tl.float64)


@triton.jit
def _load(z, rows, cols, row_stride, n, d, COMPUTE: tl.constexpr):
    """A tile of z, 0 outside of it."""
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    return tl.load(z + offsets, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _pivot(z, cols, row_stride, n, d, COMPUTE: tl.constexpr):
    """The mean of 32 rows evenly spaced over the batch, relative to the first, as in ``_statistics.pivot_of``."""
    first = _load(z, tl.zeros((1,), tl.int32), cols, row_stride, n, d, COMPUTE)
    sampled = tl.arange(0, 32).to(tl.int64) * (n - 1) // 31
    rest = _load(z, sampled, cols, row_stride, n, d, COMPUTE) - first
    return tl.sum(first, 0) + tl.sum(rest, 0) / 32


@triton.jit
def _centered(z, pivot, rows, cols, row_stride, n, d, COMPUTE: tl.constexpr):
    """A tile of x = z − pivot, 0 below the batch."""
    x = _load(z, rows, cols, row_stride, n, d, COMPUTE) - pivot[None, :]
    return tl.where((rows < n)[:, None], x, 0.0)


@triton.jit
def _sums(
    z1, z2, pivot1, pivot2, cols, z1_row, z2_row, n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Σ x and Σ x² of both views, not yet summed within the tile."""
    a1 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    a2 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    b1 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    b2 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in tl.range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x1 = _centered(z1, pivot1, rows, cols, z1_row, n, d, COMPUTE)
        x2 = _centered(z2, pivot2, rows, cols, z2_row, n, d, COMPUTE)
        a1 += x1
        a2 += x2
        b1 += x1 * x1
        b2 += x2 * x2
    return a1, b1, a2, b2


@triton.jit
def _affine(z, pivot, scale, shift, rows, cols, row_stride, n, d, COMPUTE: tl.constexpr):
    """A tile of u = (z − pivot)·scale + shift, 0 outside of z."""
    x = _load(z, rows, cols, row_stride, n, d, COMPUTE) - pivot[None, :]
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    return tl.where(inside, x * scale[None, :] + shift[None, :], 0.0)


@triton.jit
def _write(
    z1, z2, u, pivot1, pivot2, scale1, scale2, shift1, shift2,
    cols, z1_row, z2_row, u_rows, u_cols, n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Write u of both views, its padding too; return C_ii."""
    c = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in tl.range(0, u_rows, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        u1 = _affine(z1, pivot1, scale1, shift1, rows, cols, z1_row, n, d, COMPUTE)
        u2 = _affine(z2, pivot2, scale2, shift2, rows, cols, z2_row, n, d, COMPUTE)
        c += u1 * u2
        inside = (rows < u_rows)[:, None] & (cols < u_cols)[None, :]
        target = u + rows.to(tl.int64)[:, None] * u_cols + cols[None, :]
        second = tl.cast(u_rows, tl.int64) * u_cols
        tl.store(target, u1.to(u.dtype.element_ty), mask=inside)
        tl.store(target + second, u2.to(u.dtype.element_ty), mask=inside)
    return _column_sum(c)


@triton.jit
def _finish(s1, s2, rho, cols, n, d, eps, COMPUTE: tl.constexpr):
    """Write ρ of one view; return ρ and −m·ρ.

    ρ is NaN where v is not finite: 1/∞ would be a silent 0. A comparison keeps NaN, tl.maximum would not.
    """
    mean = _column_sum(s1) / n
    m2 = _column_sum(s2) - mean * mean * n
    v = tl.where(m2 < 0, 0.0, m2) / n
    scale = (1 / tl.sqrt(v + eps) + 0.0 * v) / tl.sqrt(n)
    tl.store(rho + cols, scale, mask=cols < d)
    return scale.to(COMPUTE), (-mean * scale).to(COMPUTE)


@triton.jit(do_not_specialize=["n", "u_rows"])
def fused_standardize_kernel(
    z1, z2, u, c, rho, n, d, z1_row, z2_row, u_rows, u_cols, eps: tl.float64,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    pivot1 = _pivot(z1, cols, z1_row, n, d, COMPUTE)
    pivot2 = _pivot(z2, cols, z2_row, n, d, COMPUTE)
    a1, b1, a2, b2 = _sums(z1, z2, pivot1, pivot2, cols, z1_row, z2_row, n, d, BLOCK_N, BLOCK_D, COMPUTE)
    total = n.to(tl.float64)
    scale1, shift1 = _finish(a1, b1, rho, cols, total, d, eps, COMPUTE)
    scale2, shift2 = _finish(a2, b2, rho + d, cols, total, d, eps, COMPUTE)
    diagonal = _write(
        z1, z2, u, pivot1, pivot2, scale1, scale2, shift1, shift2,
        cols, z1_row, z2_row, u_rows, u_cols, n, d, BLOCK_N, BLOCK_D, COMPUTE,
    )  # fmt: skip
    tl.store(c + cols, diagonal, mask=cols < d)


@triton.jit(do_not_specialize=["n"])
def column_sums_kernel(
    z1, z2, pivot, s1, s2, n, d, z1_row, z2_row,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < d
    pivot1 = tl.load(pivot + cols, mask=inside, other=0.0)
    pivot2 = tl.load(pivot + d + cols, mask=inside, other=0.0)
    a1, b1, a2, b2 = _sums(z1, z2, pivot1, pivot2, cols, z1_row, z2_row, n, d, BLOCK_N, BLOCK_D, COMPUTE)
    tl.store(s1 + cols, _column_sum(a1), mask=inside)
    tl.store(s1 + d + cols, _column_sum(a2), mask=inside)
    tl.store(s2 + cols, _column_sum(b1), mask=inside)
    tl.store(s2 + d + cols, _column_sum(b2), mask=inside)


@triton.jit(do_not_specialize=["n", "u_rows"])
def standardize_kernel(
    z1, z2, pivot, scale, shift, u, c, n, d, z1_row, z2_row, u_rows, u_cols,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < d
    diagonal = _write(
        z1, z2, u,
        tl.load(pivot + cols, mask=inside, other=0.0), tl.load(pivot + d + cols, mask=inside, other=0.0),
        tl.load(scale + cols, mask=inside, other=0.0), tl.load(scale + d + cols, mask=inside, other=0.0),
        tl.load(shift + cols, mask=inside, other=0.0), tl.load(shift + d + cols, mask=inside, other=0.0),
        cols, z1_row, z2_row, u_rows, u_cols, n, d, BLOCK_N, BLOCK_D, COMPUTE,
    )  # fmt: skip
    tl.store(c + cols, diagonal, mask=inside)


_fused_standardize = Kernel(fused_standardize_kernel)
_column_sums = Kernel(column_sums_kernel)
_standardize = Kernel(standardize_kernel)


def _vectors(z: Tensor, *shape: int) -> Tensor:
    return z.new_empty(shape, dtype=torch.float64)


@operation("fused_standardize")
def fused_standardize(z1: Tensor, z2: Tensor, eps: float, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """u in ``matmul_dtype``, filled up to multiples of 16 with zeros, C_ii and ρ, float64."""
    n, d = z1.shape
    rows, cols = padded(n), padded(d)
    u = z1.new_empty((2, rows, cols), dtype=matmul_dtype)
    c, rho = _vectors(z1, d), _vectors(z1, 2, d)
    tile = column_tile(d, z1.dtype)
    z1, z2 = in_contiguous_layout(z1), in_contiguous_layout(z2)
    row1, row2 = z1.stride(0), z2.stride(0)
    key = z1.dtype, matmul_dtype, d, row1, row2
    args = z1, z2, u, c, rho, n, d, row1, row2, rows, cols, float(eps)
    _fused_standardize.launch(z1, tile.programs(cols), key, args, tile[:3], num_warps=tile.warps)
    return u, c, rho


@fused_standardize.register_fake
def _(z1: Tensor, z2: Tensor, eps: float, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z1.shape
    u = z1.new_empty((2, padded(n), padded(d)), dtype=matmul_dtype)
    return u, _vectors(z1, d), _vectors(z1, 2, d)


@operation("column_sums")
def column_sums(z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Σₙ x and Σₙ x² of x = z − pivot, (2, D) float64."""
    n, d = z1.shape
    s1, s2 = _vectors(z1, 2, d), _vectors(z1, 2, d)
    tile = column_tile(d, z1.dtype)
    z1, z2 = in_contiguous_layout(z1), in_contiguous_layout(z2)
    row1, row2 = z1.stride(0), z2.stride(0)
    key = z1.dtype, d, row1, row2
    args = z1, z2, pivot, s1, s2, n, d, row1, row2
    _column_sums.launch(z1, tile.programs(d), key, args, tile[:3], num_warps=tile.warps)
    return s1, s2


@column_sums.register_fake
def _(z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    d = z1.shape[1]
    return _vectors(z1, 2, d), _vectors(z1, 2, d)


@operation("standardize")
def standardize(
    z1: Tensor, z2: Tensor, pivot: Tensor, scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u in ``matmul_dtype``, D filled up to a multiple of 16 with zeros, and this process's part of C_ii, float64."""
    n, d = z1.shape
    cols = padded(d)
    u = z1.new_empty((2, n, cols), dtype=matmul_dtype)
    c = _vectors(z1, d)
    tile = column_tile(d, z1.dtype)
    z1, z2 = in_contiguous_layout(z1), in_contiguous_layout(z2)
    row1, row2 = z1.stride(0), z2.stride(0)
    key = z1.dtype, matmul_dtype, d, row1, row2
    args = z1, z2, pivot, scale, shift, u, c, n, d, row1, row2, n, cols
    _standardize.launch(z1, tile.programs(cols), key, args, tile[:3], num_warps=tile.warps)
    return u, c


@standardize.register_fake
def _(
    z1: Tensor, z2: Tensor, pivot: Tensor, scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n, d = z1.shape
    return z1.new_empty((2, n, padded(d)), dtype=matmul_dtype), _vectors(z1, d)
