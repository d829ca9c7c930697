"""Truth in float64, the loss under test, and how far apart the two may be.

A stated tolerance is relative to the value, or to the norm of the gradient. Near the optimum both tend to 0 while the
C_ii they are made of keep their rounding, so no implementation in the same dtype can hold it there; the budget is then
the *rounding band*: what a few roundings of every standardised element do to the result, to first order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import barlow_loss
from barlow_loss import reference

LAMBD = 0.0051
EPS = 1e-5
# Roundings from an input to an entry of C: centre and scale in either view, their product, the blocked sum.
ROUNDINGS = 6


def tolerance(dtype: torch.dtype, float64: float, float32: float) -> float:
    """The pair "fp64 / fp32" of a law's statement."""
    return {torch.float64: float64, torch.float32: float32}[dtype]


@dataclass(frozen=True)
class Evaluation:
    """The loss, its two terms and ∂L/∂z of the two views."""

    loss: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor
    gradients: tuple[Tensor, Tensor]


def evaluate(z1: Tensor, z2: Tensor, **settings: Any) -> Evaluation:
    """The loss under test and its gradients; `z1` and `z2` are used with the strides they have."""
    leaves = [view.detach().requires_grad_() for view in (z1, z2)]
    terms = barlow_loss.barlow_twins_loss(*leaves, return_terms=True, **settings)
    return Evaluation(*(term.detach() for term in terms), torch.autograd.grad(terms.loss, leaves))


@dataclass(frozen=True)
class Truth(Evaluation):
    """The oracle in float64 on exactly the numbers given, and what one rounding of those numbers costs."""

    correlation: Tensor
    value_condition: float
    gradient_conditions: tuple[float, float]
    input_condition: float

    def value_budget(self, tol: float, dtype: torch.dtype) -> float:
        return max(tol * float(self.loss), ROUNDINGS * torch.finfo(dtype).eps * self.value_condition)

    def gradient_budget(self, view: int, tol: float, dtype: torch.dtype) -> float:
        band = ROUNDINGS * torch.finfo(dtype).eps * self.gradient_conditions[view]
        return max(tol * float(self.gradients[view].norm()), band)

    def rounded_input_budget(self, tol: float, dtype: torch.dtype) -> float:
        """For laws that compare with transformed inputs, which had to be rounded once more."""
        return self.value_budget(tol, dtype) + torch.finfo(dtype).eps * self.input_condition


def centered(z: Tensor) -> Tensor:
    """z − μ in float64, in two passes: one leaves a mean of u·|μ|/σ in ẑ, 1e-10 at mean 1e4 and std 1e-2."""
    x = z.double() - z.double().mean(0)
    return x - x.mean(0)


def truth(
    z1: Tensor, z2: Tensor, lambd: float = LAMBD, eps: float = EPS, target: float = 0.0, correction: int = 0
) -> Truth:
    """L, its terms and gradients by float64 autograd through the oracle; their rounding bands by the closed form."""
    leaves = [centered(view).requires_grad_() for view in (z1, z2)]
    terms = reference.barlow_twins_loss(
        *leaves, lambd=lambd, eps=eps, off_diagonal_target=target, correction=correction
    )
    gradients = torch.autograd.grad(terms.loss, leaves)

    # Every product of L and of ∂L/∂z1 = r1/N ⊙ (ẑ2 Mᵀ − ẑ1 ⊙ rowsum(M∘C)), by its absolute value.
    n, d = z1.shape
    (hat1, r1), (hat2, r2) = (_standardized(leaf.detach(), eps, correction) for leaf in leaves)
    C = hat1.T @ hat2 / n
    reached = C.abs() + abs(target)  # the dual expands (C − t)², and rounds each part
    M = 2 * lambd * reached
    M.diagonal().copy_(2 * (C.diagonal() - 1).abs() + 2)
    rowsum, colsum = (M * C.abs()).sum(1), (M * C.abs()).sum(0)
    value_condition = (
        2 * (C.diagonal() - 1).abs().sum() + 2 * lambd * reached.square().sum() + d * torch.finfo(z1.dtype).eps
    )
    conditions = (
        (r1 / n * (hat2.abs() @ M.T + hat1.abs() * rowsum)).norm(),
        (r2 / n * (hat1.abs() @ M + hat2.abs() * colsum)).norm(),
    )
    input_condition = sum((gradient * view).abs().sum() for gradient, view in zip(gradients, (z1, z2), strict=True))
    return Truth(
        *(term.detach() for term in terms),
        gradients,
        C,
        float(value_condition),
        tuple(float(condition) for condition in conditions),
        float(input_condition),
    )


def _standardized(x: Tensor, eps: float, correction: int) -> tuple[Tensor, Tensor]:
    r = (x.square().sum(0) / (len(x) - correction) + eps).rsqrt()
    return x * r, r


def assert_near(got: Tensor, expected: Tensor | float, budget: float, what: str = "value") -> None:
    """|got − expected| ≤ budget, by norm for tensors; NaN fails."""
    error = float((got.double() - torch.as_tensor(expected, dtype=torch.float64)).norm())
    assert error <= budget, f"{what}: error {error:.3e} is above the budget {budget:.3e} (ratio {error / budget:.2f})"


def assert_bitwise(got: Evaluation, expected: Evaluation) -> None:
    """Loss, terms and gradients are the same bits (no law that uses this expects NaN)."""
    for name in ("loss", "on_diagonal", "off_diagonal"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for view, (one, other) in enumerate(zip(got.gradients, expected.gradients, strict=True), start=1):
        assert torch.equal(one, other), f"gradient of z{view}"
