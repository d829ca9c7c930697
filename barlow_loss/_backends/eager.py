"""The primitives in plain torch, for every device, traceable by torch.compile and torch.export. Triton offers the same.

Few operations, each over both views or all of one: at small sizes a step costs what its operations cost to start, 1 to
3 µs each. u stands for the scaled standardised features ẑ/√N of both views, (2, N, D): C = u1ᵀ u2 and K = u uᵀ.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from barlow_loss._penalty import Arriving, Number, penalties, slopes
from barlow_loss._plan import Plan, vector_dtype
from barlow_loss._statistics import Moments, at_least_one, scale_and_shift

if TYPE_CHECKING:
    from barlow_loss._collectives import Shards

    Product = tuple[Tensor, Tensor | None, Tensor | None]

__all__ = ["backproject", "grams", "penalties", "project", "standardize"]

_SMALL_ELEMENTS, _BLOCK_ELEMENTS, _GRAM_LEAF = 2**17, 2**19, 64


def standardize(z1: Tensor, z2: Tensor, eps: float, plan: Plan, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """u in the dtype of the products, this process's part of C_ii before that rounding, and ρ = r/√N, 2·D numbers.

    A backend may fill up N and D of u, and of the matrices made from it, with zeros; vectors of D numbers it does not.
    """
    n, d = z1.shape
    if plan.on_host and 0 < n * d <= _SMALL_ELEMENTS:
        # The first row is within √(N − 1) standard deviations of the mean. A constant feature is exactly 0 with either.
        pivot1, pivot2 = wide(z1[:1]), wide(z2[:1])
    else:
        pivot1, pivot2 = _middle_rows(z1, z2).unsqueeze(1)
    if plan.on_host:
        x = z1.new_empty((2, n, d), dtype=plan.compute_dtype)
        x1, x2 = x.unbind()
        torch.sub(z1, pivot1, out=x1)
        torch.sub(z2, pivot2, out=x2)
    else:
        x = torch.stack((z1 - pivot1, z2 - pivot2))
        x1, x2 = x.unbind()
    s1 = x.sum(1, keepdim=True)
    if plan.on_host and n > 0:
        x.sub_(s1, alpha=1 / n)  # centred twice, so that the variance is a sum of squares and no difference
    else:
        x.sub_(s1 / at_least_one(n))
    m2 = _column_dots(x, x, plan)
    if shards.group.size == 1:
        # In float32 the sum would shift every C_ii alike, by up to 1e-7. √t/t is 1/√t, and NaN where t is not finite.
        total = m2.to(vector_dtype(z1.device)).add_(min(n * eps, sys.float_info.max) if plan.on_host else n * eps)
        rho = torch.div(total.sqrt(), total).to(x.dtype)
        x.mul_(rho)
    else:
        sums = torch.stack((pivot1, pivot2)), s1 / at_least_one(n), m2
        shard = Moments(n, *(vector.to(vector_dtype(z1.device)) for vector in sums))
        rho, shift = scale_and_shift(shard, eps, shards)
        shift = torch.addcmul(shift, shard.offset, rho)
        torch.addcmul(shift.to(x.dtype), x, rho.to(x.dtype), out=x)
    c = _column_dots(x1, x2, plan, keepdim=False)
    return x if x.dtype == plan.matmul_dtype else x.to(plan.matmul_dtype), c.to(rho.dtype), rho


def _middle_rows(z1: Tensor, z2: Tensor) -> Tensor:
    """Feature by feature the middle one of three rows, (2, D): one row that is far away costs no digits."""
    n, d = z1.shape
    if n == 0:
        return wide(z1.new_zeros((2, d)))
    rows = torch.arange(3, device=z1.device) * (n - 1) // 2
    a, b, c = wide(torch.stack([z.index_select(0, rows) for z in (z1, z2)], dim=1)).unbind()
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def _column_dots(a: Tensor, b: Tensor, plan: Plan, keepdim: bool = True) -> Tensor:
    """Σₙ a ∘ b, (…, N, D) to (…, 1, D) or (…, D); on CPU by blocks of rows: 3 ms, not 24, for two of 2048×2048."""
    n, d = a.shape[-2:]
    if not plan.on_host or n * d <= _BLOCK_ELEMENTS:
        return torch.mul(a, b).sum(-2, keepdim)
    height = _BLOCK_ELEMENTS // d + 1
    products = torch.mul(a[..., :height, :], b[..., :height, :])
    total = products.sum(-2, keepdim)
    for start in range(height, n, height):
        rows = slice(start, start + height)
        part = torch.mul(a[..., rows, :], b[..., rows, :], out=products[..., : min(height, n - start), :])
        total.add_(part.sum(-2, keepdim))
    return total


def grams(u: Tensor, every: tuple[Tensor, Tensor] | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """This process's rows of K1 and K2, and ⟨K1, K2⟩ over them in parts, of any shape.

    every: the rows of all processes, (N, D) of each view, in which K has (n, N); None: u has them all.
    """
    if every is None:
        k1, k2 = _grams(u, plan).unbind()
    else:
        u1, u2 = u.unbind()
        k1, k2 = torch.mm(u1, every[0].t()), torch.mm(u2, every[1].t())
    return k1, k2, torch.mul(wide(k1), wide(k2))


def _grams(u: Tensor, plan: Plan) -> Tensor:
    n = u.shape[1]
    if not plan.on_host or n < 2 * _GRAM_LEAF:
        return torch.bmm(u, u.mT)
    k = u.new_empty((2, n, n))
    for view, of_view in zip(u, k, strict=True):
        _gram_into(of_view, view)
    return k


def _gram_into(k: Tensor, u: Tensor) -> None:
    """Halve, multiply only the lower off-diagonal block and mirror it: (1 + 1/2 + 1/4 …)/2 of the FLOPs of u uᵀ.

    On one thread of an EPYC, of the time of torch.mm(u, u.T): 0.78 at 256×8192, 0.58 at 1024×8192, 0.53 at 2048×8192.
    """
    n = u.shape[0]
    if n < 2 * _GRAM_LEAF:
        torch.mm(u, u.t(), out=k)
        return
    half = n // 2 // 16 * 16
    _gram_into(k[:half, :half], u[:half])
    _gram_into(k[half:, half:], u[half:])
    torch.mm(u[half:], u[:half].t(), out=k[half:, :half])
    k[:half, half:] = k[half:, :half].t()


def project(k: Tensor, every: Tensor, own: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """P = K U from this process's rows of K, and Σₙ u_own ∘ P: (n, N), (N, D), (n, D) to (n, D), (D,)."""
    p = torch.mm(k, every)
    return p, _column_dots(wide(own), wide(p), plan, keepdim=False)


def wide(t: Tensor) -> Tensor:
    """In float32 at least, for sums."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def backproject(
    products: tuple[Product | None, Product | None],
    u: Tensor,
    c: Tensor,
    rho: Tensor,
    arriving: Arriving,
    holds_diagonal: bool,
    plan: Plan,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """ρ (2b P + d u_other − (2b q + d C_ii) u_own) of either view, (n, D) in ``dtype``; None where its product is None.

    d = 2a (C_ii − 1), or 2a (C_ii − 1) − 2b C_ii where C̃ holds the diagonal. A product is the two factors of P, or P
    and None; and q, where None stands for Σₙ u_own ∘ P.
    """
    a, b = (2 * slope for slope in slopes(arriving, plan))
    if isinstance(b, float) and abs(b) > torch.finfo(plan.compute_dtype).max:
        b *= math.inf  # addmm refuses a number that its dtype has no room for
    d = c * (a - b if holds_diagonal else a) - a
    u1, u2 = u.unbind()
    rho1, rho2 = rho.unbind()
    first = products[0] and _gradient(*products[0], u1, u2, b, c, d, rho1, plan, dtype)
    return first, products[1] and _gradient(*products[1], u2, u1, b, c, d, rho2, plan, dtype)


def _gradient(
    left: Tensor,
    right: Tensor | None,
    q: Tensor | None,
    own: Tensor,
    other: Tensor,
    b: Number,
    c: Tensor,
    d: Tensor,
    rho: Tensor,
    plan: Plan,
    dtype: torch.dtype,
) -> Tensor:
    compute, own, other = plan.compute_dtype, wide(own), wide(other)
    of_own = None if q is None else (q * b + d * c).to(compute)
    if d.dtype != compute:
        d, rho = d.to(compute), rho.to(compute)
    if isinstance(b, float) and right is not None:
        g = torch.addmm(own, left, right, beta=0, alpha=b)
    else:
        g = wide(left if right is None else torch.mm(left, right)) * b
    g.addcmul_(other, d)
    if of_own is None:
        of_own = _column_dots(own, g, plan)  # 2b q and d C_ii at once
    g.addcmul_(own, of_own, value=-1).mul_(rho)
    return g if g.dtype == dtype else g.to(dtype)
