"""The contenders of gpu.py, the views that they get, and the float64 answer that all of them are held to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import baselines
from barlow_loss import BarlowTwinsLoss, reference
from baselines import EPS, LAMBD
from gpu_model import (
    AUTOCAST,
    COMPILED,
    CONTENDERS,
    EAGER,
    FLOAT32,
    GRAPH,
    LIGHTLY,
    TEXTBOOK,
    TRITON,
    Setting,
)
from workload import Answer, Cell, Errors, step

if TYPE_CHECKING:
    from collections.abc import Callable

    from baselines import Contender

    Turn = Callable[[], Answer]

OURS = (EAGER, TRITON, GRAPH)
_WARM_UPS = 3


def views(cell: Cell, setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """The half-trained encoder of ``workload.Cell.views``, drawn on the device, in the dtype of the setting."""
    generator = torch.Generator(device).manual_seed(cell.n * 100_003 + cell.d)
    signal, noise1, noise2 = (torch.randn(cell.n, cell.d, generator=generator, device=device) for _ in range(3))
    dtype = torch.bfloat16 if setting == AUTOCAST else torch.float32
    z1, z2 = ((signal + 0.5 * noise).to(dtype) for noise in (noise1, noise2))
    return z1.requires_grad_(), z2.requires_grad_()


def missing(name: str, device: torch.device) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == LIGHTLY and find_spec("lightly") is None:
        return "not installed"
    if name in (TRITON, GRAPH) and device.type == "cpu":
        return "needs a GPU"
    if name in (TRITON, GRAPH, COMPILED) and find_spec("triton") is None:
        return "triton is not installed"
    if name == GRAPH and not hasattr(torch.get_device_module(device), "CUDAGraph"):
        return f"no graphs on {device.type}"
    return None


def build(name: str, cell: Cell, setting: Setting, z1: Tensor, z2: Tensor) -> Turn:
    """A step of the contender ``name``: forward under the setting's autocast, backward outside of it."""
    loss = _loss(name, cell).to(z1.device)

    def turn() -> Answer:
        return step(lambda *z: _under(setting, z1.device, loss, *z), z1, z2)

    return Graphed(turn, z1.device) if name == GRAPH else turn


def _loss(name: str, cell: Cell) -> Any:
    if name == TEXTBOOK:
        return baselines.Textbook(cell.d)
    if name == COMPILED:
        return torch.compile(baselines.Textbook(cell.d), fullgraph=True, dynamic=False)
    if name == LIGHTLY:
        return baselines.build(baselines.LIGHTLY, cell.d)
    if name in OURS:
        return BarlowTwinsLoss(LAMBD, eps=EPS, backend="eager" if name == EAGER else "triton")
    raise ValueError(f"name: expected one of {CONTENDERS}, got {name!r}")


def _under(setting: Setting, device: torch.device, loss: Contender, z1: Tensor, z2: Tensor) -> Tensor:
    with autocast(setting, device):
        return loss(z1, z2)


def autocast(setting: Setting, device: torch.device) -> AbstractContextManager[Any]:
    """What a training loop would have around the loss."""
    return torch.autocast(device.type, torch.bfloat16) if setting == AUTOCAST else nullcontext()


class Graphed:
    """Forward and backward captured once on static views and replayed: one launch for the host.

    Warmed up and captured on one side stream, whose cuBLAS workspace then exists before the capture, so that ``peak``,
    the rise of the allocated memory during it, holds what the step needs. The graph keeps that memory until it dies.
    """

    def __init__(self, turn: Turn, device: torch.device) -> None:
        module = torch.get_device_module(device)
        stream = module.Stream()
        stream.wait_stream(module.current_stream())
        with module.stream(stream):
            for _ in range(_WARM_UPS):
                turn()
        module.current_stream().wait_stream(stream)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        self._graph = module.CUDAGraph()
        with module.graph(self._graph, stream=stream):
            self._answer = turn()
        self.peak = module.max_memory_allocated() - before

    def __call__(self) -> Answer:
        self._graph.replay()
        return self._answer


def truth(z1: Tensor, z2: Tensor) -> Answer:
    """Loss and gradients in float64 on exactly these numbers, by plain autograd, in the form that fits into memory."""
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2)]
    n, d = z1.shape
    return step(_gram_form if 2 * n <= d else _dense_form, *doubles)


def _dense_form(z1: Tensor, z2: Tensor) -> Tensor:
    return reference.barlow_twins_loss(z1, z2, lambd=LAMBD, eps=EPS).loss


def _gram_form(z1: Tensor, z2: Tensor) -> Tensor:
    """λ (⟨K1, K2⟩ − Σ C_ii²) + Σ (C_ii − 1)². The subtraction costs float64 one bit for N ≤ D/2."""
    u1, u2 = _scaled(z1), _scaled(z2)
    c = (u1 * u2).sum(0)
    squares = ((u1 @ u1.T) * (u2 @ u2.T)).sum()
    loss: Tensor = (c - 1).square().sum() + LAMBD * (squares - c.square().sum())
    return loss


def _scaled(z: Tensor) -> Tensor:
    x = z - z.mean(0)
    u: Tensor = x * torch.rsqrt(x.square().mean(0) + EPS) * len(z) ** -0.5
    return u


def allowed(name: str, setting: Setting) -> Errors:
    """Errors above which a time means nothing: ours to its promise, the others to what D×D matrices in 16 bits give.

    16 bits, ours: float16 operands, 2⁻¹⁰, in the loss, and two of them and the rounding to bfloat16, 2⁻⁸, in the
    gradient.
    """
    if name in OURS:
        return Errors(2e-6, 1e-5) if setting == FLOAT32 else Errors(2**-10, 2**-9 + 2**-8)
    return Errors(1e-4, 1e-3) if setting == FLOAT32 else Errors(0.05, 0.5)
