"""Memory and time of a step with ``--chunk-size``: a ResNet-18 on images of 32 pixels, whole batches beside chunks.

Each case runs in a process of its own, on the CPU. Its memory is the most that the process has held in a step, above
what it held before: weights, momenta and images are there by then. Cases take turns; the medians are told.

    python benches/chunks.py                                            # ten minutes, 20 GB
    python benches/chunks.py --batch-size 256 --chunk-size 32 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from barlow_loss import BarlowTwinsLoss
from barlow_recipes.models import build_model
from barlow_recipes.optimization import build_optimizer


def held(name: str) -> float:
    """A line of this process's status, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def measure(stem: str, batch_size: int, chunks: int) -> dict[str, float]:
    """Two steps; the second is timed."""
    torch.manual_seed(0)
    model = build_model("resnet18", "2048-2048-2048", stem).train()
    model.chunks = chunks
    optimizer = build_optimizer("sgd", model, batch_size=256, lr_weights=0.1, lr_biases=0.1, weight_decay=0.0)
    loss_fn = BarlowTwinsLoss()
    views = torch.rand(2, batch_size, 3, 32, 32)
    _step(model, optimizer, loss_fn, views[:, : 4 * chunks])  # momenta are there, and libraries loaded
    before = held("VmRSS")
    began = time.perf_counter()
    _step(model, optimizer, loss_fn, views)
    return {"seconds": time.perf_counter() - began, "megabytes": held("VmHWM") - before}


def _step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_fn: BarlowTwinsLoss, views: torch.Tensor
) -> None:
    z1, z2 = (model(view) for view in views)
    optimizer.zero_grad()
    loss_fn(z1, z2).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stems", nargs="+", default=["imagenet", "cifar"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # stem, batch, chunks: in a process of its own
    options = parser.parse_args()
    if options.one:
        stem, batch_size, chunks = options.one
        print(json.dumps(measure(stem, int(batch_size), int(chunks))))
        return
    for stem in options.stems:
        cases = {"whole": 1, f"chunks of {options.chunk_size}": -(-options.batch_size // options.chunk_size)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, chunks in cases.items():
                command = [sys.executable, __file__, "--one", stem, str(options.batch_size), str(chunks)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout))
        whole, parts = (
            {key: statistics.median(each[key] for each in runs) for key in runs[0]} for runs in found.values()
        )
        for name, medians in zip(cases, (whole, parts), strict=True):
            print(f"{stem}, {name}: {medians['megabytes']:,.0f} MB, {medians['seconds']:.1f} s")
        print(f"{stem}: memory / {whole['megabytes'] / parts['megabytes']:.1f}", end=", ")
        print(f"time x {parts['seconds'] / whole['seconds']:.2f}")


if __name__ == "__main__":
    main()
