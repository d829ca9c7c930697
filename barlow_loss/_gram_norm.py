"""The squared norm of a product over the rows of all processes, without the product where the rows are few.

    C = XᵀY,    ‖C‖² = Σ_ij C_ij² = ⟨XXᵀ, YYᵀ⟩

    ∂‖C‖²/∂X = 2 Y Cᵀ = 2 (YYᵀ) X,    ∂‖C‖²/∂Y = 2 X C = 2 (XXᵀ) Y

The primal makes C, which is D×D. The dual makes the Gram matrices, which are N×N. Several Y share one X:

    Σ_j ‖XᵀY_j‖² = ⟨XXᵀ, Σ_j Y_jY_jᵀ⟩

Over several processes X and Y are this rank's rows. The primal sums C over the ranks. The dual gathers the rows of all
and computes its own rows of the Gram matrices; it makes the products of the gradient at once, so that the gathered rows
need not be kept. On each rank ‖C‖² is a function of all rows, so the adjoint of a row sums the incoming gradients of
all ranks: one number, the only collective of the backward.

:func:`cross_norm` is a differentiable operation. :func:`own_norm` and :func:`own_product` are the two halves of one for
Y = X, for a caller with a backward of its own. A second derivative raises, instead of being silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from barlow_loss._collectives import Shards, all_reduce_matrix, all_reduce_sum, gather_rows, once_even
from barlow_loss._gram import gram_into
from barlow_loss._header import UNEVEN
from barlow_loss._plan import applied, autocast_disabled, choose_algorithm, is_traced, vector_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Batch", "batch_for", "cross_norm", "differentiated_once", "own_norm", "own_product", "sum_grad_outputs"]


class Batch(NamedTuple):
    """Whose rows form one batch, and how its products are made."""

    caller: str
    shards: Shards
    algorithm: str  # "primal" or "dual"
    grad_reduction: str  # "mean" or "sum"
    on_host: bool  # CPU tensors in plain eager mode: products may be written block by block

    @property
    def alone(self) -> bool:
        """One process has all rows."""
        return self.shards.group.size == 1


def batch_for(caller: str, shards: Shards, algorithm: str, grad_reduction: str, *views: Tensor) -> Batch:
    """What is decided by the shape alone: "auto" takes the dual for N ≤ D/2, as the loss does.

    There Σ_{i≠j} C_ij² = ‖C‖² − Σ_i C_ii² loses no digits, and the dual has less to compute, to hold and to send.
    """
    z = views[0]
    if algorithm == "auto":
        algorithm = choose_algorithm(shards.total, z.shape[1])
    return Batch(caller, shards, algorithm, grad_reduction, z.is_cpu and not is_traced(*views))


def cross_norm(batch: Batch, x: Tensor, *others: Tensor) -> Tensor:
    """Σ_j ‖XᵀY_j‖² over the rows of all processes, 0-d.

    Args:
        batch: the processes and the algorithm.
        x: X, this process's rows, (n, D), float32 or float64.
        *others: every Y_j, (n, E_j), of the same rows, dtype and device.
    """
    recorded = torch.is_grad_enabled()
    needs_grad = tuple(recorded and t.requires_grad for t in (x, *others))
    return applied(_CrossNorm, True in needs_grad, batch, needs_grad, x, *others)[0]


class _CrossNorm(torch.autograd.Function):
    @staticmethod
    def forward(batch: Batch, needs_grad: tuple[bool, ...], x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        # torch.export traces this with gradients on, which writing into buffers does not support.
        with torch.no_grad(), autocast_disabled(x.device.type):
            of = _primal_cross if batch.algorithm == "primal" else _dual_cross
            return of(batch, needs_grad, x, others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.batch, ctx.needs_grad, *factors = inputs
        ctx.set_materialize_grads(False)
        ctx.factors = len(factors)
        ctx.save_for_backward(*output, *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        norm, *saved = ctx.saved_tensors
        factors, matrices = saved[-ctx.factors :], saved[: -ctx.factors]

        def compute() -> tuple[Tensor | None, ...]:
            (slope,) = sum_grad_outputs(ctx.batch, norm, grads[0])
            with autocast_disabled(norm.device.type):
                return tuple(_cross_gradients(ctx.batch, ctx.needs_grad, 2 * slope, factors, matrices))

        return None, None, *differentiated_once(ctx.batch.caller, norm, compute)


def _copied(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Compiled by torch 2.11, an output of a .to() without effect silently loses its gradient."""
    return output.to(dtype, copy=True)


def _primal_cross(
    batch: Batch, needs_grad: tuple[bool, ...], x: Tensor, others: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Σ_j ‖C_j‖², then every C_j."""
    products = [all_reduce_matrix(batch.shards.group, torch.mm(x.t(), y)) for y in others]
    total = torch.stack([_sum_of_squares(c) for c in products]).sum()
    return _copied(total, x.dtype), *products


def _dual_cross(
    batch: Batch, needs_grad: tuple[bool, ...], x: Tensor, others: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """⟨K, M⟩, then K = XXᵀ and M = Σ_j Y_jY_jᵀ; over several processes M X and every K Y_j in place of them."""
    x, *ys = _even(batch, x, *others)
    every = [gather_rows(batch.shards, rows) for rows in (x, *ys)]
    k = _gram(batch, x, every[0])
    m = _gram(batch, ys[0], every[1])
    for y, rows in zip(ys[1:], every[2:], strict=True):
        m += _gram(batch, y, rows)
    (total,) = all_reduce_sum(batch.shards.group, torch.mul(k, m).sum(dtype=vector_dtype(x.device)))
    if batch.alone:
        return _copied(total, x.dtype), k, m
    grams = (m, *[k] * len(ys))
    products = [
        torch.mm(gram, rows) if wanted else x.new_empty(0)
        for wanted, gram, rows in zip(needs_grad, grams, every, strict=True)
    ]
    return _copied(total, x.dtype), *products


def _cross_gradients(
    batch: Batch, needs_grad: tuple[bool, ...], slope: Tensor, factors: list[Tensor], matrices: list[Tensor]
) -> list[Tensor | None]:
    """``slope`` times Σ_j Y_j C_jᵀ and every X C_j, or (Σ_j Y_jY_jᵀ) X and every (XXᵀ) Y_j; None where not needed."""
    x, *ys = factors
    if batch.algorithm == "primal":
        of_x = [torch.mm(y, (slope * c).t()) for y, c in zip(ys, matrices, strict=True)] if needs_grad[0] else []
        return [
            torch.stack(of_x).sum(0) if needs_grad[0] else None,
            *(torch.mm(x, slope * c) if wanted else None for wanted, c in zip(needs_grad[1:], matrices, strict=True)),
        ]
    if not batch.alone:
        return [slope * product if wanted else None for wanted, product in zip(needs_grad, matrices, strict=True)]
    k, m = matrices
    grams = (m, *[k] * len(ys))
    return [
        torch.mm(slope * gram, rows) if wanted else None
        for wanted, gram, rows in zip(needs_grad, grams, factors, strict=True)
    ]


def own_norm(batch: Batch, needs_grad: bool, x: Tensor, diagonal: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ_{i≠j} C_ij² of C = ``scale`` · XᵀX, 0-d, and what its gradient needs of it.

    Args:
        batch: the processes and the algorithm.
        needs_grad: whether there will be a gradient.
        x: X, this process's rows, (n, D).
        diagonal: C_ii over the rows of all processes, (D,), summed elementwise, which is more precise than a product.
        scale: a factor of C.
    """
    if batch.algorithm == "primal":
        c = all_reduce_matrix(batch.shards.group, torch.mm(x.t(), x)).mul_(scale)
        c.diagonal().zero_()
        return _sum_of_squares(c), c
    (x,) = _even(batch, x)
    every = gather_rows(batch.shards, x)
    k = _gram(batch, x, every).mul_(scale)
    (total,) = all_reduce_sum(batch.shards.group, _sum_of_squares(k))
    # Below 0 only by rounding, where nothing is left; NaN stays.
    off_diagonal = (total - diagonal.square().sum()).clamp_min(0)
    if batch.alone:
        return off_diagonal, k
    return off_diagonal, torch.mm(k, every) if needs_grad else x.new_empty(0)


def own_product(batch: Batch, slope: Tensor, x: Tensor, diagonal: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``slope`` · X C̃, (n, D), without the share of the diagonal, and per feature what X is to be multiplied by for it.

    C̃ is C without its diagonal: the gradient of Σ_{i≠j} C_ij² is 4 · scale · X C̃. The dual has X C = K X.
    """
    if batch.algorithm == "primal":
        return torch.mm(x, slope * kept), torch.zeros_like(diagonal)
    product = torch.mm(slope * kept, x) if batch.alone else slope * kept
    return product, -slope * diagonal


def sum_grad_outputs(batch: Batch, like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """The incoming gradient of each 0-d result, summed over the ranks; their mean where the wrapper adds gradients."""
    own = [torch.zeros_like(like) if grad is None else grad for grad in grads]
    sums = all_reduce_sum(batch.shards.group, *own)
    return tuple(total / batch.shards.group.size for total in sums) if batch.grad_reduction == "sum" else sums


def differentiated_once(
    caller: str, of_forward: Tensor, compute: Callable[[], tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """The gradients that ``compute`` gives; differentiating them, through ``of_forward`` or not, raises."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which refuses it by itself
        return compute()
    operation: Any = _Once
    gradients: tuple[Tensor | None, ...] = operation.apply(of_forward, caller, compute)
    return gradients


class _Once(torch.autograd.Function):
    """A backward as an operation of its own, connected to the forward, so that differentiating it raises."""

    @staticmethod
    def forward(of_forward: Tensor, caller: str, compute: Callable[[], Any]) -> Any:
        return compute()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.caller = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.caller}: second derivatives are not implemented. Take them from the plain autograd version in "
            "barlow_loss.reference, or detach the first gradient before it is differentiated again."
        )


def _even(batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rows; in a graph behind an assertion that every rank has as many, which no gather may overtake."""
    shards = batch.shards
    if shards.sums is None:
        return rows
    return tuple(once_even(t, shards.sums, shards.group.size, f"{batch.caller}: {UNEVEN}") for t in rows)


def _sum_of_squares(matrix: Tensor) -> Tensor:
    return matrix.square().sum(dtype=vector_dtype(matrix.device))


def _gram(batch: Batch, x: Tensor, every: Tensor) -> Tensor:
    """This process's rows of XXᵀ, (n, N)."""
    if not (batch.alone and batch.on_host):
        return torch.mm(x, every.t())
    k = x.new_empty((x.shape[0], x.shape[0]))
    gram_into(k, x)
    return k
