"""The published optimisation: LARS on the weights, a plain step on biases and norms, warm-up and cosine."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR

LEARNING_RATE_BIASES, WEIGHT_DECAY = 0.0048, 1e-6  # as published
# The author's learning rates of the weights by batch size (300 epochs); a small batch wants more, not less.
PUBLISHED_LEARNING_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}


def published_learning_rate(batch_size: int) -> float:
    """The author's learning rate of the weights; linear in log(batch size) between its rows, constant outside."""
    sizes, rates = zip(*PUBLISHED_LEARNING_RATES.items(), strict=True)
    return float(np.interp(math.log2(batch_size), np.log2(sizes), rates))


def build_optimizer(
    name: str, net: nn.Module, *, batch_size: int, lr_weights: float, lr_biases: float, weight_decay: float, **lars: Any
) -> optim.Optimizer:
    """LARS as published, SGD or AdamW; rates are times batch/256.

    Vectors, and the single numbers of some networks' gains, do not decay, nor does LARS adapt them. What a part of the
    network names in ``no_weight_decay()``, as timm's do (position embeddings, class tokens), does not decay either.
    """
    base, undecayed = batch_size / 256, _without_decay(net)
    learning = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    matrices = [(name, p) for name, p in learning if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in matrices if name not in undecayed], "weight_decay": weight_decay},
        {"params": [p for _, p in learning if p.ndim <= 1], "lr": base * lr_biases, "weight_decay": 0.0},
        {"params": [p for name, p in matrices if name in undecayed], "weight_decay": 0.0},
    ]
    groups = [{"lr": base * lr_weights} | group for group in groups[: 3 if groups[2]["params"] else 2]]
    require_all(net, groups)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=base * lr_weights, **lars)
    return optim.SGD(groups, momentum=0.9) if name == "sgd" else optim.AdamW(groups)


def _without_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that parts of the network say must not decay."""
    speaking = [(path, part) for path, part in net.named_modules() if callable(getattr(part, "no_weight_decay", None))]
    return {f"{path}.{name}".lstrip(".") for path, part in speaking for name in cast("Any", part).no_weight_decay()}


def require_all(net: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """ValueError: a parameter that requires gradients is in no group, and would never learn, or in more than one."""
    times = Counter(id(parameter) for group in groups for parameter in group["params"])
    learning = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    if wrong := [name for name, parameter in learning.items() if times[id(parameter)] != 1]:
        found = f"{len(wrong)} of {len(learning)} parameters are not, the first is {wrong[0]}"
        raise ValueError(f"groups: expected each parameter that requires gradients in one of them, {found}")


def build_schedule(optimizer: optim.Optimizer, steps: int, warmup_steps: int) -> LambdaLR:
    r"""The published factor of every group's base rate, to be advanced after each of so many steps.

    .. math::
        t/w \text{ for } t < w, \qquad
        q + 0.001\,(1 - q) \text{ after, with } q = \tfrac12 (1 + \cos(\pi (t - w)/(T - w)))

    The first step of a warm-up, t = 0, has rate 0. Source: ``adjust_learning_rate`` of facebookresearch/barlowtwins.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        q = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
        return q + 0.001 * (1 - q)

    return LambdaLR(optimizer, factor)


class LARS(optim.Optimizer):
    r"""Layer-wise adaptive rate scaling.

    .. math::
        d = g + \beta p, \qquad
        q = \eta \|p\| / \|d\| \text{ (1 if either norm is 0)}, \qquad
        \mu \leftarrow m\,\mu + q\,d, \qquad
        p \leftarrow p - \text{lr}\;\mu

    β is ``weight_decay``, m ``momentum`` and η ``trust_coefficient``. ``clip`` replaces q by min(q / lr, 1), so that no
    step is longer than a plain one (solo-learn's CIFAR runs). A group with ``adapt`` False has q = 1. It is written
    here because the libraries' versions divide by ‖g‖ + β‖p‖, which is 3.9e-6 away after 50 steps, too far to tell an
    equivalent run from another one.

    Source: ``LARS`` in ``main.py`` of facebookresearch/barlowtwins; You et al. (2017), arXiv 1708.03888.
    """

    def __init__(self, params: Iterable[Any], lr: float, **changes: Any) -> None:
        usual = {"weight_decay": 0.0, "momentum": 0.9, "trust_coefficient": 0.001, "clip": False, "adapt": True}
        super().__init__(params, {"lr": lr} | usual | changes)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As of every optimiser: a closure computes the gradients anew, and its loss is returned."""
        with torch.enable_grad():
            loss = closure() if closure else None
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
        return loss


def _ratios(p: list[Tensor], d: list[Tensor], eta: float, lr: float, clip: bool) -> list[Tensor]:
    """Q of every parameter, computed where they are: nothing is read back."""
    p_norm, d_norm = torch.stack(torch._foreach_norm(p)), torch.stack(torch._foreach_norm(d))
    q = eta * p_norm / d_norm
    if clip:
        q = (q / lr if lr > 0 else torch.ones_like(q)).clamp(max=1)
    return list(torch.where((p_norm > 0) & (d_norm > 0), q, 1.0).unbind())
