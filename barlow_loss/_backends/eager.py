"""The primitives in plain torch, for every device, traceable by torch.compile and torch.export. Triton offers the same.

Few operations, each over all views or all of one: at small sizes a step costs what its operations cost to start, 1 to
3 µs each. u stands for the scaled standardised features ẑ/√N of the V views, (V, N, D): C = u1ᵀ u2 and K = u uᵀ.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._gram import GRAM_LEAF, gram_into
from barlow_loss._loss_terms import GradOutputs, Number, gradients_of_sums, loss_terms
from barlow_loss._pairs import Stack, each, pairs_of
from barlow_loss._plan import Plan, vector_dtype
from barlow_loss._statistics import Moments, at_least_one, scale_and_shift
from barlow_loss._target import moved_product

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from barlow_loss._collectives import Shards

    Product = tuple[Tensor, Tensor | None, Tensor | None]
    _Others = tuple[tuple[int, Tensor], ...]  # the views that pair with one, and their d

__all__ = ["grams", "input_gradients", "loss_terms", "project", "standardize"]

_SMALL_ELEMENTS, _BLOCK_ELEMENTS, _PAIRS_ELEMENTS = 2**17, 2**19, 2**15


def standardize(views: tuple[Tensor, ...], eps: float, plan: Plan, shards: Shards) -> tuple[Stack, Tensor, Tensor]:
    """u in the dtype of the products, this process's part of C_ii before that rounding, and ρ = r/√N, (V, 1, D).

    C_ii is (D,) of two views, else (P, D) in the order of ``pairs_of``. A backend may fill up N and D of u, and of the
    matrices made from it, with zeros; vectors of D numbers it does not.
    """
    n = views[0].shape[0]
    if len(views) == 2:
        x, x1, x2, pivots, s1, m2 = _centered(views, plan)
        rho, factor, shift = _affine(n, pivots, s1, m2, eps, plan, shards)
        _ = x.mul_(factor) if shift is None else torch.addcmul(shift, x, factor, out=x)
        c = _column_dots(x1, x2, plan, keepdim=False)
        return x if x.dtype == plan.matmul_dtype else x.to(plan.matmul_dtype), c.to(rho.dtype), rho
    xs, pivots, s1, m2 = _centered_one_by_one(views, plan)
    rho, factor, shift = _affine(n, pivots, s1, m2, eps, plan, shards)
    for view, x in enumerate(xs):
        _ = x.mul_(factor[view]) if shift is None else torch.addcmul(shift[view], x, factor[view], out=x)
    return tuple([x.to(plan.matmul_dtype) for x in xs]), _pair_dots(xs, plan).to(rho.dtype), rho


def _affine(
    n: int, pivots: Sequence[Tensor], s1: Tensor, m2: Tensor, eps: float, plan: Plan, shards: Shards
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ρ, and u = ρ x + shift of the centred x, each (V, 1, D) in the dtype of x; over one process there is no shift."""
    dtype = vector_dtype(m2.device)
    if shards.group.size == 1:
        # In float32 the sum would shift every C_ii alike, by up to 1e-7. √t/t is 1/√t, and NaN where t is not finite.
        total = m2.to(dtype).add_(min(n * eps, sys.float_info.max) if plan.on_host else n * eps)
        rho = torch.div(total.sqrt(), total).to(plan.compute_dtype)
        return rho, rho, None
    sums = torch.stack(tuple(pivots)), s1 / at_least_one(n), m2
    shard = Moments(n, *(vector.to(dtype) for vector in sums))
    rho, shift = scale_and_shift(shard, eps, shards)
    return rho, rho.to(plan.compute_dtype), torch.addcmul(shift, shard.offset, rho).to(plan.compute_dtype)


def _centered_one_by_one(
    views: tuple[Tensor, ...], plan: Plan
) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor, Tensor]:
    """As ``_centered``, each view in a buffer of its own: of (V, N, D) the system would have to bring fresh pages."""
    centered = [_centered((z,), plan) for z in views]
    xs, pivots, s1, m2 = zip(*(parts[1:] for parts in centered), strict=True)
    return xs, [pivot for (pivot,) in pivots], torch.cat(s1), torch.cat(m2)


def _centered(views: tuple[Tensor, ...], plan: Plan) -> Any:
    """x = z − pivot less its mean s₁/n, (V, n, D), and its views; the pivots, s₁ and Σ x² of the result, (V, 1, D)."""
    z1 = views[0]
    n, d = z1.shape
    if plan.on_host and 0 < n * d <= _SMALL_ELEMENTS:
        # The first row is within √(N − 1) standard deviations of the mean. A constant feature is exactly 0 with either.
        pivots: tuple[Tensor, ...] = ()
        for z in views:
            pivots += (wide(z[:1]),)
    else:
        pivots = _middle_rows(views).unsqueeze(1).unbind()
    if plan.on_host:
        x = z1.new_empty((len(views), n, d), dtype=plan.compute_dtype)
        xs = x.unbind()
        for z, pivot, of_view in zip(views, pivots, xs, strict=True):
            torch.sub(z, pivot, out=of_view)
    else:
        x = torch.stack([z - pivot for z, pivot in zip(views, pivots, strict=True)])
        xs = x.unbind()
    s1 = x.sum(1, keepdim=True)
    if plan.on_host and n > 0:
        x.sub_(s1, alpha=1 / n)  # centred twice, so that the variance is a sum of squares and no difference
    else:
        x.sub_(s1 / at_least_one(n))
    return x, *xs, pivots, s1, _column_dots(x, x, plan)


def _middle_rows(views: tuple[Tensor, ...]) -> Tensor:
    """Feature by feature the middle one of three rows, (V, D): one row that is far away costs no digits."""
    z1 = views[0]
    n, d = z1.shape
    if n == 0:
        return wide(z1.new_zeros((len(views), d)))
    rows = torch.arange(3, device=z1.device) * (n - 1) // 2
    a, b, c = wide(torch.stack([z.index_select(0, rows) for z in views], dim=1)).unbind()
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


def _pair_dots(us: tuple[Tensor, ...], plan: Plan) -> Tensor:
    """Σₙ u_i ∘ u_j of every pair of views, (P, D); on CPU by blocks of rows of all views that stay in the cache.

    On one thread of an EPYC the 28 pairs of 8×256×8192 take 20 ms, with a product and its sum for each 39.
    """
    pairs = pairs_of(len(us))
    if not plan.on_host:
        return torch.stack([torch.mul(us[i], us[j]).sum(0) for i, j in pairs])
    height = max(1, _PAIRS_ELEMENTS // us[0].shape[1])
    dots = _BlockDots(len(pairs), height, us[0])
    for rows in zip(*(torch.split(u, height) for u in us), strict=True):
        dots.add([(rows[i], rows[j]) for i, j in pairs])
    return dots.total()


class _BlockDots:
    """Σₙ a ∘ b of several a and b, (P, D), that come by blocks of at most so many rows."""

    def __init__(self, count: int, height: int, like: Tensor) -> None:
        self.sums = like.new_zeros((count, min(height, like.shape[0]), like.shape[1]))
        self.folded, self.blocks = like.new_zeros((count, like.shape[1])), 0

    def add(self, blocks: list[tuple[Tensor, Tensor]]) -> None:
        """The next block of each."""
        for of_pair, (a, b) in zip(self.sums[:, : len(blocks[0][0])].unbind(), blocks, strict=True):
            of_pair.addcmul_(a, b)
        self.blocks += 1
        if self.blocks % 16 == 0:  # a sum of a thousand blocks, one after another, would lose a digit
            self.total()
            self.sums.zero_()

    def total(self) -> Tensor:
        return self.folded.add_(self.sums.sum(1))


def grams(u: Stack, every: tuple[Tensor, ...] | None, plan: Plan) -> tuple[tuple[Tensor, ...], Tensor]:
    """This process's rows of every M_i = Σ_j w_ij K_j, and ½ Σ_i ⟨K_i, M_i⟩ over them in parts, of any shape.

    every: the rows of all processes, (N, D) of each view, in which K has (n, N); None: u has them all.
    """
    if every is None:
        k = _grams(u, plan)
    else:
        k = tuple(torch.mm(own, rows.t()) for own, rows in zip(each(u), every, strict=True))
    if len(k) == 2:
        k1, k2 = k
        return (k2, k1), torch.mul(wide(k1), wide(k2))
    return (_mix_in_place if plan.on_host else _mix)(k, plan)


def _mix(k: tuple[Tensor, ...], plan: Plan) -> tuple[tuple[Tensor, ...], Tensor]:
    wide_k = [wide(k_i) for k_i in k]
    m = [_weighted_sum(wide_k, weights) for weights in plan.weights]
    parts = torch.stack([torch.mul(k_i, m_i).sum(1) for k_i, m_i in zip(wide_k, m, strict=True)])
    return tuple(m_i.to(k[0].dtype) for m_i in m), parts * 0.5


def _mix_in_place(k: tuple[Tensor, ...], plan: Plan) -> tuple[tuple[Tensor, ...], Tensor]:
    """By blocks of rows that stay in the cache, M in the place of K: no more memory."""
    n, width = k[0].shape
    height = max(1, _BLOCK_ELEMENTS // (len(k) * width))
    total = 0.0
    for start in range(0, n, height):
        rows = slice(start, start + height)
        own = torch.stack([k_i[rows] for k_i in k])
        m = [_weighted_sum(own, weights, out=k_i[rows]) for k_i, weights in zip(k, plan.weights, strict=True)]
        total += sum(torch.mul(k_i, m_i).sum().item() for k_i, m_i in zip(own, m, strict=True))
    return k, torch.scalar_tensor(total * 0.5, dtype=vector_dtype(k[0].device))


def _weighted_sum(k: Sequence[Tensor] | Tensor, weights: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    total = torch.mul(k[0], weights[0], out=out)
    for k_j, weight in zip(k[1:], weights[1:], strict=True):
        if weight:
            total.add_(k_j, alpha=weight)
    return total


def _grams(u: Stack, plan: Plan) -> tuple[Tensor, ...]:
    if isinstance(u, Tensor) and (not plan.on_host or u.shape[1] < 2 * GRAM_LEAF):
        return torch.bmm(u, u.mT).unbind()
    if not plan.on_host:
        return tuple(torch.mm(view, view.t()) for view in u)
    n = u[0].shape[0]
    k = u[0].new_empty((len(u), n, n)).unbind()
    for view, of_view in zip(each(u), k, strict=True):
        gram_into(of_view, view)
    return k


def project(k: Tensor, every: Tensor, own: Tensor, beside: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """P = K U, and what is beside it, from this process's rows of K; Σₙ u_own ∘ P: (n, N), (N, D) to (n, D), (D,)."""
    p = moved_product(k, every, beside)
    return p, _column_dots(wide(own), wide(p), plan, keepdim=False)


def wide(t: Tensor) -> Tensor:
    """In float32 at least, for sums."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def input_gradients(
    products: Iterable[Product | None],
    u: Stack,
    c: Tensor,
    rho: Tensor,
    grad_outputs: GradOutputs,
    includes_diagonal: bool,
    plan: Plan,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """ρ (2b P + Σ d u_other − (2b q + Σ d C_ii) u_own) of every view, (n, D) in ``dtype``; None where its product is.

    d = 2a (C_ii − τ), or 2a (C_ii − τ) − 2b C_ii where C̃ holds the diagonal, times the weight of the pair; the sums are
    over the other views. A product is the two factors of P, or P and None; and q, where None stands for Σₙ u_own ∘ P.
    """
    a, b = (2 * gradient for gradient in gradients_of_sums(grad_outputs, plan))
    if isinstance(b, float) and abs(b) > torch.finfo(plan.compute_dtype).max:
        b *= math.inf  # addmm refuses a number that its dtype has no room for
    of_target = a if plan.diagonal_target == 1 else a * plan.diagonal_target  # an operation less
    d = c * (a - b if includes_diagonal else a) - of_target
    views, rhos = each(u), rho.unbind()
    others = _others(d, plan)
    by_blocks = len(plan.weights) > 2 and plan.on_host
    gradients: list[Tensor | None] = [None for _ in views]
    of_own: list[Tensor | None] = [None for _ in views]
    for view, product in enumerate(products):
        if product is not None:
            g, q = _scaled_product(product, views[view], b), product[2]
            of_own[view] = None if q is None else q * b + _dots(view, d, c, plan)
            if not by_blocks:
                for other, factor in others[view]:
                    g.addcmul_(wide(views[other]), factor)
                g = _finished(views[view], g, of_own[view], rhos[view], plan, dtype)
            gradients[view] = g
    if by_blocks:
        dots = _add_by_blocks(gradients, others, views)
        for view, started in enumerate(gradients):
            if started is not None:
                of_view = dots[view] if of_own[view] is None else of_own[view]
                gradients[view] = _finished(views[view], started, of_view, rhos[view], plan, dtype)
    return tuple(gradients)


def _add_by_blocks(gs: list[Tensor | None], others: Sequence[_Others], us: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """Add Σ d u_other to the g of every view, and find Σₙ u_own ∘ g; block of rows by block, so that u is read once."""
    height = max(1, 2 * _PAIRS_ELEMENTS // us[0].shape[1])
    wanted = {view: torch.split(g, height) for view, g in enumerate(gs) if g is not None}
    if not wanted:  # λ alone needs a gradient
        return {}
    dots = _BlockDots(len(wanted), height, us[0])
    for number, rows in enumerate(zip(*(torch.split(u, height) for u in us), strict=True)):
        for view, blocks in wanted.items():
            for other, factor in others[view]:
                blocks[number].addcmul_(rows[other], factor)
        dots.add([(rows[view], blocks[number]) for view, blocks in wanted.items()])
    return dict(zip(wanted, dots.total().unbind(), strict=True))


def _others(d: Tensor, plan: Plan) -> Sequence[_Others]:
    """For every view those with which it pairs, and d of the pair by its weight."""
    d = d if d.dtype == plan.compute_dtype else d.to(plan.compute_dtype)
    views = len(plan.weights)
    if views == 2:
        return ((1, d),), ((0, d),)
    others: list[list[tuple[int, Tensor]]] = [[] for _ in range(views)]
    for (i, j), d_pair in zip(pairs_of(views), d.unbind(), strict=True):
        weight = plan.weights[i][j]
        if weight:
            weighted = d_pair * weight
            others[i].append((j, weighted))
            others[j].append((i, weighted))
    return [tuple(pairs) for pairs in others]


def _scaled_product(product: Product, own: Tensor, b: Number) -> Tensor:
    """2b P in float32 at least."""
    left, right, _ = product
    if isinstance(b, float) and right is not None:
        return torch.addmm(wide(own), left, right, beta=0, alpha=b)
    return wide(left if right is None else torch.mm(left, right)) * b


def _finished(own: Tensor, g: Tensor, of_own: Tensor | None, rho: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """ρ (g − (2b q + Σ d C_ii) u_own), where Σₙ u_own ∘ g is both sums at once if they are not given."""
    own = wide(own)
    of_own = _column_dots(own, g, plan) if of_own is None else of_own
    g.addcmul_(own, of_own.to(plan.compute_dtype), value=-1).mul_(rho.to(plan.compute_dtype))
    return g if g.dtype == dtype else g.to(dtype)


def _dots(view: int, d: Tensor, c: Tensor, plan: Plan) -> Tensor:
    """Σ d C_ii over the views with which one pairs."""
    if c.ndim == 1:
        return d * c
    pairs = enumerate(pairs_of(len(plan.weights)))
    return torch.stack([d[row] * c[row] * plan.weights[i][j] for row, (i, j) in pairs if view in (i, j)]).sum(0)
