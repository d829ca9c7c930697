"""The command line of the transfer to detection: every flag, and what it checks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from barlow_recipes import distributed
from barlow_recipes.detection.data import find_layout
from barlow_recipes.detection.models import NECKS
from barlow_recipes.detection.recipes import (
    ANCHOR_SIZES,
    ANCHORS_PER_IMAGE,
    CANDIDATES,
    COCO,
    PRECISE_BATCHES,
    PROPOSALS,
    ROIS_PER_IMAGE,
    VOC,
    DetectionRecipe,
)
from barlow_recipes.encoders import STEMS
from barlow_recipes.errors import UsageError
from barlow_recipes.flags import Flags, at_least, find_device, own_cores

CHOICES = {"neck": NECKS, "precision": ("fp32", "bf16"), "stem": (*STEMS, None)}
ROI_SIZES = {"c4": 14, "fpn": 7}
# What may differ between a run and its continuation: where it runs, what it writes. Everything else shapes the weights.
FREE = {
    "data", "weights", "device", "workers", "loader_timeout", "test_short_side", "evaluate_every", "save_every", "out",
    "overwrite", "resume",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The flags, complete."""

    data: Path
    layout: str  # "voc" or "coco"
    weights: str
    arch: str | None
    stem: str | None
    neck: str
    freeze_backbone: bool
    iterations: int
    batch_size: int
    learning_rate: float
    milestones: tuple[int, ...]
    warmup: int
    warmup_factor: float
    momentum: float
    weight_decay: float
    short_side: tuple[int, ...]
    test_short_side: int
    max_side: int
    anchor_sizes: tuple[int, ...]
    anchors_per_image: int
    rois_per_image: int
    candidates: tuple[int, int]
    proposals: tuple[int, int]
    roi_size: int
    fpn_channels: int
    precise_batches: int
    evaluate_every: int | None
    save_every: int
    device: torch.device
    precision: str
    workers: int
    loader_timeout: int
    seed: int
    out: Path | None
    overwrite: bool
    resume: str | None

    def shaping(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint, as they stand in JSON."""
        kept = {name: value for name, value in asdict(self).items() if name not in FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    def notes(self) -> list[str]:
        """How the run departs from the published one because of another flag."""
        recipe = RECIPES[self.layout]
        notes = []
        if self.batch_size != recipe.batch_size and self.learning_rate == scaled_rate(recipe, self.batch_size):
            notes.append(
                f"learning rate {self.learning_rate:g}: the published {recipe.learning_rate:g} of a batch of "
                f"{recipe.batch_size}, scaled to {self.batch_size}"
            )
        if self.iterations != recipe.iterations:
            notes.append(
                f"{self.iterations:,} iterations for the published {recipe.iterations:,}: milestones "
                f"{', '.join(map(str, self.milestones)) or 'none'}, warm-up {self.warmup}"
            )
        return notes


RECIPES = {"voc": VOC, "coco": COCO}


def _parser(description: str) -> Flags:
    parser = Flags(description)
    add, switch = parser.add, parser.switch
    whole, positive = partial(at_least, 0, int), partial(at_least, 1, int)
    side, real = partial(at_least, 32, int), partial(at_least, 0.0, float)
    add("--data", Path, "folder with VOC2007/ and VOC2012/, or with annotations/, train2017/ and val2017/")
    add("--weights", str, "what the encoder has learned: a file or a run's folder, or 'random'")
    add("--arch", str, "encoder: a ResNet [found in the weights]")
    add("--stem", str, "its first layers: imagenet or cifar [found in the weights]")
    add("--neck", str, "c4, as published: layer4 sees each region; or fpn: a feature pyramid", default="c4")
    switch("--freeze-backbone", "nothing pretrained learns, and its batch norms keep their statistics")
    add("--iterations", positive, "steps [VOC 24,000, COCO 90,000]")
    add("--batch-size", positive, "images in a step, of all processes together [16]")
    add("--learning-rate", real, "[VOC 0.1, COCO 0.03, per 16 images]", metavar="LR")
    text = "iterations after which the rate is divided by 10 [VOC 18,000 and 22,000, COCO 60,000 and 80,000]"
    add("--milestones", whole, text, nargs="*")
    add("--warmup", whole, "iterations of linear warm-up [1000 in the published run, shorter in a shorter one]")
    add("--warmup-factor", real, "of the first iteration's rate [VOC 0.333, COCO 0.001]")
    add("--momentum", real, "of SGD [0.9]")
    add("--weight-decay", real, "but for batch norms [0.0001]")
    add(
        "--short-side",
        side,
        "of a training image, in pixels; one of them is drawn [VOC 480-800, COCO 640-800]",
        nargs="+",
    )
    add("--test-short-side", side, "of an image in the test [800, or the last of --short-side, if that is given]")
    add("--max-side", side, "no longer than this [1333]")
    add("--anchor-sizes", positive, "sides of the anchors in pixels", nargs="+", default=ANCHOR_SIZES)
    add("--anchors-per-image", positive, "for regions to be proposed from", default=ANCHORS_PER_IMAGE)
    add("--rois-per-image", positive, "regions of an image to learn from", default=ROIS_PER_IMAGE)
    text = "likeliest regions of an image (with fpn, of a level) before overlaps are removed, in training and test"
    add("--candidates", positive, text, nargs=2, default=CANDIDATES, metavar=("TRAIN", "TEST"))
    text = "of them left, in training and test"
    add("--proposals", positive, text, nargs=2, default=PROPOSALS, metavar=("TRAIN", "TEST"))
    add("--roi-size", positive, "pixels of a region's side [14 with c4, 7 with fpn]")
    add("--fpn-channels", positive, "of the feature pyramid and its heads", default=256)
    text = "training batches, at most, by which batch norms are measured again before a test; 0: as training left them"
    add("--precise-batches", whole, text, default=PRECISE_BATCHES)
    add("--evaluate-every", positive, "iterations from one test to the next [at the end alone]", metavar="ITERATIONS")
    add("--save-every", positive, "iterations from one checkpoint to the next", default=1000, metavar="ITERATIONS")
    add("--device", str, "cpu, cuda, cuda:1, ... [the accelerator, if there is one]")
    add("--precision", str, "fp32, or bf16 for the encoder's stages", default="fp32")
    add("--workers", whole, "processes that read for each that trains", default=min(8, own_cores()))
    add("--loader-timeout", positive, "seconds that a batch may take to be read", default=120, metavar="SECONDS")
    add("--seed", whole, "of new layers, order, flips and regions", default=0)
    add("--out", Path, "folder for the results [runs/NAME, numbered if taken]")
    switch("--overwrite", "replace the run in that folder")
    resuming = "continue from a checkpoint; 'auto' or nothing: from the one in the output folder, if there is one"
    add("--resume", str, resuming, nargs="?", const="auto", metavar="PATH")
    return parser


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None), and fill in what is published for the layout.

    Raises:
        UsageError: a flag is unknown or has a bad value, or the folder has neither layout.
    """
    flags = vars(_parser(description).parse_args(argv))
    for name in ("data", "weights"):
        if flags[name] is None:
            raise UsageError(f"--{name}: expected, and not given (--help lists the flags)")
    flags["layout"] = find_layout(flags["data"])
    for name, known in CHOICES.items():
        if flags[name] not in known:
            names = " or ".join(str(choice) for choice in known if choice)
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]}: expected {names}")
    _fill_in(flags, RECIPES[flags["layout"]])
    flags["roi_size"] = flags["roi_size"] or ROI_SIZES[flags["neck"]]
    flags |= {
        name: tuple(flags[name]) for name in ("milestones", "short_side", "anchor_sizes", "candidates", "proposals")
    }
    if flags["batch_size"] < distributed.world_size():
        raise UsageError(
            f"--batch-size {flags['batch_size']}: expected {distributed.world_size()} or more, an image per process"
        )
    sides = [*flags["short_side"], flags["test_short_side"]]
    if max(sides) > flags["max_side"]:
        raise UsageError(f"--max-side {flags['max_side']}: expected no less than the short side, {max(sides)}")
    flags["device"] = find_device(flags["device"])
    return Settings(**{field.name: flags[field.name] for field in fields(Settings)})


def _fill_in(flags: dict[str, Any], recipe: DetectionRecipe) -> None:
    """What is not given is as published; in a shorter run milestones and warm-up move with its end."""
    length = (flags["iterations"] or recipe.iterations) / recipe.iterations
    size = flags["batch_size"] or recipe.batch_size
    shrunk = {
        "milestones": [round(milestone * length) for milestone in recipe.milestones],
        "warmup": round(recipe.warmup * min(length, 1.0)),
        "learning_rate": scaled_rate(recipe, size),
    }
    if flags["test_short_side"] is None and flags["short_side"]:
        flags["test_short_side"] = flags["short_side"][-1]
    for name, value in (asdict(recipe) | shrunk).items():
        flags[name] = value if flags[name] is None else flags[name]


def scaled_rate(recipe: DetectionRecipe, batch_size: int) -> float:
    return recipe.learning_rate * batch_size / recipe.batch_size
