"""What more than two views need beyond the kernels of two: pairs, mixed Gram matrices, a view's gradient.

    c_ij = Σₙ u_i ∘ u_j,    M_i = Σ_j w_ij K_j,    parts of ½ Σ_i ⟨K_i, M_i⟩
    ∂L/∂z_i = α P_i + Σ_j β_j u_j − γ u_i,    α = 2b ρ_i,  β_j = w_ij d_ij ρ_i,  γ = ρ_i (2b q_i + Σ_j w_ij d_ij c_ij)

The views come as a tuple of pointers, and loops over them are unrolled: a kernel is compiled for V and for the weights.

Bytes: ``pair_dots`` reads the strip of a program's features V − 1 times, once of it from memory if the cache holds the
strip, N·V·32 elements; ``mix`` reads and writes K of all views once; ``view_gradient`` reads u of all views.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from barlow_loss._backends.triton._input_gradients import _given, _store_gradient, _tile, _vector
from barlow_loss._backends.triton._launch import TL_DTYPES, Kernel, alignments, column_tile, compute_dtype, operation
from barlow_loss._backends.triton._loss_terms import load_lambd

__all__ = ["mix", "pair_dots", "view_gradient"]

_BLOCK = 1024
_MOST_PROGRAMS = 1024


@triton.jit(do_not_specialize=["n", "u_rows"])
def pair_dots_kernel(
    us, rounded, c, n, d, u_rows, u_cols,
    VIEWS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = c + cols
    for i in tl.static_range(VIEWS):
        for j in tl.static_range(i + 1, VIEWS):
            dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
            for start in tl.range(0, n, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                x_i = _tile(us[i], rows, cols, u_cols, n, d, COMPUTE)
                dots += x_i * _tile(us[j], rows, cols, u_cols, n, d, COMPUTE)
            tl.store(target, tl.sum(dots, 0).to(tl.float64), mask=cols < d)
            target += d
    if ROUNDS:
        for i in tl.static_range(VIEWS):
            for start in tl.range(0, u_rows, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                u = _tile(us[i], rows, cols, u_cols, n, d, COMPUTE)
                inside = (rows < u_rows)[:, None] & (cols < u_cols)[None, :]
                place = rounded[i] + rows.to(tl.int64)[:, None] * u_cols + cols[None, :]
                tl.store(place, u.to(rounded[i].dtype.element_ty), mask=inside)


@triton.jit
def mix_kernel(
    ks, ms, parts, elements,
    VIEWS: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), COMPUTE)
    while block * BLOCK < elements:
        index = block * BLOCK + tl.arange(0, BLOCK)
        inside = index < elements
        for i in tl.static_range(VIEWS):
            m = tl.zeros((BLOCK,), COMPUTE)
            for j in tl.static_range(VIEWS):
                if WEIGHTS[i * VIEWS + j] != 0:
                    m += WEIGHTS[i * VIEWS + j] * tl.load(ks[j] + index, mask=inside, other=0.0).to(COMPUTE)
            total += m * tl.load(ks[i] + index, mask=inside, other=0.0).to(COMPUTE)
            tl.store(ms[i] + index, m.to(ms[i].dtype.element_ty), mask=inside)
        block += tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0) / 2)


@triton.jit(do_not_specialize=["n"])
def view_gradient_kernel(
    p, q, own, others, cs, rho, grad_loss, grad_on, grad_off, weight, dz,
    n, d, p_cols, u_cols, lambd: tl.float64, target: tl.float64,
    WEIGHTS: tl.constexpr, OTHERS: tl.constexpr, INCLUDES_DIAGONAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if q is not None:
        dot = _vector(q, cols, d)
    else:
        dots = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in tl.range(0, n, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            dots += _tile(own, rows, cols, u_cols, n, d, COMPUTE) * _tile(p, rows, cols, p_cols, n, d, COMPUTE)
        dot = tl.sum(dots, 0).to(tl.float64)

    scale = _vector(rho, cols, d)
    arrived = _given(grad_loss)
    a = arrived + _given(grad_on)
    b = load_lambd(weight, lambd) * arrived + _given(grad_off)
    of_own = 2 * b * dot
    for j in tl.static_range(OTHERS):
        c_ij = _vector(cs[j], cols, d)
        of_own += WEIGHTS[j] * _slope(c_ij, a, b, target, INCLUDES_DIAGONAL) * c_ij
    for start in tl.range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        gradient = (2 * b * scale).to(COMPUTE)[None, :] * _tile(p, rows, cols, p_cols, n, d, COMPUTE)
        for j in tl.static_range(OTHERS):
            beta = WEIGHTS[j] * _slope(_vector(cs[j], cols, d), a, b, target, INCLUDES_DIAGONAL) * scale
            gradient += beta.to(COMPUTE)[None, :] * _tile(others[j], rows, cols, u_cols, n, d, COMPUTE)
        gradient -= (scale * of_own).to(COMPUTE)[None, :] * _tile(own, rows, cols, u_cols, n, d, COMPUTE)
        _store_gradient(dz, gradient, rows, cols, n, d)


@triton.jit
def _slope(c_ij, a, b, target, INCLUDES_DIAGONAL: tl.constexpr):
    """d_ij of a block of features."""
    d_ij = 2 * a * (c_ij - target)
    if INCLUDES_DIAGONAL:
        d_ij -= 2 * b * c_ij
    return d_ij


_pair_dots = Kernel(pair_dots_kernel)
_mix = Kernel(mix_kernel)
_view_gradient = Kernel(view_gradient_kernel)


@operation("pair_dots")
def pair_dots(first: Tensor, others: list[Tensor], n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Σₙ u_i ∘ u_j of every pair of padded u, (P, D) float64, and u in ``dtype``, where it is another."""
    us = first, *others
    c, rounded = _dots(first, others, d, dtype)
    tile = column_tile(d, first.dtype)
    u_rows, u_cols = first.shape
    args = us, tuple(rounded), c, n, d, u_rows, u_cols
    constants = len(us), bool(rounded), *tile[:3]
    key = first.dtype, dtype, d, u_cols, len(us), *alignments(*us)
    _pair_dots.launch(first, tile.programs(u_cols), key, args, constants, num_warps=tile.warps)
    return c, rounded


def _dots(first: Tensor, others: list[Tensor], d: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    views = 1 + len(others)
    c = first.new_empty((views * (views - 1) // 2, d), dtype=torch.float64)
    rounds = dtype != first.dtype
    return c, [torch.empty_like(u, dtype=dtype) for u in (first, *others)] if rounds else []


@pair_dots.register_fake
def _(first: Tensor, others: list[Tensor], n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    return _dots(first, others, d, dtype)


def _mixed(first: Tensor, others: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The buffers of M, and a number for each program: two at least, as of ``frobenius``."""
    blocks = (first.numel() + _BLOCK - 1) // _BLOCK
    if isinstance(blocks, int):
        programs = max(2, min(blocks, _MOST_PROGRAMS))
    else:
        programs = torch.sym_max(2, torch.sym_min(blocks, _MOST_PROGRAMS))
    parts = first.new_empty((programs,), dtype=compute_dtype(first.dtype))
    return [torch.empty_like(k) for k in (first, *others)], parts


@operation("mix")
def mix(first: Tensor, others: list[Tensor], weights: list[float]) -> tuple[list[Tensor], Tensor]:
    """M of every view from K of every view, and ½ Σ_i ⟨K_i, M_i⟩ in parts; weights: w_ij, V rows of V numbers."""
    ks = first, *others
    ms, parts = _mixed(first, others)
    elements = first.numel()
    constants = len(ks), tuple(weights), _BLOCK, TL_DTYPES[parts.dtype]
    key = first.dtype, elements, constants[:2]
    _mix.launch(first, len(parts), key, (ks, tuple(ms), parts, elements), constants, num_warps=4)
    return ms, parts


@mix.register_fake
def _(first: Tensor, others: list[Tensor], weights: list[float]) -> tuple[list[Tensor], Tensor]:
    return _mixed(first, others)


@operation("view_gradient")
def view_gradient(
    p: Tensor,
    q: Tensor | None,
    own: Tensor,
    others: list[Tensor],
    cs: list[Tensor],
    weights: list[float],
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
) -> Tensor:
    """∂L/∂z of one view, (n, D) in ``dtype``, from its contiguous P and the u, c and weights of those it pairs with."""
    d = rho.numel()
    dz = own.new_empty((n, d), dtype=dtype)
    tile = column_tile(d, own.dtype)
    tensors = p, q, own, tuple(others), tuple(cs), rho, grad_loss, grad_on, grad_off, weight, dz
    constants = tuple(weights), len(weights), includes_diagonal, *tile[:3]
    p_cols, u_cols = p.shape[1], own.shape[1]
    seen = alignments(
        p, q, own, *others, *cs, rho, grad_loss, grad_on, grad_off, weight
    )  # what was saved may be unaligned
    key = dtype, d, p_cols, u_cols, constants[:3], *seen
    args = *tensors, n, d, p_cols, u_cols, lambd, target
    _view_gradient.launch(p, tile.programs(d), key, args, constants, num_warps=tile.warps)
    return dz


@view_gradient.register_fake
def _(p: Tensor, q: Tensor | None, own: Tensor, *rest: Any) -> Tensor:
    *_, rho, _, _, _, _, _, _, _, n, dtype = rest
    return own.new_empty((n, rho.numel()), dtype=dtype)
