"""Measure what a pretrained encoder is worth on ImageNet, or on any images in train/ and val/ with class folders.

    python examples/imagenet_evaluate.py --data DIR --weights runs/imagenet-resnet50/backbone.pt
    python examples/imagenet_evaluate.py --data DIR --weights resnet50.pth --protocols semi-1 --lists imagenet_subsets
    python examples/imagenet_evaluate.py --data places205 --weights resnet50.pth --protocols places205
    torchrun --nproc-per-node 8 examples/imagenet_evaluate.py --data DIR --weights FILE

linear: a linear classifier on the frozen encoder. knn: a vote of the 20 nearest training images, without training.
semi-1, semi-10: encoder and classifier fine-tuned on 1 % or 10 % of the labels; which images, SimCLR's 1percent.txt and
10percent.txt say (google-research/simclr, imagenet_subsets/). places205, inaturalist18: linear, with the numbers of
those transfers. All numbers are the published ones, and flags.

Several processes take the steps that one would take. With --resume the same command begins or continues a run. The
results are those of the last epoch, in ``results.json`` and ``metrics.jsonl``; ``classifier-NAME.safetensors`` are its
classifiers, to be loaded by torchvision or timm.

Source: Zbontar et al. (2021), arXiv 2103.03230, and evaluate.py of facebookresearch/barlowtwins; Misra & van der Maaten
(2020), arXiv 1912.01991.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from barlow_recipes import command_line, distributed, folders
from barlow_recipes.errors import UsageError, require
from barlow_recipes.evaluation import PARTS, PROTOCOLS, Run, Settings, find_protocol
from barlow_recipes.images import look_at_some
from barlow_recipes.labelled import load_tree
from barlow_recipes.program import exit_status, start
from barlow_recipes.weights import find_encoder

OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, or --precision bf16"


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(argv), OUT_OF_MEMORY)


def run(argv: Sequence[str] | None) -> None:
    """Index the images, load the encoder, go through the protocols, tell."""
    started = time.perf_counter()
    settings = command_line.read(Settings, argv, __doc__ or "")
    require("safetensors.torch", "the classifiers")  # now, not hours later
    settings.check_pixels()
    wanted: list[str] = [name for name in PROTOCOLS if name in settings.protocols]
    if not wanted:
        raise UsageError(f"--protocols: expected some of {', '.join(PROTOCOLS)}")
    if settings.batch_size < (processes := distributed.world_size()):
        raise UsageError(f"--batch-size {settings.batch_size}: expected {processes} or more, an image for each process")
    device, tree = command_line.find_device(settings.device), load_tree(settings.data)
    for part in (tree.train, tree.validation):
        look_at_some(part, str(part.root), settings)
    trained = {name: find_protocol(name, settings, tree) for name in wanted if name != "knn"}
    torch.manual_seed(settings.seed)
    images = settings.channels, settings.image_size
    encoder = find_encoder(settings.weights, settings.arch, settings.stem, *images)
    if encoder.shape[0] != settings.channels:
        raise UsageError(f"--channels {settings.channels}: {encoder.arch} takes images of {encoder.shape[0]} alone")
    now = Run(settings, device, encoder._replace(module=encoder.module.to(device).eval()), tree, trained)
    default = Path("runs") / f"{tree.name}-evaluation"
    saved = folders.load(folders.find(settings, default), PARTS)
    with folders.opened(settings, default, now.shaping, saved, unit="epoch") as (now.out, now.metrics):
        if saved:
            now.resume(saved.content)
        print(now.introduction())
        for name in [name for name in wanted if name not in now.results]:
            now.finish(name)
        distributed.from_main(now.write_results)
        print("\n" + now.table(), end="\n\n")
        print(f"{time.perf_counter() - started:.0f} seconds. Results: {now.out}")


if __name__ == "__main__":
    start(main)
