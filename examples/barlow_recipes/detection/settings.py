"""The settings of the transfer to detection: every flag, and what is published for the two layouts.

Sources: Zbontar et al. (2021), arXiv 2103.03230, appendix, transfer learning: iterations, batch, learning rates and
warm-up. The rest is of He et al. (2019): ``detection/configs`` of facebookresearch/moco (VOC's sides and milestones;
batch norms trained, synchronised, and precise in a test; the test's proposals), which stand on detectron2's
``Base-RCNN-C4.yaml`` (the 1× schedule, COCO's sides) and ``config/defaults.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from barlow_recipes.command_line import Positive, Real, RunSettings, Side, Whole, peek, plain, read
from barlow_recipes.errors import UsageError

# What may differ between a run and its continuation: everything else shapes the results.
MAY_CHANGE = (
    "data",
    "weights",
    "device",
    "workers",
    "loader_timeout",
    "save_every",
    "out",
    "overwrite",
    "resume",
)


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The flags; the defaults are those of VOC."""

    data: Path  # folder with VOC2007/ and VOC2012/, or with annotations/, train2017/ and val2017/
    weights: str  # what the encoder has learned: a file or a run's folder, or 'random'
    arch: str | None = None  # encoder: a ResNet; without it found in the weights
    freeze_backbone: bool = False  # nothing pretrained learns, and its batch norms keep their statistics
    iterations: Positive = 24_000  # steps
    batch_size: Positive = 16  # images in a step, of all processes together
    learning_rate: Real = 0.1  # of SGD; the default follows --batch-size
    milestones: tuple[Whole, ...] = (18_000, 22_000)
    "iterations after which the rate is divided by 10; the default follows --iterations"
    warmup: Whole = 1000  # iterations of linear warm-up; the default is shorter in a run with fewer --iterations
    warmup_factor: Real = 0.333  # of the first iteration's rate
    weight_decay: Real = 1e-4  # but for norms
    short_side: tuple[Side, ...] = tuple(range(480, 801, 32))  # of a training image, in pixels; one of them is drawn
    test_short_side: Side | None = None  # of an image in the test; without it the last of --short-side
    anchor_sizes: tuple[Positive, ...] = (32, 64, 128, 256, 512)  # sides of the anchors, in pixels
    anchors_per_image: Positive = 256  # for regions to be proposed from, half of them positive
    rois_per_image: Positive = 512  # regions of an image to learn from, a quarter of them positive
    candidates: tuple[Positive, Positive] = (12_000, 6_000)
    "likeliest regions of an image before overlaps are removed, in training and test"
    proposals: tuple[Positive, Positive] = (2_000, 1_000)  # of them left, in training and test
    precise_batches: Whole = 200
    "training batches, at most, by which batch norms are measured again before a test; 0: as training left them"
    save_every: Positive = 1000  # iterations from one checkpoint to the next
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder's stages

    def must_match(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint, as they stand in JSON."""
        return plain(self, without=MAY_CHANGE)


VOC = Settings(data=tyro.MISSING, weights=tyro.MISSING)
COCO = replace(VOC, iterations=90_000, milestones=(60_000, 80_000), learning_rate=0.03, warmup_factor=0.001)
COCO = replace(COCO, short_side=tuple(range(640, 801, 32)))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags that other flags' defaults follow."""

    data: Path | None = None
    iterations: int | None = None
    batch_size: int | None = None


def find_layout(root: Path) -> str:
    """Recognise a folder as "voc" or "coco", or raise UsageError."""
    for layout, folder in (("voc", "VOC2007"), ("coco", "annotations")):
        if (root / folder).is_dir():
            return layout
    expected = "VOC2007/ (and VOC2012/) of Pascal VOC, or annotations/, train2017/ and val2017/ of COCO"
    raise UsageError(f"--data {root}: expected a folder with {expected}")


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None); what is not given is as published for the layout of --data.

    The rate follows the batch, milestones and warm-up the length.
    """
    asked = peek(Asked, argv)
    recipe = COCO if asked.data and find_layout(asked.data) == "coco" else VOC
    length, whole = asked.iterations or recipe.iterations, recipe.iterations
    milestones = tuple(milestone * length // whole for milestone in recipe.milestones)
    warmup = min(recipe.warmup, recipe.warmup * length // whole)
    rate = recipe.learning_rate * (asked.batch_size or recipe.batch_size) / recipe.batch_size
    default = replace(recipe, milestones=milestones, warmup=warmup, learning_rate=rate)
    return read(Settings, argv, description, default=default)
