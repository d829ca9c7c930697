"""Views whose colours are augmented a whole batch at a time, on the training device, each image in its own way."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from barlow_recipes.augmentations import (
    CROP_RATIO,
    Colors,
    ViewRecipe,
    as_float,
    colored,
    cropped,
    draw_colors,
    normalized,
    uniform,
)

COLORS = len(Colors._fields)
CROP_TRIES = 10  # torchvision's


class UnfinishedView(NamedTuple):
    """Views that a worker has cropped and flipped, and what is decided about their colours."""

    pixels: Tensor  # (N, 3, H, W) uint8
    parameters: Tensor  # (N, P), rows of draw(), on the CPU


class Boxes(NamedTuple):
    """Where a view of a square image lies: the columns of :func:`crop_boxes`."""

    width: Tensor  # of the image's
    height: Tensor
    left: Tensor  # of the room that is left
    top: Tensor
    flip: Tensor  # 1 or 0


def draw(recipe: ViewRecipe, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Decide everything about ``n`` views, a row for each.

    Args:
        recipe: of the view.
        n: how many.
        generator: None for torch's default one.

    Returns:
        (n, P) float32: the columns of :class:`Boxes`, which serve :func:`small_views` alone, and of :class:`Colors`.
    """
    return torch.cat([crop_boxes(recipe, n, generator), draw_colors(recipe, n, generator)], dim=1)


def crop_boxes(recipe: ViewRecipe, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Decide about crop and flip of ``n`` square images, (n, 5): like RandomResizedCrop, the first try that fits."""
    area, ratio = torch.rand(2, n, CROP_TRIES + 1, generator=generator)
    left, top, flip = torch.rand(3, n, generator=generator)
    area, ratio = uniform(*recipe.crop_scale, area), uniform(*map(math.log, CROP_RATIO), ratio).exp()
    area[:, -1] = ratio[:, -1] = 1  # the whole image, if none does
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    first = torch.maximum(width, height).le(1).int().argmax(dim=1, keepdim=True)
    width, height = (side.gather(1, first)[:, 0] for side in (width, height))
    return torch.stack(Boxes(width, height, left, top, flip < recipe.flip), dim=1)


def unfinished_view(recipe: ViewRecipe, size: int) -> Callable[[Tensor], UnfinishedView]:
    """A worker's part of a view: (3, H, W) uint8 to one image and its row, by torch's default generator.

    A DataLoader collates them to an :class:`UnfinishedView` of the batch.
    """
    return partial(_unfinished, recipe, cropped(recipe, size))


def _unfinished(recipe: ViewRecipe, crop: Callable[[Tensor], Tensor], image: Tensor) -> UnfinishedView:
    return UnfinishedView(crop(image), draw_colors(recipe, 1)[0])


def finished(view: Tensor | UnfinishedView, device: torch.device) -> Tensor:
    """The views on the device: (N, 3, H, W) float32, normalised. A Tensor is finished, and only moved."""
    if isinstance(view, Tensor):
        return view.to(device, non_blocking=True)
    pixels = view.pixels.to(device, non_blocking=True)
    return normalized(colored(as_float(pixels), view.parameters[:, -COLORS:]))


def small_views(images: Tensor, parameters: Tensor) -> Tensor:
    """Whole views of square images in memory, of the images' size.

    Args:
        images: (N, 3, S, S), uint8 or float in [0, 1].
        parameters: (N, P) from :func:`draw`, on the CPU.

    Returns:
        (N, 3, S, S) float32, normalised.
    """
    return normalized(colored(crop_small(as_float(images), parameters), parameters[:, -COLORS:]))


def crop_small(images: Tensor, parameters: Tensor) -> Tensor:
    """Crop, resize and flip by two small matrices for each image: R_down · image · R_acrossᵀ."""
    box = Boxes(*parameters[:, : len(Boxes._fields)].to(images.device, non_blocking=True).T)
    size = images.shape[-1]
    across = _resampling(box.left, box.width, size)
    across = torch.where(box.flip[:, None, None] > 0, across.flip(1), across)
    down = _resampling(box.top, box.height, size)
    return (down[:, None] @ images @ across.mT[:, None]).clamp_(0, 1)


def _resampling(start: Tensor, side: Tensor, size: int) -> Tensor:
    """Bicubic, as Pillow's, in whole pixels: (N, size, size), one row for each pixel of the result."""
    side = (side * size).round().clamp(min=1)
    start = (start * (size - side + 1)).floor()
    pixels = torch.arange(size, device=side.device)
    side, start = side[:, None, None], start[:, None, None]
    centre = start + (pixels[:, None] + 0.5) * side / size - 0.5
    x = (pixels - centre).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0)) * ((pixels >= start) & (pixels < start + side))
    return weights / weights.sum(dim=2, keepdim=True)
