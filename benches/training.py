"""The section "training": a whole training step before and after the textbook loss is replaced by ours.

``WHOLE``: ResNet-50 at 224 pixels, the projector 8192-8192-8192, LARS. A step is the sum of its parts, forward and
backward: both views through the backbone, as chunks that fit this machine's memory; through the projector as a whole
batch; the optimiser; and each loss. ``ALONE``: the projector, as when features were computed before, in real steps. The
loss's share is its time over that of the step. FLOP model, 2·3·MACs: backbone 4.1 GMACs a view, projector 151 MMACs.

As a program it tells what ``--chunk-size`` of the recipes costs and saves: a step of a ResNet-18 on small images, whole
batches beside chunks in turns, each in a process of its own. Its memory is the most that the process has held in the
step, above what it held before: weights, momenta and images are there by then. Medians are told.

    python benches/training.py                                            # ten minutes, 20 GB
    python benches/training.py --batch-size 256 --chunk-size 32 --rounds 1
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss
from barlow_recipes.models import build_model
from barlow_recipes.optimization import build_optimizer
from contenders import OURS, TEXTBOOK, build
from measure import Cell, Record, Turn, all_cores, checked_turns, interleave, spread, wall

WHOLE, ALONE = "ResNet-50 and projector", "projector alone"
TIMED_CHUNKS = 3
FEATURES = 2048  # of ResNet-50
RATES = {"lr_weights": 0.4, "lr_biases": 0.0048, "weight_decay": 1e-6}


class Sizes(NamedTuple):
    """Of both records. With a batch of 256 as well the backbone takes three quarters of a minute."""

    batch_size: int = 64
    projector_batch_size: int = 256
    image_size: int = 224
    width: int = 8192
    chunk: int = 16


def training(sizes: Sizes, rounds: int) -> list[Record]:
    torch.manual_seed(0)
    with all_cores():
        model: Any = build_model("resnet50", "-".join([str(sizes.width)] * 3)).to(memory_format=torch.channels_last)
        return [_with_backbone(model, sizes, rounds), _projector_alone(model.projector, sizes, rounds)]


def _with_backbone(model: Any, sizes: Sizes, rounds: int) -> Record:
    cell = Cell(sizes.batch_size, sizes.width)
    images = torch.randn(sizes.chunk, 3, sizes.image_size, sizes.image_size).to(memory_format=torch.channels_last)
    chunks = -(-2 * cell.n // sizes.chunk)
    turn = partial(_forward_and_backward, model.backbone, images)
    turn()
    backbone = chunks * statistics.median(wall(turn) for _ in range(min(chunks, TIMED_CHUNKS)))
    parts = {"backbone": backbone, **_parts(model.projector, model, cell.n)}
    losses = interleave(checked_turns(cell, (OURS, TEXTBOOK), *cell.views()), rounds, math.inf)
    steps = {name: [sum(parts.values()) + loss for loss in own] for name, own in losses.items()}
    record = _record(WHOLE, cell, parts, losses, steps)
    return record | {"image_size": sizes.image_size, "chunks": [chunks, sizes.chunk]}


def _projector_alone(projector: nn.Module, sizes: Sizes, rounds: int) -> Record:
    cell = Cell(sizes.projector_batch_size, sizes.width)
    features = _features(cell.n)
    with torch.no_grad():
        embeddings = [projector(view) for view in features]
    turns = checked_turns(cell, (OURS, TEXTBOOK), *(z.requires_grad_() for z in embeddings))
    parts, losses = _parts(projector, projector, cell.n), interleave(turns, rounds, math.inf)
    optimizer = build_optimizer("lars", projector, batch_size=cell.n, **RATES)
    steps: dict[str, Turn] = {
        name: partial(_training_step, projector, optimizer, build(name, cell.d), features) for name in turns
    }
    return _record(ALONE, cell, parts, losses, interleave(steps, rounds, math.inf))


def _parts(projector: nn.Module, model: nn.Module, batch_size: int) -> dict[str, float]:
    """Seconds of both views through the projector, and of the optimiser; the first time sets up what is kept."""
    optimizer = build_optimizer("lars", model, batch_size=batch_size, **RATES)
    turns = [partial(_forward_and_backward, projector, view) for view in _features(batch_size)]
    for turn in (turns[0], optimizer.step):
        turn()
    return {"projector": sum(map(wall, turns)), "optimizer": wall(optimizer.step)}


def _record(
    what: str, cell: Cell, parts: dict[str, float], losses: dict[str, list[float]], steps: dict[str, list[float]]
) -> Record:
    medians = {name: statistics.median(own) for name, own in steps.items()}
    spreads = {name: spread(own) for name, own in losses.items()}
    where = {"what": what, "batch_size": cell.n, "image_size": None, "projector": cell.d, "parts": parts}
    effort = {"threads": torch.get_num_threads(), "rounds": len(losses[OURS])}
    shares = {name: own["median"] / medians[name] for name, own in spreads.items()}
    found = {"losses": spreads, "steps": medians, "shares": shares, "speed_up": medians[TEXTBOOK] / medians[OURS]}
    return {**where, **effort, **found}


def _training_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, views: list[Tensor]) -> None:
    optimizer.zero_grad()
    loss(*(model(view) for view in views)).backward()
    optimizer.step()


def _features(batch_size: int) -> list[Tensor]:
    return [view.detach() for view in Cell(batch_size, FEATURES).views()]


def _forward_and_backward(module: nn.Module, views: Tensor) -> None:
    out = module(views)
    out.backward(torch.ones_like(out))


def in_chunks(stem: str, batch_size: int, chunks: int) -> tuple[float, float]:
    """Seconds of a step with so many chunks, and the MB that it held; in a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model("resnet18", "2048-2048-2048", stem).train()
    model.chunks = chunks
    optimizer = build_optimizer("sgd", model, batch_size=256, lr_weights=0.1, lr_biases=0.1, weight_decay=0.0)
    views = torch.rand(2, batch_size, 3, 32, 32)
    turn = partial(_training_step, model, optimizer, BarlowTwinsLoss())
    turn(list(views[:, : 4 * chunks]))  # momenta are there, and libraries loaded
    before = psutil.Process().memory_info().rss
    seconds = wall(partial(turn, list(views)))
    return seconds, (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What --chunk-size costs and saves; see the head of this file.")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    counts = (1, -(-options.batch_size // options.chunk_size))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for stem in ("imagenet", "cifar"):
            jobs = [(stem, options.batch_size, count) for _ in range(options.rounds) for count in counts]
            found = fresh.starmap(in_chunks, jobs, chunksize=1)
            for i, count in enumerate(counts):
                seconds, held = map(statistics.median, zip(*found[i::2], strict=True))
                print(f"{stem}, chunks: {count}: {held:,.0f} MB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
