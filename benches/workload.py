"""The work that every bench does: the grid, the views, one training step's share of the loss, and its right answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from barlow_loss import reference
from baselines import EPS, FFT, LAMBD, OURS, PAPER, SOLO, TEXTBOOK, build, entry
from machine import all_cores

if TYPE_CHECKING:
    from baselines import Contender

SEED = 0  # of contenders that draw in a step
LARGEST_ORACLE = 4096  # features; its float64 matrices take 128 MB each


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


def _cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(map(Cell.parse, texts))


# Two lines, N = 256 and D = 2048, on which costs are seen to grow, and the shape of a primal: everyone.
GRID = _cells("64x2048", "256x2048", "1024x2048", "256x4096", "256x8192", "4096x512")
# Where a D×D matrix takes seconds, or does not fit: three of them, and the textbook as long as it can.
LARGE = _cells("2048x2048", "128x8192", "1024x8192", "256x16384", "256x32768")
PRESENT_AT_LARGE = (OURS, TEXTBOOK, FFT)
LARGEST_TEXTBOOK = 8192
# In an hour, not in ten minutes: a cell, and solo-learn's masks (3 s a step at 256×4096 on one thread of an EPYC).
SLOW = _cells("2048x8192")
LARGEST_SOLO = 4096


def present(cell: Cell, names: tuple[str, ...], *, patient: bool = False) -> tuple[str, ...]:
    """Those of ``names`` that are measured at ``cell``, where there is time or not."""
    large, limit = cell in LARGE + SLOW, {TEXTBOOK: LARGEST_TEXTBOOK}
    if not patient:
        limit[SOLO] = LARGEST_SOLO
    return tuple(
        name for name in names if (name in PRESENT_AT_LARGE or not large) and cell.d <= limit.get(name, cell.d)
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
    """The same step in float64, by plain autograd: the package's oracle, or the Gram form where D×D is too much."""
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2)]
    with all_cores():
        return step(_oracle if z1.shape[1] <= LARGEST_ORACLE else gram_form, *doubles)


def _oracle(z1: Tensor, z2: Tensor) -> Tensor:
    return reference.barlow_twins_loss(z1, z2, lambd=LAMBD, eps=EPS).loss


def gram_form(z1: Tensor, z2: Tensor) -> Tensor:
    """The loss through ‖C‖² = ⟨K1, K2⟩/N², differentiated by autograd; in float64 as right as the oracle."""
    n = z1.shape[0]
    u1, u2 = ((z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + EPS).sqrt() for z in (z1, z2))
    diagonal = (u1 * u2).sum(dim=0) / n
    off_diagonal = (u1 @ u1.T * (u2 @ u2.T)).sum() / n**2 - diagonal.square().sum()
    return (diagonal - 1).square().sum() + LAMBD * off_diagonal


def errors(answer: Answer, right: Answer) -> Errors:
    """How far ``answer`` is from the ``right`` one."""
    loss = (answer.loss.double() - right.loss).abs() / right.loss.abs()
    difference = [g.double() - r for g, r in zip(answer[1:], right[1:], strict=True)]
    gradient = torch.cat(difference).norm() / torch.cat(right[1:]).norm()
    return Errors(loss.item(), gradient.item())


def error_of_own(name: str, answer: Answer, right: Answer, z1: Tensor, z2: Tensor) -> Errors:
    """The distance of an ``answer`` to float64 of what its contender computes: ``right`` if it is the paper's."""
    if entry(name).definition == PAPER:
        return errors(answer, right)
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2)]
    torch.manual_seed(SEED)
    with all_cores():
        return errors(answer, step(build(name, z1.shape[1]), *doubles))


def check(name: str, cell: Cell, found: Errors) -> None:
    """Refuse to time a wrong answer: ours to its promise, the others to what float32 over D×D matrices gives."""
    allowed = Errors(2e-6, 1e-5) if entry(name).ours else Errors(1e-4, 1e-3)
    if not (found.loss <= allowed.loss and found.gradient <= allowed.gradient):
        raise AssertionError(f"{name} at {cell}: expected errors of at most {allowed}, found {found}")
