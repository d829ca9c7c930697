"""The loss on a GPU in each precision, data that every dtype holds exactly, and how far from float64 a result may be.

Where the products take 16 bits, ours are float16 of entries up to 1: a unit of 2⁻¹⁰ of the result by norm. The loss may
be one unit off, the gradient two, and its rounding to the dtype of the views comes on top. Elsewhere the tolerances are
those of the laws in ../comparison.py.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

import barlow_loss
from comparison import Evaluation, truth

UNIT = torch.finfo(torch.float16).eps


class Setting(NamedTuple):
    name: str
    views: torch.dtype
    autocast: torch.dtype | None

    @property
    def compute(self) -> torch.dtype:
        """Of the elementwise work and of the loss."""
        return torch.promote_types(self.views, torch.float32)

    @property
    def half(self) -> bool:
        """Whether the products take 16 bits."""
        return self.views.itemsize == 2 or (self.autocast is not None and self.views == torch.float32)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before backward, as a GradScaler would: float16 has no small numbers."""
        return 2.0**12 if self.views == torch.float16 else 1.0


SETTINGS = (
    Setting("float64", torch.float64, None),
    Setting("float32", torch.float32, None),
    Setting("bfloat16", torch.bfloat16, None),
    Setting("float16", torch.float16, None),
    Setting("float32 under bfloat16 autocast", torch.float32, torch.bfloat16),
    Setting("float32 under float16 autocast", torch.float32, torch.float16),
)


def draw(n: int, d: int, *, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two views of one signal, float64 on the CPU, in multiples of 1/16 below 4: no dtype rounds them.

    Nor are they rounded where whole numbers up to 2 are added.
    """
    generator = torch.Generator().manual_seed(10_007 * seed + 101 * n + d)
    signal, *noises = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    z1, z2 = ((16 * (signal + noise * other)).round().clamp(-63, 63) / 16 for other in noises)
    return z1, z2


def on(device: torch.device, setting: Setting, *views: Tensor) -> tuple[Tensor, ...]:
    """The views on the device in the setting's dtype."""
    return tuple(view.to(device, setting.views) for view in views)


def autocast(setting: Setting):
    return nullcontext() if setting.autocast is None else torch.autocast("cuda", setting.autocast)


def terms(setting: Setting, *views: Tensor, **settings):
    """The loss and its sums as a training loop under this setting would call for them."""
    with autocast(setting):
        return barlow_loss.barlow_twins_loss(*views, return_terms=True, **settings)


def evaluate(setting: Setting, *views: Tensor, **settings) -> Evaluation:
    """The loss, its terms, and its gradients in float64; the views are used with the strides they have."""
    leaves = [view.detach().requires_grad_() for view in views]
    found = terms(setting, *leaves, **settings)
    gradients = torch.autograd.grad(setting.scale * found.loss, leaves)
    for view, gradient in zip(views, gradients, strict=True):
        assert gradient.dtype == view.dtype
    assert all(term.dtype == setting.compute for term in found)
    return Evaluation(*(term.detach() for term in found), tuple(g.double() / setting.scale for g in gradients))


def exact(z1: Tensor, z2: Tensor, **settings):
    """``comparison.truth`` of the numbers, on the CPU."""
    return truth(z1.cpu(), z2.cpu(), **settings)


def loss_budget(setting: Setting, expected) -> float:
    if setting.half:
        return UNIT * float(expected.loss)
    return expected.value_budget({torch.float64: 1e-12, torch.float32: 2e-6}[setting.compute], setting.compute)


def gradient_budget(setting: Setting, expected, view: int) -> float:
    """By norm.

    Two samples correlate fully, so that next to nothing is left of their gradient, and every term of it is rounded.
    """
    gradient = expected.gradients[view]
    if setting.half:
        products = UNIT * (2 * float(gradient.norm()) if len(gradient) > 2 else expected.gradient_conditions[view])
    else:
        tol = {torch.float64: 1e-10, torch.float32: 1e-5}[setting.compute]
        products = expected.gradient_budget(view, tol, setting.compute)
    return products + rounding(setting, gradient)


def rounding(setting: Setting, gradient: Tensor) -> float:
    """What rounding to the dtype of the views may cost: half its eps of the norm, half its least number an element."""
    if setting.views.itemsize > 2:
        return 0.0
    info = torch.finfo(setting.views)
    smallest = info.smallest_normal * info.eps / setting.scale
    return info.eps / 2 * float(gradient.norm()) + smallest / 2 * gradient.numel() ** 0.5


def assert_exact(setting: Setting, got: Evaluation, expected, what: str = "") -> None:
    """Loss and gradients are those of ``expected`` within the setting's budgets."""
    near(got.loss, expected.loss, loss_budget(setting, expected), f"{what} loss")
    for view in (0, 1):
        budget = gradient_budget(setting, expected, view)
        near(got.gradients[view], expected.gradients[view], budget, f"{what} gradient of z{view + 1}")


def near(got: Tensor, expected: Tensor | float, budget: float, what: str) -> None:
    """|got − expected| ≤ budget by norm; NaN fails."""
    error = distance(got, expected)
    assert error <= budget, f"{what}: error {error:.3e} is above the budget {budget:.3e}"


def distance(got: Tensor, expected: Tensor | float) -> float:
    return float((got.double().cpu() - torch.as_tensor(expected, dtype=torch.float64).cpu()).norm())
