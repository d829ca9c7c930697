"""The published optimisation: LARS on the weights, a plain step on biases and norms, warm-up and cosine."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR

# The author's learning rates of the weights by batch size (300 epochs); a small batch wants more, not less.
PUBLISHED_LEARNING_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}


def published_learning_rate(batch_size: int) -> float:
    """The author's learning rate of the weights; linear in log(batch size) between its rows, constant outside."""
    sizes, rates = zip(*PUBLISHED_LEARNING_RATES.items(), strict=True)
    return float(np.interp(math.log2(batch_size), np.log2(sizes), rates))


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    r"""What multiplies every group's base rate (batch/256 × its learning rate) in a step.

    .. math::
        t/w \text{ for } t < w, \qquad
        q + 0.001\,(1 - q) \text{ after, with } q = \tfrac12 (1 + \cos(\pi (t - w)/(T - w)))

    Args:
        step: t, from 0.
        steps: T, of the whole run.
        warmup_steps: w; the first step of a warm-up has rate 0.

    Source: ``adjust_learning_rate`` of facebookresearch/barlowtwins.
    """
    if step < warmup_steps:
        return step / warmup_steps
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
    return q + 0.001 * (1 - q)


def parameter_groups(
    model: nn.Module, lr_weights: float, lr_biases: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices and kernels; and vectors (biases, norms), which get no weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr_weights, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "lr": lr_biases, "weight_decay": 0.0},
    ]


OPTIMIZERS = ("lars", "sgd", "adamw")


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    batch_size: int,
    lr_weights: float,
    lr_biases: float,
    weight_decay: float,
    trust_coefficient: float = 0.001,
    clip_trust: bool = False,
) -> optim.Optimizer:
    """LARS as published, without adaptation of vectors; SGD with momentum; or AdamW. Rates are times batch/256."""
    base = batch_size / 256
    groups = parameter_groups(model, base * lr_weights, base * lr_biases, weight_decay)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=base * lr_weights, trust_coefficient=trust_coefficient, clip=clip_trust)
    if name == "sgd":
        return optim.SGD(groups, momentum=0.9)
    return optim.AdamW(groups)


def build_schedule(optimizer: optim.Optimizer, steps: int, warmup_steps: int) -> LambdaLR:
    """The published schedule, to be advanced after every step."""
    return LambdaLR(optimizer, partial(learning_rate_factor, steps=steps, warmup_steps=warmup_steps))


class LARS(optim.Optimizer):
    r"""Layer-wise adaptive rate scaling.

    .. math::
        d = g + \beta p, \qquad
        q = \eta \|p\| / \|d\| \text{ (1 if either norm is 0)}, \qquad
        \mu \leftarrow m\,\mu + q\,d, \qquad
        p \leftarrow p - \text{lr}\;\mu

    A group with ``adapt`` False has q = 1. It is written here because the libraries' versions divide by
    ‖g‖ + β‖p‖, which is 3.9e-6 away after 50 steps, too far to tell an equivalent run from another one.

    Args:
        params: tensors or groups, as for every optimiser of torch.
        lr: the learning rate.
        weight_decay: β.
        momentum: m.
        trust_coefficient: η.
        clip: replace q by min(q / lr, 1), so that no step is longer than a plain one (solo-learn's CIFAR runs).
        adapt: whether q is used at all.

    Source: ``LARS`` in ``main.py`` of facebookresearch/barlowtwins; You et al. (2017), arXiv 1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient, "clip": clip, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            mu = [self.state[p]["mu"] for p in params]
            d = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(d, _ratios(params, d, group["trust_coefficient"], group["lr"], group["clip"]))
            torch._foreach_mul_(mu, group["momentum"])
            torch._foreach_add_(mu, d)
            torch._foreach_add_(params, mu, alpha=-group["lr"])


def _ratios(p: list[Tensor], d: list[Tensor], eta: float, lr: float, clip: bool) -> list[Tensor]:
    """Q of every parameter, computed where they are: nothing is read back."""
    p_norm, d_norm = torch.stack(torch._foreach_norm(p)), torch.stack(torch._foreach_norm(d))
    q = eta * p_norm / d_norm
    if clip:
        q = (q / lr if lr > 0 else torch.ones_like(q)).clamp(max=1)
    return list(torch.where((p_norm > 0) & (d_norm > 0), q, 1.0).unbind())
