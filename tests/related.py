"""VICReg and mixed samples as the tests see them: what to call, the oracle in float64, and how far apart they may be.

As in ``comparison.py`` the budget is a stated tolerance, or the rounding band where the result tends to 0 while what it
is made of keeps its rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from barlow_loss import mixed_barlow_twins_loss, reference, vicreg_loss
from comparison import LAMBD, ROUNDINGS, centered
from strategies import Batch

MIX_SCALE, ALPHA = 5.0, 0.3


@dataclass(frozen=True)
class Relative:
    """A loss of ``count`` views: the one under test and its oracle, both called with views and settings alone."""

    name: str
    count: int
    loss: Callable[..., Any]
    oracle: Callable[..., Any]
    conditions: Callable[..., tuple[Tensor, list[Tensor]]]

    def views(self, batch: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """As many as the loss takes; the third and fourth are mixtures of the two that the batch has, and noise."""
        z1, z2 = batch.views(torch.float64)
        generator = batch.generator()
        views = [z1, z2]
        for number in range(self.count - 2):
            noise = torch.randn(batch.n, batch.d, generator=generator, dtype=torch.float64)
            views.append((0.3 * z1 + 0.7 * z2.roll(number, 0)) + 0.1 * batch.std * noise)
        return [z.to(dtype) for z in views]


@dataclass(frozen=True)
class Answer:
    """The loss, its terms and the gradients, and for an oracle the rounding bands of value and gradients."""

    terms: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    value_condition: float = 0.0
    gradient_conditions: tuple[float, ...] = ()

    @property
    def loss(self) -> Tensor:
        return self.terms[0]

    def value_budget(self, tol: float, dtype: torch.dtype) -> float:
        return max(tol * float(self.loss), ROUNDINGS * torch.finfo(dtype).eps * self.value_condition)

    def gradient_budget(self, view: int, tol: float, dtype: torch.dtype) -> float:
        band = ROUNDINGS * torch.finfo(dtype).eps * self.gradient_conditions[view]
        return max(tol * float(self.gradients[view].norm()), band)


def answer(relative: Relative, views: list[Tensor], **settings: Any) -> Answer:
    """The loss under test; views are used with the strides they have."""
    leaves = [view.detach().requires_grad_() for view in views]
    terms = relative.loss(*leaves, return_terms=True, **settings)
    return Answer(tuple(term.detach() for term in terms), torch.autograd.grad(terms[0], leaves))


def right(relative: Relative, views: list[Tensor], **settings: Any) -> Answer:
    """The oracle in float64 on exactly the numbers given."""
    leaves = [view.detach().double().requires_grad_() for view in views]
    terms = relative.oracle(*leaves, **settings)
    gradients = torch.autograd.grad(terms[0], leaves)
    value, conditions = relative.conditions(*(leaf.detach() for leaf in leaves), **settings)
    return Answer(
        tuple(term.detach() for term in terms),
        gradients,
        float(value),
        tuple(float(condition.norm()) for condition in conditions),
    )


def vicreg_conditions(
    *views: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
) -> tuple[Tensor, list[Tensor]]:
    """Every product of the loss and of its gradient, by its absolute value."""
    n, d, count = *views[0].shape, len(views)
    spread = torch.stack(list(views)).var(0, correction=0).sqrt()
    value = invariance * spread.square().mean() + variance
    gradients = []
    for z in views:
        x = centered(z)
        cov = x.abs().T @ x.abs() / (n - 1)
        sigma = ((x.square().sum(0) / (n - 1)) + eps).sqrt()
        value = value + covariance * 2 / (count * d) * (x.T @ x / (n - 1)).square().sum()
        of_c = covariance * 8 / (count * d * (n - 1)) * x.abs() @ cov
        of_v = variance / (count * d * (n - 1)) * x.abs() / sigma
        gradients.append(of_c + of_v + invariance * 4 / ((count - 1) * n * d) * spread)
    return value, gradients


def permutation_of(n: int, device: torch.device | str = "cpu") -> Tensor:
    """A fixed one of n rows."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device)


def mixed(z1: Tensor, z2: Tensor, z_mixed: Tensor, **settings: Any) -> Any:
    """With the α and the permutation of these tests."""
    return mixed_barlow_twins_loss(z1, z2, z_mixed, ALPHA, permutation_of(len(z1), z1.device), **settings)


def _mixed_oracle(z1: Tensor, z2: Tensor, z_mixed: Tensor, **settings: Any) -> Any:
    views = [centered(z) for z in (z1, z2, z_mixed)]
    return reference.mixed_barlow_twins_loss(*views, ALPHA, permutation_of(len(z1), z1.device), **settings)


def mixed_conditions(
    z1: Tensor, z2: Tensor, z_mixed: Tensor, lambd: float = LAMBD, mix_scale: float = MIX_SCALE, eps: float = 1e-5
) -> tuple[Tensor, list[Tensor]]:
    n, d = z1.shape
    x = [centered(z) for z in (z1, z2, z_mixed)]
    r = [(t.square().mean(0) + eps).rsqrt() for t in x]
    u1, u2, um = (t.abs() * scale for t, scale in zip(x, r, strict=True))
    c = u1.T @ u2 / n
    e = um + ALPHA * u1 + (1 - ALPHA) * u2[permutation_of(n, z1.device)]
    weight = lambd * mix_scale
    value = d + lambd * c.square().sum() + weight * sum((e.T @ u / n).square().sum() for u in (u1, u2))
    of_e = 2 * weight / n * e @ (u1.T @ u1 + u2.T @ u2) / n
    of_u = [2 * weight / n * u @ (e.T @ e) / n for u in (u1, u2)]
    of_bt = [other @ (2 * lambd * c + 2 * torch.eye(d, dtype=c.dtype)) / n for other in (u2, u1)]
    parts = [of_bt[0] + of_u[0] + of_e, of_bt[1] + of_u[1] + of_e, of_e]
    return value, [scale * (g + u * (g * u).mean(0)) for scale, g, u in zip(r, parts, (u1, u2, um), strict=True)]


RELATIVES = {
    "vicreg": Relative("vicreg", 2, vicreg_loss, reference.vicreg_loss, vicreg_conditions),
    "vicreg of 4 views": Relative("vicreg of 4 views", 4, vicreg_loss, reference.vicreg_loss, vicreg_conditions),
    "mixed": Relative("mixed", 3, mixed, _mixed_oracle, mixed_conditions),
}
