r"""The end of the backward: the diagonal term and the standardisation, of both views in one launch.

    ∂L/∂z = α P + β u_other − (α q + γ) u_own,    α = 2b ρ,  β = d ρ,  γ = β C_ii,    q = Σₙ u_own ∘ P
    d = 2a (C_ii − τ), or 2a (C_ii − τ) − 2b C_ii where C̃ holds the diagonal,    a = g_L + g_on,  b = λ g_L + g_off

A program owns a block of features and walks over the rows, first for q where it is not given, then for the gradients.
Vectors over the features are float64. The incoming gradients and λ are read on the device.

Bytes, elements of u and P of t bytes, of z of s: 2·N·D·(2·2t + s), or 2·N·D·(2t + s) where q is given.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from barlow_loss._backends.triton._launch import Kernel, alignments, column_tile, operation
from barlow_loss._backends.triton._loss_terms import load_lambd

__all__ = ["column_dots", "input_gradients"]


@triton.jit
def _tile(matrix, rows, cols, stride, n, d, COMPUTE: tl.constexpr):
    """A tile of a matrix of our own, 0 outside of the batch."""
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _given(gradient):
    """A 0-d gradient in float64; 0 where none arrives."""
    result = tl.full((), 0.0, tl.float64)
    if gradient is not None:
        result = tl.load(gradient).to(tl.float64)
    return result


@triton.jit
def _vector(vector, cols, d):
    return tl.load(vector + cols, mask=cols < d, other=0.0).to(tl.float64)


@triton.jit
def _vector_if(vector, cols, d, BLOCK_D: tl.constexpr):
    result = tl.zeros((BLOCK_D,), tl.float64)
    if vector is not None:
        result = _vector(vector, cols, d)
    return result


@triton.jit
def _store_gradient(dz, gradient, rows, cols, n, d):
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    tl.store(dz + rows.to(tl.int64)[:, None] * d + cols[None, :], gradient.to(dz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "u_rows"])
def input_gradients_kernel(
    p1, p2, q1, q2, u, c, rho, grad_loss, grad_on, grad_off, weight, dz1, dz2,
    n, d, p_cols, u_rows, u_cols, lambd: tl.float64, target: tl.float64,
    INCLUDES_DIAGONAL: tl.constexpr, HAS_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    u1 = u
    u2 = u + tl.cast(u_rows, tl.int64) * u_cols
    if HAS_Q:
        sum1 = _vector_if(q1, cols, d, BLOCK_D)
        sum2 = _vector_if(q2, cols, d, BLOCK_D)
    else:
        dots1 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        dots2 = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in tl.range(0, n, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            if p1 is not None:
                x1 = _tile(u1, rows, cols, u_cols, n, d, COMPUTE)
                dots1 += x1 * _tile(p1, rows, cols, p_cols, n, d, COMPUTE)
            if p2 is not None:
                x2 = _tile(u2, rows, cols, u_cols, n, d, COMPUTE)
                dots2 += x2 * _tile(p2, rows, cols, p_cols, n, d, COMPUTE)
        sum1 = tl.sum(dots1, 0).to(tl.float64)
        sum2 = tl.sum(dots2, 0).to(tl.float64)

    c_ii = _vector(c, cols, d)
    rho1 = _vector(rho, cols, d)
    rho2 = _vector(rho + d, cols, d)
    arrived = _given(grad_loss)
    a = arrived + _given(grad_on)
    b = load_lambd(weight, lambd) * arrived + _given(grad_off)
    d_ii = 2 * a * (c_ii - target)
    if INCLUDES_DIAGONAL:
        d_ii -= 2 * b * c_ii
    alpha1 = (2 * b * rho1).to(COMPUTE)[None, :]
    alpha2 = (2 * b * rho2).to(COMPUTE)[None, :]
    beta1 = (d_ii * rho1).to(COMPUTE)[None, :]
    beta2 = (d_ii * rho2).to(COMPUTE)[None, :]
    of_own1 = (rho1 * (2 * b * sum1 + d_ii * c_ii)).to(COMPUTE)[None, :]
    of_own2 = (rho2 * (2 * b * sum2 + d_ii * c_ii)).to(COMPUTE)[None, :]
    for start in tl.range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x1 = _tile(u1, rows, cols, u_cols, n, d, COMPUTE)
        x2 = _tile(u2, rows, cols, u_cols, n, d, COMPUTE)
        if p1 is not None:
            p = _tile(p1, rows, cols, p_cols, n, d, COMPUTE)
            _store_gradient(dz1, alpha1 * p + beta1 * x2 - of_own1 * x1, rows, cols, n, d)
        if p2 is not None:
            p = _tile(p2, rows, cols, p_cols, n, d, COMPUTE)
            _store_gradient(dz2, alpha2 * p + beta2 * x1 - of_own2 * x2, rows, cols, n, d)


@triton.jit(do_not_specialize=["n"])
def column_dots_kernel(a, b, q, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for start in tl.range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        dots += _tile(a, rows, cols, d, n, d, COMPUTE) * _tile(b, rows, cols, d, n, d, COMPUTE)
    tl.store(q + cols, tl.sum(dots, 0).to(tl.float64), mask=cols < d)


_input_gradients = Kernel(input_gradients_kernel)
_column_dots = Kernel(column_dots_kernel)


def _gradients(u: Tensor, p1: Tensor | None, p2: Tensor | None, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """The buffers, empty for a view that needs none: an operation returns tensors only."""
    return [u.new_empty((0 if p is None else n, d), dtype=dtype) for p in (p1, p2)]


@operation("input_gradients")
def input_gradients(
    u: Tensor,
    p1: Tensor | None,
    p2: Tensor | None,
    q1: Tensor | None,
    q2: Tensor | None,
    c: Tensor,
    rho: Tensor,
    grad_loss: Tensor | None,
    grad_on: Tensor | None,
    grad_off: Tensor | None,
    weight: Tensor | None,
    lambd: float,
    target: float,
    includes_diagonal: bool,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """∂L/∂z of the views whose P, contiguous, is given, (n, D) in ``dtype``; q either for all of these or for none."""
    d, given = c.shape[0], p1 if p1 is not None else p2
    dz1, dz2 = _gradients(u, p1, p2, n, d, dtype)
    if given is None:
        return dz1, dz2
    tile = column_tile(d, u.dtype)
    p_cols, (_, u_rows, u_cols) = given.shape[1], u.shape
    tensors = p1, p2, q1, q2, u, c, rho, grad_loss, grad_on, grad_off, weight, dz1, dz2
    key = dtype, d, p_cols, includes_diagonal, *alignments(*tensors[:-2])  # those saved may come back from elsewhere
    args = *tensors, n, d, p_cols, u_rows, u_cols, lambd, target
    constants = includes_diagonal, q1 is not None or q2 is not None, *tile[:3]
    _input_gradients.launch(u, tile.programs(d), key, args, constants, num_warps=tile.warps)
    return dz1, dz2


@input_gradients.register_fake
def _(u: Tensor, p1: Tensor | None, p2: Tensor | None, q1: object, q2: object, c: Tensor, *rest: Any) -> Any:
    n, dtype = rest[-2:]
    return tuple(_gradients(u, p1, p2, n, c.shape[0], dtype))


@operation("column_dots")
def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σₙ a ∘ b of two contiguous matrices of one shape, (D,) float64."""
    n, d = a.shape
    q = a.new_empty(d, dtype=torch.float64)
    tile = column_tile(d, a.dtype)
    key = a.dtype, d
    _column_dots.launch(a, tile.programs(d), key, (a, b, q, n, d), tile[:3], num_warps=tile.warps)
    return q


@column_dots.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], dtype=torch.float64)
