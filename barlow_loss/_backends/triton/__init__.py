"""The primitives fused by Triton, for CUDA, ROCm and XPU. Matrix products stay torch.mm.

The dual of one process is eight launches: ``fused_standardize`` | K1 | K2 | ``frobenius`` | ``loss_terms``, and in the
backward P1 | P2 | ``input_gradients``. V > 2 views take at most 4V + 4: ``fused_standardize`` for every two of them |
``pair_dots`` | K of every view | ``mix`` | ``loss_terms``, and P and ``view_gradient`` of every view. No launch waits
for the host, and none uses atomics: the same inputs give the same bits, and a CUDA graph may hold them. Each kernel has
a file: the kernel, then the operation that launches it, then its fake.

The operations have no derivative of their own: they are called inside the autograd.Function of ``_function.py``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._backends.triton import _input_gradients, _loss_terms, _standardize
from barlow_loss._backends.triton._frobenius import frobenius
from barlow_loss._backends.triton._input_gradients import column_dots
from barlow_loss._backends.triton._views import mix, pair_dots, view_gradient
from barlow_loss._pairs import each, pairs_of, weights_of_pairs
from barlow_loss._statistics import moments_from_sums, pivot_of, sample_index, scale_and_shift
from barlow_loss._target import moved_product

if TYPE_CHECKING:
    from collections.abc import Iterable

    from barlow_loss._backends.eager import Product
    from barlow_loss._collectives import Shards
    from barlow_loss._loss_terms import GradOutputs
    from barlow_loss._pairs import Stack
    from barlow_loss._plan import Plan

__all__ = ["grams", "input_gradients", "loss_terms", "project", "standardize"]


def standardize(views: tuple[Tensor, ...], eps: float, plan: Plan, shards: Shards) -> tuple[Stack, Tensor, Tensor]:
    if len(views) == 2:
        return _standardize_two(views, eps, plan, plan.matmul_dtype, shards)
    # Two by two, an odd one with the first; C_ii in a launch of its own, from u before it is rounded for the products.
    couples = [(view, views[(2 * number + 1) % len(views)]) for number, view in enumerate(views[::2])]
    stacks, _, rhos = zip(*(_standardize_two(c, eps, plan, plan.compute_dtype, shards) for c in couples), strict=True)
    us = [u for stack in stacks for u in stack.unbind()][: len(views)]
    c, rounded = pair_dots(us[0], us[1:], *views[0].shape, plan.matmul_dtype)
    return tuple(rounded or us), c, torch.cat(rhos)[: len(views)]


def _standardize_two(
    views: tuple[Tensor, ...], eps: float, plan: Plan, dtype: torch.dtype, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = views
    if shards.group.size == 1:
        return _standardize.fused_standardize(z1, z2, eps, dtype)
    n = z1.shape[0]
    rows = sample_index(n, z1.device)
    pivot = pivot_of(torch.stack([z.index_select(0, rows) for z in views]), plan.compute_dtype)
    shard = moments_from_sums(n, pivot, *_standardize.column_sums(z1, z2, pivot))
    rho, shift = scale_and_shift(shard, eps, shards)
    vectors = pivot, rho.to(pivot.dtype), shift.to(pivot.dtype)
    u, diagonal = _standardize.standardize(z1, z2, *vectors, dtype)
    return u, diagonal, rho


def grams(u: Stack, every: tuple[Tensor, ...] | None, plan: Plan) -> tuple[tuple[Tensor, ...], Tensor]:
    own = each(u)
    k = [torch.mm(rows, of_all.t()) for rows, of_all in zip(own, every or own, strict=True)]
    if len(k) == 2:
        return (k[1], k[0]), frobenius(*k)
    m, parts = mix(k[0], k[1:], list(itertools.chain(*plan.weights)))
    return tuple(m), parts


def project(k: Tensor, every: Tensor, own: Tensor, beside: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    p = moved_product(k, every, beside)
    return p, column_dots(own, p)


def _weight(lambd: float | Tensor) -> tuple[Tensor | None, float]:
    """λ as a tensor or as a number, for operations whose schema knows either."""
    return (lambd, 0.0) if isinstance(lambd, Tensor) else (None, float(lambd))


def loss_terms(
    c: Tensor, squares: Tensor, lambd: float | Tensor, includes_diagonal: bool, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    weights = None if c.ndim == 1 else list(weights_of_pairs(plan.weights))
    return _loss_terms.loss_terms(
        c, squares, *_weight(lambd), plan.diagonal_target, weights, includes_diagonal, plan.compute_dtype
    )


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
    *given, lambd = grad_outputs
    if isinstance(u, Tensor):
        (p1, q1), (p2, q2) = map(_product, products)
        gradients = _input_gradients.input_gradients(
            u, p1, p2, q1, q2, c, rho, *given, *_weight(lambd), plan.diagonal_target, includes_diagonal, n, dtype
        )
        return tuple(None if p is None else dz for p, dz in zip((p1, p2), gradients, strict=True))
    settings = *given, *_weight(lambd), plan.diagonal_target, includes_diagonal, n, dtype
    return tuple(
        [product and _gradient_of(view, product, u, c, rho, settings, plan) for view, product in enumerate(products)]
    )


def _gradient_of(
    view: int, product: Product, u: tuple[Tensor, ...], c: Tensor, rho: Tensor, settings: tuple[Any, ...], plan: Plan
) -> Tensor:
    own, of_view = u[view], rho[view]
    pairs = [(i + j - view, row) for row, (i, j) in enumerate(pairs_of(len(u))) if view in (i, j)]
    pairs = [(other, row) for other, row in pairs if plan.weights[view][other]]
    if not pairs:
        *_, n, dtype = settings
        return own.new_zeros((n, c.shape[1]), dtype=dtype)
    others, cs = [u[other] for other, _ in pairs], [c[row] for _, row in pairs]
    weights = [plan.weights[view][other] for other, _ in pairs]
    p, q = _product(product)
    return view_gradient(p, q, own, others, cs, weights, of_view, *settings)


def _product(product: Product | None) -> tuple[Any, Tensor | None]:
    """P and q."""
    if product is None:
        return None, None
    left, right, q = product
    return left if right is None else torch.mm(left, right), q
