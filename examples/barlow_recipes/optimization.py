"""The published optimisation: LARS on the weights, a plain step on biases and norms, warm-up and cosine."""

import math
from functools import partial
from typing import Any

from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes.lars import LARS

# The author's learning rates of the weights by batch size (300 epochs); a small batch wants more, not less.
PUBLISHED_LEARNING_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}


def published_learning_rate(batch_size: int) -> float:
    """The author's learning rate of the weights; linear in log(batch size) between its rows, constant outside."""
    sizes = sorted(PUBLISHED_LEARNING_RATES)
    batch_size = min(max(batch_size, sizes[0]), sizes[-1])
    above = next(size for size in sizes if size >= batch_size)
    if above == batch_size:
        return PUBLISHED_LEARNING_RATES[above]
    below = above // 2
    position = math.log2(batch_size / below)
    return (1 - position) * PUBLISHED_LEARNING_RATES[below] + position * PUBLISHED_LEARNING_RATES[above]


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
