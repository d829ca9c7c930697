"""The end of the forward, in one program: L = on + λ off, on = Σ_i (C_ii − τ)², off = Σ C_ij² − Σ_i C_ii².

Of several pairs of views on and the diagonal are weighted sums; the parts of Σ C_ij² are weighted already.

λ is read on the device where it is a tensor, so that a CUDA graph can be replayed with another one.
"""

from __future__ import annotations

import torch  # noqa: TC002  (the schema of the operation is read off the annotations)
import triton
import triton.language as tl
from torch import Tensor  # noqa: TC002

from barlow_loss._backends.triton._launch import TL_DTYPES, Kernel, alignments, operation

__all__ = ["loss_terms"]

_BLOCK = 1024


@triton.jit
def load_lambd(weight, lambd):
    """λ in float64, from a tensor if there is one."""
    result = tl.full((), lambd, tl.float64)
    if weight is not None:
        result = tl.load(weight).to(tl.float64)
    return result


@triton.jit(do_not_specialize=["n_parts"])
def loss_terms_kernel(
    c, parts, weight, loss, on_diagonal, off_diagonal, d, n_parts, lambd: tl.float64, target: tl.float64,
    WEIGHTS: tl.constexpr, PAIRS: tl.constexpr, INCLUDES_DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    on = tl.zeros((BLOCK,), tl.float64)
    off = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, n_parts, BLOCK):
        index = start + tl.arange(0, BLOCK)
        off += tl.load(parts + index, mask=index < n_parts, other=0.0).to(tl.float64)
    for pair in tl.static_range(PAIRS):
        for start in tl.range(0, d, BLOCK):
            index = start + tl.arange(0, BLOCK)
            c_ii = tl.load(c + pair * d + index, mask=index < d, other=0.0)
            on += WEIGHTS[pair] * tl.where(index < d, (c_ii - target) * (c_ii - target), 0.0)
            if INCLUDES_DIAGONAL:
                off -= WEIGHTS[pair] * c_ii * c_ii
    total_off = tl.sum(off, 0)
    if INCLUDES_DIAGONAL:
        total_off = tl.where(total_off < 0, 0.0, total_off)  # unlike tl.maximum, it keeps NaN
    rounded_on = tl.sum(on, 0).to(COMPUTE)
    rounded_off = total_off.to(COMPUTE)
    tl.store(on_diagonal, rounded_on)
    tl.store(off_diagonal, rounded_off)
    tl.store(loss, rounded_on + load_lambd(weight, lambd).to(COMPUTE) * rounded_off)


_loss_terms = Kernel(loss_terms_kernel)


def _scalars(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return c.new_empty((), dtype=dtype), c.new_empty((), dtype=dtype), c.new_empty((), dtype=dtype)


@operation("loss_terms")
def loss_terms(
    c: Tensor,
    parts: Tensor,
    weight: Tensor | None,
    lambd: float,
    target: float,
    weights: list[float] | None,
    includes_diagonal: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, on and off, 0-d in ``dtype``; λ is ``weight`` if there is one; target: τ; weights: of pairs, if several."""
    terms = _scalars(c, dtype)
    d = c.shape[-1]
    args = c, parts, weight, *terms, d, parts.numel(), lambd, target
    of_pairs = (1.0,) if weights is None else tuple(weights)
    constants = of_pairs, len(of_pairs), includes_diagonal, _BLOCK, TL_DTYPES[dtype]
    key = d, of_pairs, includes_diagonal, dtype, *alignments(parts, weight)
    # Without fusion, so that on + λ·off rounds twice, and is the loss to the last bit.
    _loss_terms.launch(c, 1, key, args, constants, num_warps=4, enable_fp_fusion=False)
    return terms


@loss_terms.register_fake
def _(
    c: Tensor,
    parts: Tensor,
    weight: Tensor | None,
    lambd: float,
    target: float,
    weights: list[float] | None,
    includes_diagonal: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _scalars(c, dtype)
