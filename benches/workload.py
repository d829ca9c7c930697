"""The work that every bench does: the grid, the views, one training step's share of the loss, and its right answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from barlow_loss import reference
from baselines import EPS, LAMBD, OURS

if TYPE_CHECKING:
    from baselines import Contender


@dataclass(frozen=True)
class Cell:
    """A point of the grid: a batch of ``n`` samples with ``d`` features, float32."""

    n: int
    d: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """``Cell.parse("256x8192")``."""
        match = re.fullmatch(r"(\d+)[x×](\d+)", text)
        if match is None:
            raise ValueError(f"cell: expected N×D as in 256x8192, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}×{self.d}"

    @property
    def algorithm(self) -> Literal["primal", "dual"]:
        """What ``algorithm="auto"`` runs here."""
        return "dual" if 2 * self.n <= self.d else "primal"

    def views(self) -> tuple[Tensor, Tensor]:
        """Two views that agree as those of a half-trained encoder do: the same signal, each with its own noise."""
        generator = torch.Generator().manual_seed(self.n * 100_003 + self.d)
        signal, noise1, noise2 = torch.randn(3, self.n, self.d, generator=generator)
        z1, z2 = signal + 0.5 * noise1, signal + 0.5 * noise2
        return z1.requires_grad_(), z2.requires_grad_()


GRID = tuple(
    map(Cell.parse, ["64x2048", "128x8192", "256x2048", "256x8192", "1024x2048", "1024x8192", "2048x8192", "4096x512"]),
)


class Answer(NamedTuple):
    """The loss and its gradient with respect to each view."""

    loss: Tensor
    gradient1: Tensor
    gradient2: Tensor


class Errors(NamedTuple):
    """Distance to float64, relative: of the loss, and of the gradient by its norm over both views."""

    loss: float
    gradient: float


def step(contender: Contender, z1: Tensor, z2: Tensor) -> Answer:
    """What is timed: the loss and its gradient with respect to both views."""
    loss = contender(z1, z2)
    return Answer(loss.detach(), *torch.autograd.grad(loss, (z1, z2)))


def truth(z1: Tensor, z2: Tensor) -> Answer:
    """The same step by the package's oracle, plain autograd over D×D matrices, in float64."""
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2)]
    return step(lambda a, b: reference.barlow_twins_loss(a, b, lambd=LAMBD, eps=EPS).loss, *doubles)


def errors(answer: Answer, right: Answer) -> Errors:
    """How far ``answer`` is from the ``right`` one."""
    loss = (answer.loss.double() - right.loss).abs() / right.loss.abs()
    difference = [g.double() - r for g, r in zip(answer[1:], right[1:], strict=True)]
    gradient = torch.cat(difference).norm() / torch.cat(right[1:]).norm()
    return Errors(loss.item(), gradient.item())


def check(name: str, cell: Cell, found: Errors) -> None:
    """Refuse to time a wrong answer: ours to its promise, the others to what float32 over D×D matrices gives."""
    allowed = Errors(2e-6, 1e-5) if name == OURS else Errors(1e-4, 1e-3)
    if not (found.loss <= allowed.loss and found.gradient <= allowed.gradient):
        raise AssertionError(f"{name} at {cell}: expected errors of at most {allowed}, found {found}")
