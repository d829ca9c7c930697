"""What the command lines of evaluation and transfer have in common."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from barlow_recipes import distributed
from barlow_recipes.encoders import STEMS
from barlow_recipes.errors import UsageError
from barlow_recipes.flags import Flags, at_least, find_device, own_cores
from barlow_recipes.labelled import Reading

PRECISIONS = ("fp32", "bf16")
RANDOM = "random"  # in the place of a file of weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags that every program has, complete."""

    data: Path
    weights: str
    arch: str | None
    stem: str | None
    image_size: int
    batch_size: int
    device: torch.device
    precision: str
    workers: int
    loader_timeout: int
    seed: int
    out: Path | None
    overwrite: bool
    resume: str | None

    @property
    def reading(self) -> Reading:
        return Reading(self.image_size, self.batch_size, self.workers, self.loader_timeout, self.device.type == "cuda")

    def shaping(self) -> dict[str, Any]:
        """What decides about the results, beside the images and the weights."""
        names = ("image_size", "batch_size", "precision", "seed")
        return {name: getattr(self, name) for name in names}


def add_options(parser: Flags, batch_size: int | None = None) -> None:
    """Add them; with no default for the batch size where a preset gives it."""
    add, whole, positive = parser.add, partial(at_least, 0, int), partial(at_least, 1, int)
    add("--data", Path, "folder with the images in train/ and val/, one folder per class", required=True)
    text = "the encoder: a checkpoint or a state_dict, or 'random' for an untrained one"
    add("--weights", str, text, required=True, metavar="FILE")
    add("--arch", str, "of the encoder [as FILE has it; of a random one: resnet50]")
    add("--stem", str, "of a ResNet: imagenet, or cifar for images of 32 pixels [as FILE has it]")
    add("--image-size", partial(at_least, 8, int), "side of the square that the encoder sees", default=224)
    add("--batch-size", positive, "images in a step, of all processes together", default=batch_size)
    add("--device", str, "cpu, cuda, cuda:1, ... [the accelerator, if there is one]")
    add("--precision", str, "fp32 as published, or autocast to bf16", default="fp32")
    add("--workers", whole, "processes that decode for each that trains", default=min(8, own_cores()))
    add("--loader-timeout", positive, "seconds that a batch may take to be read", default=120, metavar="SECONDS")
    add("--seed", whole, "of the classifier's first weights, of order and crops", default=0)
    add("--out", Path, "folder for the results [runs/NAME, numbered if taken]")
    parser.switch("--overwrite", "replace the results in that folder")
    resuming = "continue from a checkpoint; 'auto' or nothing: from the one in the output folder, if there is one"
    add("--resume", str, resuming, nargs="?", const="auto", metavar="PATH")


def read_options(flags: dict[str, Any]) -> Options:
    """Check them, and find the device.

    Raises:
        UsageError: a flag has a bad value.
    """
    for name, known in {"precision": PRECISIONS, "stem": (None, *STEMS)}.items():
        if flags[name] not in known:
            raise UsageError(f"--{name} {flags[name]}: expected {' or '.join(filter(None, known))}")
    if flags["batch_size"] < (processes := distributed.world_size()):
        raise UsageError(f"--batch-size {flags['batch_size']}: expected {processes} or more, an image for each process")
    values = {name: flags[name] for name in Options.__dataclass_fields__}
    return Options(**values | {"device": find_device(flags["device"])})
