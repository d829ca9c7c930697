"""scikit-learn's digits: 1,797 real handwritten digits of 8×8 pixels, which come with the package."""

import math
from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes.data import WHOLE, MemoryPairs, PlainBatches, PretrainingData, Probe, hold_out
from barlow_recipes.errors import require
from barlow_recipes.pixels import PixelSettings

CHANGES = ("geometry", "bend", "ink", "noise")  # of augment_digits


def load_digits(
    batch_size: int, seed: int, monitor: bool, rows: slice = WHOLE, sides: Sequence[int | None] = (None, None)
) -> PretrainingData:
    """Split the digits, before anything is learned: a fifth for the final evaluation, a tenth of the rest to watch.

    ``sides`` has one for each view: that of a local crop, or None.
    """
    digits = require("sklearn.datasets", "the digits run").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), values in [0, 1]
    labels = torch.tensor(digits.target)
    test = hold_out(labels, 1 / 5)
    held_out = torch.zeros_like(test)
    held_out[~test] = hold_out(labels[~test], 1 / 10 if monitor else 0)
    parts = (~test & ~held_out, held_out, ~test, test)
    seen, watching, known, tested = (PlainBatches(images, labels, part) for part in parts)
    pretraining = images[parts[0]]

    def view(side: int | None, numbers: Tensor, generator: torch.Generator) -> Tensor:
        whole = augment_digits(pretraining[numbers], generator)
        return (crop(whole, side, generator) if side else whole)[rows]

    return PretrainingData(
        name="digits",
        pixels=PixelSettings(channels=1),
        images=len(pretraining),
        pairs=MemoryPairs(len(pretraining), [partial(view, side) for side in sides], batch_size, seed),
        monitor=Probe(seen, watching, linear=False, labels_per_class=(1,)) if monitor else None,
        final=Probe(known, tested, linear=True, labels_per_class=(1, 5)),
    )


def augment_digits(images: Tensor, generator: torch.Generator, without: Collection[str] = ()) -> Tensor:
    """Move, turn, scale, shear, bend, brighten and roughen digits, (N, 1, H, W) in [0, 1], each in its own way.

    ``without`` names those of :data:`CHANGES` that are left out; the others stay what they are. The noise that is added
    (σ = 0.1) leaves [0, 1].
    """
    n, _, height, width = images.shape
    geometry, bending, ink, noise = (change not in without for change in CHANGES)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, shear = uniform(-math.pi / 12, math.pi / 12) * geometry, uniform(-0.15, 0.15) * geometry
    scale, stretch = (uniform(-0.15, 0.15) * geometry).exp(), (uniform(-0.075, 0.075) * geometry).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    shape = torch.stack([1 / (scale * stretch), shear, zero, stretch / scale], dim=1).view(n, 2, 2)
    shift = uniform(-0.24, 0.24, 2, 1) * geometry  # ±1 pixel of 8, in the units of affine_grid
    grid = F.affine_grid(torch.cat([rotation @ shape, shift], dim=2), list(images.shape), align_corners=False)
    bend = torch.randn(n, 2, 3, 3, generator=generator) * 0.15 * bending
    bend = F.interpolate(bend, size=(height, width), mode="bicubic", align_corners=False)
    moved = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    contrast, gamma = uniform(0.7, 1.3, 1, 1, 1), (uniform(-0.4, 0.4, 1, 1, 1) * ink).exp()
    inked = (moved * (contrast if ink else 1)).clamp(0, 1) ** gamma
    return inked + 0.1 * noise * torch.randn(images.shape, generator=generator)


def crop(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A window of each image, anywhere: (N, C, H, W) to (N, C, side, side)."""
    windows = images.unfold(2, side, 1).unfold(3, side, 1).movedim(1, 3)  # (N, rows, columns, C, side, side)
    top, left = (torch.randint(room, (len(images),), generator=generator) for room in windows.shape[1:3])
    return windows[torch.arange(len(images)), top, left]
