"""Random views of an image, as published: crop, flip, jitter, greyscale, blur, solarization.

Workers crop and flip with torchvision. Colours are changed a batch at a time: by a worker (a batch of one), on the
device, or in memory. These operations are ours: of one image with 224 pixels torchvision's v2 takes longer than the
official pipeline on Pillow (its hue 2 to 8 times, its blur 5 to 6 times as long as these), and of 256 small ones kornia
2.5 times.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes.errors import require
from barlow_recipes.pixels import USUAL, PixelSettings, as_float

CROP_RATIO = (3 / 4, 4 / 3)  # width : height
CROP_TRIES = 10  # torchvision's
BLUR_SIGMA = (0.1, 2.0)  # pixels
TAPS = 13  # of the blur: three deviations
LUMA = (0.299, 0.587, 0.114)
ORDERS = torch.tensor([*permutations(range(4)), (-1,) * 4])  # of the jitter's operations; the last is no jitter


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How one view of an image is made. All but the crop's and the jitter's strengths are probabilities."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    flip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: float
    solarize: float
    size: int | None = None  # side in pixels, of a local crop; the others have that of the run


# Zbontar et al. (2021), arXiv 2103.03230, appendix A, and main.py of facebookresearch/barlowtwins.
PAPER = (ViewRecipe(blur=1.0, solarize=0.0), ViewRecipe(blur=0.1, solarize=0.2))


class Decisions(NamedTuple):
    """What is decided about a view: the columns of :func:`draw`. The first five serve :func:`crop_small` alone."""

    width: Tensor  # of the crop, by the image's
    height: Tensor
    left: Tensor  # of the room beside the crop
    top: Tensor
    flip: Tensor  # 1 or 0
    order: Tensor  # of the jitter, a row of ORDERS
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor  # 1 or 0
    sigma: Tensor  # of the blur; 0 for none
    solarize: Tensor  # 1 or 0


def draw(recipe: ViewRecipe, n: int, generator: torch.Generator | None = None, *, crops: bool = True) -> Tensor:
    """Decide about ``n`` views, by the generator or by torch's default one: (n, D) float32.

    Without ``crops``, which take a third of the time, each is the whole image; all else is the same.
    """
    uniform = torch.rand(len(Decisions._fields) + 2, n, generator=generator)
    left, top, flip, jitter, order, *strengths, grayscale, blur, sigma, solarize, _ = uniform
    scales = [1 + reach * (2 * unit - 1) for reach, unit in zip(recipe.color_jitter[:3], strengths, strict=False)]
    tries = torch.rand(2, n, CROP_TRIES, generator=generator)
    width, height = _crops(*tries, recipe.crop_scale) if crops else tries.new_ones(2, n)
    drawn = Decisions(
        width,
        height,
        left,
        top,
        flip < recipe.flip,
        torch.where(jitter < recipe.jitter, (order * (len(ORDERS) - 1)).floor(), len(ORDERS) - 1),
        *scales,
        recipe.color_jitter[3] * (2 * strengths[3] - 1),
        grayscale < recipe.grayscale,
        (blur < recipe.blur) * (BLUR_SIGMA[0] + sigma * (BLUR_SIGMA[1] - BLUR_SIGMA[0])),
        solarize < recipe.solarize,
    )
    return torch.stack(drawn, dim=1)


def _crops(area: Tensor, ratio: Tensor, scale: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Width and height in a square image, as of RandomResizedCrop: the first try that fits, or all of it."""
    area, ratio = scale[0] + area * (scale[1] - scale[0]), (math.log(CROP_RATIO[1]) * (2 * ratio - 1)).exp()
    whole = torch.ones(len(area), 1)
    width, height = (torch.cat([side.sqrt(), whole], dim=1) for side in (area * ratio, area / ratio))
    first = torch.maximum(width, height).le(1).int().argmax(dim=1, keepdim=True)
    return width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]


class PartialView(NamedTuple):
    """Views that a worker has cropped and flipped, and what is decided about their colours."""

    pixels: Tensor  # (N, C, H, W), uint8 or float32 in [0, 1]
    decisions: Tensor  # (N, D), rows of draw(), on the CPU


class View:
    """From (C, H, W), uint8 or float in [0, 1], to (C, size, size) float32, by torch's default generator.

    Or to what :func:`completed` takes, if pixels are to be ``left`` in uint8 or float32.
    """

    def __init__(
        self, recipe: ViewRecipe, size: int, pixels: PixelSettings = USUAL, left: torch.dtype | None = None
    ) -> None:
        v2: Any = require("torchvision.transforms.v2", "--data")
        size, bicubic = recipe.size or size, v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(size, recipe.crop_scale, CROP_RATIO, bicubic, antialias=True)
        self.crop = v2.Compose([crop, v2.RandomHorizontalFlip(recipe.flip)])
        self.recipe, self.pixels, self.left = recipe, pixels, left

    def __call__(self, image: Tensor) -> Tensor | PartialView:
        cropped, decisions = self.crop(image), draw(self.recipe, 1, crops=False)
        if self.left is None:
            return completed(PartialView(cropped[None], decisions), torch.device("cpu"), self.pixels)[0]
        if self.left == torch.uint8 and cropped.is_floating_point():  # one deep image among those of eight bits
            cropped = cropped.clamp(0, 1).mul(255).round().byte()
        return PartialView(cropped if self.left == torch.uint8 else as_float(cropped), decisions[0])


def completed(view: Tensor | PartialView, device: torch.device, pixels: PixelSettings = USUAL) -> Tensor:
    """The views on the device: (N, C, H, W) float32, normalised. A Tensor is finished, and only moved."""
    if isinstance(view, Tensor):
        return view.to(device, non_blocking=True)
    images = as_float(view.pixels.to(device, non_blocking=True))
    return pixels.normalized(colored(images, view.decisions))


def image_without_augmentation(size: int, pixels: PixelSettings = USUAL) -> Callable[[Tensor], Tensor]:
    """Resize the shorter side to 8/7 of ``size``, cut the centre: (C, H, W) to (C, size, size) float32."""
    v2: Any = require("torchvision.transforms.v2", "--data")
    resize = v2.Resize(round(size * 8 / 7), v2.InterpolationMode.BICUBIC, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([resize, v2.CenterCrop(size), to_float, v2.Normalize(*pixels.statistics())])


def small_views(images: Tensor, decisions: Tensor, size: int | None = None) -> Tensor:
    """Finished views of small square images in memory, of the images' size or another: (N, 3, S, S), normalised."""
    return USUAL.normalized(colored(crop_small(as_float(images), decisions, size), decisions))


def crop_small(images: Tensor, decisions: Tensor, size: int | None = None) -> Tensor:
    """Crop, resize and flip. Nothing is smoothed: a crop is hardly made smaller here."""
    box = Decisions(*decisions.to(images.device, non_blocking=True).T)
    zero = torch.zeros_like(box.width)
    x, y = (side - 1 + 2 * start * (1 - side) for start, side in ((box.left, box.width), (box.top, box.height)))
    width = box.width * (1 - 2 * box.flip)
    affine = torch.stack([width, zero, x, zero, box.height, y], dim=1).view(-1, 2, 3)  # in [-1, 1]
    shape = [*images.shape[:2], *(size or side for side in images.shape[2:])]
    grid = F.affine_grid(affine, shape, align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False)


def colored(images: Tensor, decisions: Tensor) -> Tensor:
    """Do to each image what its row of :func:`draw` says, to all that an operation concerns at once.

    The images, (n, C, H, W) float32, may be overwritten. What leaves [0, 1], as cubic interpolation does, is cut.
    Saturation, hue and greyscale concern images of three channels alone.
    """
    drawn = Decisions(*decisions.T)
    orders = ORDERS[drawn.order.long()].tolist()
    images = images.clamp_(0, 1)
    for operation, rows, strength in _steps(drawn, orders):
        if not rows or (operation in OF_COLORS and images.shape[-3] != len(LUMA)):
            continue
        if len(rows) == len(images):
            images = operation(images, strength.to(images.device, non_blocking=True)[:, None, None, None])
        else:
            chosen = torch.tensor(rows)
            strengths = strength[chosen].to(images.device, non_blocking=True)[:, None, None, None]
            chosen = chosen.to(images.device, non_blocking=True)
            images[chosen] = operation(images[chosen], strengths)
    return images


def _steps(drawn: Decisions, orders: list[list[int]]) -> Iterator[tuple[Any, list[int], Tensor]]:
    """Each operation in its turn: which images it concerns, and how strong it is.

    By lists: of one image, as a worker has it, two dozen tensors of a number take as long as a third of the colours.
    """
    for place in range(ORDERS.shape[1]):
        for number, operation in enumerate((brightness, contrast, saturation, hue)):
            rows = [row for row, order in enumerate(orders) if order[place] == number]
            yield operation, rows, getattr(drawn, operation.__name__)
    for operation, strength in ((grayscale, drawn.grayscale), (blur, drawn.sigma), (solarize, drawn.solarize)):
        yield operation, [row for row, value in enumerate(strength.tolist()) if value > 0], strength


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean grey; of other than three channels, from each one's mean."""
    mean = _grey(images.mean(dim=(-2, -1), keepdim=True))
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the pixel's own grey: 0 leaves only that."""
    grey = _grey(images)
    return images.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue h of HSV, keep the saturation and the value.

    With h in sixths of a turn from −3 to 3, red at 0, the largest channel M, the smallest m and C = M − m:

        |h| = 1 + (g + b − r − m) / C, and h has the sign of g − b;
        a channel whose own hue is at distance d from h has the value M + C − C·min(max(d, 1), 2).
    """
    red, green, blue = images.chunk(3, dim=-3)
    largest, smallest = images.amax(-3, keepdim=True), images.amin(-3, keepdim=True)
    c = largest - smallest
    h = (green + blue).sub_(red).sub_(smallest).div_(c.clamp(min=1e-8)).add_(1).copysign_(green - blue)
    # A channel's place on the circle, from 0 to 6. The distance of h + place from 0 or 6 is ||h + place − 3| − 3|.
    place = (6 * turns - 2 * torch.arange(3, device=turns.device).view(3, 1, 1)) % 6
    d = (h + (place - 3)).abs_().sub_(3).abs_()
    return d.clamp_(1, 2).mul_(c.neg()).add_(largest.add_(c))


def grayscale(images: Tensor, _: Tensor) -> Tensor:
    return _grey(images).expand_as(images).contiguous()


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    reach, sizes = TAPS // 2, images.shape[-2:]
    if sigma.is_cpu:  # beyond six deviations a tap weighs less than 2e-8: half of all blurs need fewer
        reach = min(reach, math.ceil(6 * sigma.max().item()))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    taps = (weights / weights.sum(dim=-1, keepdim=True)).split(1, dim=-1)
    images = F.pad(images, [reach] * 4, mode="replicate")
    for dim in (-2, -1):
        shifted = [images.narrow(dim, tap, sizes[dim]) for tap in range(len(taps))]
        images = shifted[0] * taps[0]
        for tap in range(1, len(taps)):
            images.addcmul_(shifted[tap], taps[tap])
    return images


def solarize(images: Tensor, _: Tensor) -> Tensor:
    return torch.minimum(images, 1 - images)


OF_COLORS = (saturation, hue, grayscale)


def _grey(images: Tensor) -> Tensor:
    if images.shape[-3] != len(LUMA):
        return images
    red, green, blue = images.chunk(3, dim=-3)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
