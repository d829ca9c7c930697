"""The primitives in plain torch, for every device, traceable by torch.compile and torch.export.

On CPU the elementwise work goes block by block, so that a block stays in the cache between the passes over it. One
thread of an EPYC (1 MB L2 a core), N = 256, D = 8192: 1.0 ms for the column sums of one view in blocks of 512 or 1024
features, 1.5 ms in blocks of 2048; the four matrix products take 48 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from barlow_loss._penalty import Arriving, penalties, slopes

if TYPE_CHECKING:
    from barlow_loss._backends import Product

__all__ = [
    "backproject",
    "centre",
    "correlate",
    "grams",
    "penalties",
    "project",
    "squared_sums",
    "standardize",
    "whiten",
]

whiten = None

_BLOCK_ELEMENTS = 2**18
_BLOCK_MIN_LENGTH = 512  # a matrix product over fewer rows or features loses more than the cache wins
_GRAM_LEAF = 64

_Block = tuple[slice, slice] | None  # rows and features; None is all of it


def _blocks(z: Tensor, *, whole_columns: bool = False) -> list[_Block]:
    """Blocks of rows where they are short, of features where they are long or columns must stay whole."""
    n, d = z.shape
    if torch.compiler.is_compiling() or z.device.type != "cpu" or n * d <= _BLOCK_ELEMENTS:
        return [None]
    if d < 2 * n and not whole_columns:
        height = max(_BLOCK_MIN_LENGTH, _BLOCK_ELEMENTS // d)
        return [(slice(start, start + height), slice(None)) for start in range(0, n, height)]
    width = max(_BLOCK_MIN_LENGTH, _BLOCK_ELEMENTS // n)
    return [(slice(None), slice(start, start + width)) for start in range(0, d, width)]


def _matrix(t: Tensor, block: _Block) -> Tensor:
    return t if block is None else t[..., block[0], block[1]]


def _vector(t: Tensor, block: _Block) -> Tensor:
    return t if block is None else t[..., block[1]]


def centre(z1: Tensor, z2: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty((2, *z1.shape), dtype=pivot.dtype, device=z1.device)
    s1, s2 = torch.zeros_like(pivot), torch.zeros_like(pivot)
    squares = None
    for block in _blocks(z1):
        part, p = _matrix(x, block), _vector(pivot, block)
        torch.sub(_matrix(z1, block), p[0], out=part[0])
        torch.sub(_matrix(z2, block), p[1], out=part[1])
        squares = _multiply(part, part, squares)
        _vector(s1, block).add_(part.sum(dim=1))
        _vector(s2, block).add_(squares.sum(dim=1))
    return x, s1, s2


def _multiply(a: Tensor, b: Tensor, buffer: Tensor | None) -> Tensor:
    """a∘b, over the product of the block before where that fits.

    With glibc's malloc a fresh megabyte costs its page faults: at 256×2048 they made up two thirds of ``centre``.
    """
    return torch.mul(a, b, out=buffer if buffer is not None and buffer.shape == a.shape else None)


def standardize(x: Tensor, scale: Tensor, shift: Tensor, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    diagonal = torch.zeros_like(scale[0])
    scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
    products = None
    for block in _blocks(x[0]):
        u = _matrix(x, block)
        torch.addcmul(_vector(shift, block), u, _vector(scale, block), out=u)
        products = _multiply(u[0], u[1], products)
        _vector(diagonal, block).add_(products.sum(dim=0))
    return x.to(matmul_dtype), diagonal


def grams(u: Tensor, every: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    if every is None:
        k1, k2 = _gram(u[0]), _gram(u[1])
    else:
        k1, k2 = torch.mm(u[0], every[0].T), torch.mm(u[1], every[1].T)
    return k1, k2, (_wide(k1) * _wide(k2)).sum()


def _gram(u: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or u.device.type != "cpu":
        return torch.mm(u, u.T)
    k = torch.empty((u.shape[0], u.shape[0]), dtype=u.dtype, device=u.device)
    _gram_into(k, u)
    return k


def _gram_into(k: Tensor, u: Tensor) -> None:
    """Halve, multiply only the lower off-diagonal block and mirror it: (1 + 1/2 + 1/4 …)/2 of the FLOPs of u uᵀ.

    On one thread of an EPYC, of the time of torch.mm(u, u.T): 0.78 at 256×8192, 0.58 at 1024×8192, 0.53 at 2048×8192.
    """
    n = u.shape[0]
    if n < 2 * _GRAM_LEAF:
        torch.mm(u, u.T, out=k)
        return
    half = n // 2 // 16 * 16
    _gram_into(k[:half, :half], u[:half])
    _gram_into(k[half:, half:], u[half:])
    torch.mm(u[half:], u[:half].T, out=k[half:, :half])
    k[:half, half:] = k[half:, :half].T


def project(k: Tensor, every: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.mm(k, every)
    column_dots = own.new_zeros(own.shape[1], dtype=torch.promote_types(own.dtype, torch.float32))
    products = None
    for block in _blocks(own):
        products = _multiply(_wide(_matrix(own, block)), _wide(_matrix(p, block)), products)
        _vector(column_dots, block).add_(products.sum(dim=0))
    return p, column_dots


def correlate(u1: Tensor, u2: Tensor) -> Tensor:
    return torch.mm(u1.T, u2)


def squared_sums(c: Tensor) -> tuple[Tensor, Tensor]:
    squares = _wide(c).square()
    return squares.sum(dim=1), squares.sum(dim=0)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _product(factors: tuple[Tensor, ...], block: _Block, out: Tensor | None) -> Tensor:
    """A block of the product, in float32 at least, not shared with the factors."""
    if len(factors) == 1:
        factor = _matrix(factors[0], block)
        return _wide(factor).clone() if out is None else out.copy_(factor)
    rows, features = block or (slice(None), slice(None))
    return _wide(torch.mm(factors[0][rows], factors[1][:, features], out=out))


def backproject(
    products: tuple[Product | None, Product | None],
    u: Tensor,
    c: Tensor,
    rho: Tensor,
    arriving: Arriving,
    holds_diagonal: bool,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    a, b = slopes(arriving)
    d = 2 * a * (c - 1)
    if holds_diagonal:
        d = d - 2 * b * c
    beta = d * rho
    alpha, beta, gamma = (vector.to(a.dtype) for vector in (2 * b * rho, beta, beta * c))

    def gradient(view: int) -> Tensor | None:
        product, own, other = products[view], u[view], u[1 - view]
        return product and _backproject(*product, own, other, alpha[view], beta[view], gamma[view], dtype)

    return gradient(0), gradient(1)


def _backproject(
    factors: tuple[Tensor, ...],
    q: Tensor | None,
    own: Tensor,
    other: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    gradient = torch.empty(own.shape, dtype=dtype, device=own.device)
    in_place = dtype == factors[0].dtype == alpha.dtype and not torch.compiler.is_compiling()
    products = None
    for block in _blocks(own, whole_columns=q is None):
        target = _matrix(gradient, block)
        p = _product(factors, block, target if in_place else None)
        u, weight = _wide(_matrix(own, block)), _vector(alpha, block)
        if q is None:
            products = _multiply(u, p, products)
            column_dot = products.sum(dim=0)
        else:
            column_dot = _vector(q, block).to(weight.dtype)
        p.mul_(weight).addcmul_(_matrix(other, block), _vector(beta, block))
        of_own = torch.addcmul(_vector(gamma, block), weight, column_dot)
        torch.addcmul(p, u, of_own, value=-1, out=target)
    return gradient
