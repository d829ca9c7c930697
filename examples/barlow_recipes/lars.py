"""LARS as the official program has it: momentum on gradients that are scaled by the norm of what they change."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, optim


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
