"""The section "training": a whole training step before and after the textbook loss is replaced by ours.

``WHOLE``: ResNet-50 at 224 pixels, the projector 8192-8192-8192, LARS. Forward and backward of both views through the
backbone, in chunks of images that fit this machine's memory: the median of three, times their number; through the
projector with the whole batch; the optimiser; and each loss, forward and backward. A step is the sum of these.

``ALONE``: the projector, as when features were computed before. Real steps are timed, each with both views through the
projector, the loss, backward and the optimiser, with ours and with the textbook formula in turns, round by round. Its
parts are measured apart.

The loss's share is its time over that of the step; ``speed_up`` is the textbook's step over ours. Both losses are held
to float64 on the same embeddings before anything is timed.

On a GPU, or with the memory for it, ``python examples/imagenet_pretrain.py --profile`` times the parts of real steps.

FLOP model, forward + backward, 2·3·MACs: backbone 4.1 GMACs a view, projector 151 MMACs a view, the loss 8·N²·D.

    python benches/training_step.py                        batches of 256, under three minutes on two cores
    python benches/training_step.py --batch-size 32 --image-size 64 --projector 2048 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from barlow_recipes.models import build_model
from barlow_recipes.optimization import build_optimizer
from baselines import OURS, TEXTBOOK, build
from machine import all_cores
from timing import interleave, ratios, spread, time_calls
from workload import Cell, check, errors, step, truth

if TYPE_CHECKING:
    from timing import Turn

    Record = dict[str, Any]

WHOLE = "ResNet-50 and projector"
ALONE = "projector alone"
TIMED_CHUNKS = 3
FEATURES = 2048  # of ResNet-50


@dataclass(frozen=True)
class Sizes:
    """Of both records. With a batch of 256 as well the backbone takes three quarters of a minute."""

    batch_size: int = 64
    projector_batch_size: int = 256
    image_size: int = 224
    width: int = 8192
    chunk: int = 16


def training(sizes: Sizes, rounds: int) -> list[Record]:
    """The section, on all cores."""
    with all_cores():
        return records(sizes, rounds)


def records(sizes: Sizes, rounds: int) -> list[Record]:
    """Both records, on the threads that torch has: with the backbone, and the projector alone.

    Raises:
        AssertionError: a loss is wrong.
    """
    torch.manual_seed(0)
    width = sizes.width
    model = build_model("resnet50", f"{width}-{width}-{width}").to(memory_format=torch.channels_last)
    return [
        with_backbone(model.backbone, model.projector, sizes, rounds),
        projector_alone(model.projector, sizes, rounds),
    ]


def with_backbone(backbone: nn.Module, projector: nn.Module, sizes: Sizes, rounds: int) -> Record:
    """A step as the sum of its parts."""
    batch_size, chunk = sizes.batch_size, sizes.chunk
    images = torch.randn(chunk, 3, sizes.image_size, sizes.image_size).to(memory_format=torch.channels_last)
    turns = checked_losses(*Cell(batch_size, sizes.width).views())
    chunks = -(-2 * batch_size // chunk)
    turn = partial(forward_and_backward, backbone, images)
    turn()
    parts = {"backbone": chunks * spread([time_calls(turn) for _ in range(min(chunks, TIMED_CHUNKS))])["median"]}
    parts["projector"] = time_projector(projector, features(batch_size))
    parts["optimizer"] = time_optimizer(lars(nn.ModuleList([backbone, projector]), batch_size))
    times = interleave(turns, rounds, math.inf)
    rest = sum(parts.values())
    found = compared(times, {name: [rest + loss for loss in own] for name, own in times.items()})
    return {
        "what": WHOLE,
        "batch_size": batch_size,
        "image_size": sizes.image_size,
        "projector": sizes.width,
        "chunks": [chunks, chunk],
        "parts": parts,
        **found,
    }


def projector_alone(projector: nn.Module, sizes: Sizes, rounds: int) -> Record:
    """Real steps from features that were computed before."""
    batch_size = sizes.projector_batch_size
    views = features(batch_size)
    optimizer = lars(projector, batch_size)
    with torch.no_grad():
        z1, z2 = (projector(view) for view in views)
    turns = checked_losses(z1.requires_grad_(), z2.requires_grad_())
    parts = {"projector": time_projector(projector, views), "optimizer": time_optimizer(optimizer)}
    times = interleave(turns, rounds, math.inf)
    steps: dict[str, Turn] = {
        name: partial(training_step, projector, optimizer, build(name, sizes.width), views) for name in turns
    }
    return {
        "what": ALONE,
        "batch_size": batch_size,
        "image_size": None,
        "projector": sizes.width,
        "parts": parts,
        **compared(times, interleave(steps, rounds, math.inf)),
    }


def compared(losses: dict[str, list[float]], steps: dict[str, list[float]]) -> Record:
    """Before and after replacing the loss, from the rounds' seconds of losses and of whole steps."""
    medians = {name: spread(own)["median"] for name, own in steps.items()}
    spreads = {name: spread(own) for name, own in losses.items()}
    return {
        "threads": torch.get_num_threads(),
        "rounds": len(losses[OURS]),
        "losses": spreads,
        "steps": medians,
        "shares": {name: own["median"] / medians[name] for name, own in spreads.items()},
        "textbook_over_ours": ratios(losses, OURS)[TEXTBOOK],
        "speed_up": medians[TEXTBOOK] / medians[OURS],
    }


def checked_losses(z1: Tensor, z2: Tensor) -> dict[str, Turn]:
    """A turn of each loss; raises where it is not that of these embeddings, or has another gradient."""
    cell = Cell(*z1.shape)
    right = truth(z1, z2)
    turns: dict[str, Turn] = {}
    for name in (OURS, TEXTBOOK):
        loss = build(name, cell.d)
        check(name, cell, errors(step(loss, z1, z2), right))
        turns[name] = partial(step, loss, z1, z2)
    return turns


def training_step(projector: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, views: list[Tensor]) -> None:
    optimizer.zero_grad()
    loss(*(projector(view) for view in views)).backward()
    optimizer.step()


def features(batch_size: int) -> list[Tensor]:
    """Of both views, as a backbone would give them."""
    return [view.detach() for view in Cell(batch_size, FEATURES).views()]


def lars(module: nn.Module, batch_size: int) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = build_optimizer(
        "lars", module, batch_size=batch_size, lr_weights=0.4, lr_biases=0.0048, weight_decay=1e-6
    )
    return optimizer


def time_projector(projector: nn.Module, views: list[Tensor]) -> float:
    """Seconds of both views, forward and backward; the first time sets up what is kept."""
    forward_and_backward(projector, views[0])
    return sum(time_calls(partial(forward_and_backward, projector, view)) for view in views)


def time_optimizer(optimizer: torch.optim.Optimizer) -> float:
    """Seconds of a step, with the gradients of before; the first one makes the momenta."""
    optimizer.step()
    return time_calls(optimizer.step)


def forward_and_backward(module: nn.Module, views: Tensor) -> None:
    out = module(views)
    out.backward(torch.ones_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step and the loss in it; see the head of this file.")
    parser.add_argument("--batch-size", type=int, default=256, help="of both records (default: 256)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--projector", type=int, default=8192, help="width of its three layers")
    parser.add_argument("--chunk", type=int, default=16, help="images in the backbone at a time")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    sizes = Sizes(flags.batch_size, flags.batch_size, flags.image_size, flags.projector, flags.chunk)
    print(json.dumps(records(sizes, flags.rounds), indent=2))


if __name__ == "__main__":
    main()
