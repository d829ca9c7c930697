"""The loss's share of a whole training step: ResNet-50 at 224 pixels, projector 8192-8192-8192, batch 256, LARS.

Forward and backward of both views through the backbone, in chunks of images that fit this machine's memory, all of
them run and added up; through the projector with the whole batch; the loss, forward and backward; and the optimiser.
Ours and the textbook formula take turns on the same embeddings, round by round.

On a GPU, or with the memory for it, ``python examples/imagenet_pretrain.py --profile`` times the same parts of real
steps.

FLOP model, forward + backward, 2·3·MACs: backbone 4.1 GMACs a view, projector 151 MMACs a view, the loss 8·N²·D.

    python benches/training_step.py                        about five minutes on two cores
    python benches/training_step.py --batch-size 32 --image-size 64 --projector 2048 --rounds 1 --out /tmp
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baselines import OURS, TEXTBOOK, build
from compare import RESULTS, environment, ratios, spread
from workload import step

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from pretraining.models import build_model
from pretraining.optimization import build_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.03  # the loss's share of a step, at most


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward_and_backward(module: torch.nn.Module, views: Tensor) -> None:
    out = module(views)
    out.backward(torch.ones_like(out))


def measure(batch_size: int, image_size: int, width: int, chunk: int, rounds: int) -> dict[str, Any]:
    """Seconds of every part of a step, and of both losses in every round."""
    torch.manual_seed(0)
    model = build_model("resnet50", f"{width}-{width}-{width}").to(memory_format=torch.channels_last)
    rates = {"lr_weights": 0.4, "lr_biases": 0.0048, "weight_decay": 1e-6}
    optimizer = build_optimizer("lars", model, batch_size=batch_size, **rates)
    images = torch.randn(chunk, 3, image_size, image_size).to(memory_format=torch.channels_last)
    features = torch.randn(2, batch_size, 2048)
    z1, z2 = (torch.randn(batch_size, width).requires_grad_() for _ in range(2))
    losses = {name: build(name, width) for name in (OURS, TEXTBOOK)}
    for warm_up in (partial(forward_and_backward, model.backbone, images[:2]), optimizer.step):
        warm_up()
    for loss in losses.values():
        step(loss, z1, z2)
    chunks = -(-2 * batch_size // chunk)
    parts = {"backbone": sum(seconds(partial(forward_and_backward, model.backbone, images)) for _ in range(chunks))}
    parts["projector"] = sum(seconds(partial(forward_and_backward, model.projector, view)) for view in features)
    parts["optimizer"] = seconds(optimizer.step)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(seconds(partial(step, loss, z1, z2)))
    rest = sum(parts.values())
    found = {name: spread(own) for name, own in times.items()}
    return {
        "batch_size": batch_size,
        "image_size": image_size,
        "projector": width,
        "chunks": [chunks, chunk],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "parts": parts,
        "losses": found,
        "shares": {name: own["median"] / (rest + own["median"]) for name, own in found.items()},
        "textbook_over_ours": ratios(times, OURS)[TEXTBOOK],
    }


def markdown(results: dict[str, Any]) -> str:
    machine, losses, shares = results["environment"], results["losses"], results["shares"]
    chunks, chunk = results["chunks"]
    width = results["projector"]
    lines = [
        "# A training step and the loss in it",
        "",
        f"{machine['cpu']}, {machine['system']}, Python {machine['python']}, torch {torch.__version__}, "
        f"{results['threads']} threads, float32. ResNet-50 at {results['image_size']} pixels, projector "
        f"{width}-{width}-{width}, {results['batch_size']} pairs, LARS.",
        "",
        "| part of a step, forward and backward | s |",
        "| --- | ---: |",
        f"| backbone, both views, in {chunks} chunks of {chunk} | {results['parts']['backbone']:.1f} |",
        f"| projector, both views | {results['parts']['projector']:.2f} |",
        f"| optimiser | {results['parts']['optimizer']:.2f} |",
        f"| loss: ours | {losses[OURS]['median']:.4f} |",
        f"| loss: textbook | {losses[TEXTBOOK]['median']:.3f} |",
        "",
        f"The loss is {100 * shares[OURS]:.3f} % of a step, the textbook's would be {100 * shares[TEXTBOOK]:.2f} %; "
        f"without the backbone (features that were computed before) {100 * without_backbone(results, OURS):.2f} % and "
        f"{100 * without_backbone(results, TEXTBOOK):.1f} %.",
    ]
    return "\n".join(lines) + "\n"


def without_backbone(results: dict[str, Any], name: str) -> float:
    loss, parts = results["losses"][name]["median"], results["parts"]
    return float(loss / (parts["projector"] + parts["optimizer"] + loss))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step's parts; see the head of this file.")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--projector", type=int, default=8192, help="width of its three layers")
    parser.add_argument("--chunk", type=int, default=16, help="images in the backbone at a time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for training_step.json and .md")
    flags = parser.parse_args()
    found = measure(flags.batch_size, flags.image_size, flags.projector, flags.chunk, flags.rounds)
    results = {"environment": environment(), **found}
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "training_step.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = markdown(results)
    (flags.out / "training_step.md").write_text(text, encoding="utf-8")
    print(f"{text}\nWritten to {flags.out / 'training_step.json'} and .md")
    if results["shares"][OURS] > GOAL:
        raise SystemExit(f"expected the loss to be at most {100 * GOAL:g} % of a step")


if __name__ == "__main__":
    main()
