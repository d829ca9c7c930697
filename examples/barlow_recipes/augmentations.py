"""Two random views of an image: the published ones for photographs, and some that suit handwritten digits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes import colors
from barlow_recipes.errors import require

if TYPE_CHECKING:
    from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel
CROP_RATIO = (3 / 4, 4 / 3)  # width : height
BLUR_SIGMA = (0.1, 2.0)  # pixels

JITTER = (colors.brightness, colors.contrast, colors.saturation, colors.hue)
ORDERS = (*permutations(JITTER), ())  # the last, number -1: no jitter


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


PAPER = (ViewRecipe(blur=1.0, solarize=0.0), ViewRecipe(blur=0.1, solarize=0.2))


def image_view(recipe: ViewRecipe, size: int) -> Callable[[Tensor], Tensor]:
    """The random transformation of view 1 or view 2: crop, flip, jitter, greyscale, blur, solarization.

    Args:
        recipe: of the view; the published ones are ``PAPER``.
        size: of the square result, in pixels.

    Returns:
        A function from (3, H, W) uint8 to (3, size, size) float32, drawing from torch's default generator.

    Source: Zbontar et al. (2021), arXiv 2103.03230, appendix A, and ``main.py`` of facebookresearch/barlowtwins.
    """
    return partial(_view, recipe, cropped(recipe, size))


def _view(recipe: ViewRecipe, crop: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    pixels = as_float(crop(image)[None])
    return normalized(colored(pixels, draw_colors(recipe, 1)))[0]


def cropped(recipe: ViewRecipe, size: int) -> "v2.Compose":
    """The part of a view that needs the whole image, crop and flip: (3, H, W) to (3, size, size), both uint8."""
    v2 = require("torchvision.transforms.v2", "--data")
    crop = v2.RandomResizedCrop(size, recipe.crop_scale, CROP_RATIO, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(recipe.flip)])


class Colors(NamedTuple):
    """What is decided about the colours of a view: the columns of :func:`draw_colors`."""

    order: Tensor  # of the jitter, a number of ORDERS
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor  # 1 or 0
    sigma: Tensor  # of the blur; 0 for none
    solarize: Tensor  # 1 or 0


def draw_colors(recipe: ViewRecipe, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Decide about the colours of ``n`` views, (n, 8) float32; without a generator by torch's default one."""
    jitter, order, *strengths, grayscale, blur, sigma, solarize = torch.rand(10, n, generator=generator)
    brightness, contrast, saturation, hue = recipe.color_jitter
    ranges = [(max(0.0, 1 - reach), 1 + reach) for reach in (brightness, contrast, saturation)] + [(-hue, hue)]
    drawn = Colors(
        (jitter < recipe.jitter) * (order * (len(ORDERS) - 1) + 1).floor() - 1,
        *(uniform(low, high, strength) for (low, high), strength in zip(ranges, strengths, strict=True)),
        grayscale < recipe.grayscale,
        (blur < recipe.blur) * uniform(*BLUR_SIGMA, sigma),
        solarize < recipe.solarize,
    )
    return torch.stack(drawn, dim=1)


def uniform(low: float, high: float, unit: Tensor) -> Tensor:
    """Numbers from [0, 1) brought to [low, high)."""
    return unit * (high - low) + low


def colored(images: Tensor, decisions: Tensor) -> Tensor:
    """Do to each image what its row says, to all that an operation concerns at once.

    Args:
        images: (n, 3, H, W) float32 in [0, 1]; they may be overwritten.
        decisions: (n, 8) from :func:`draw_colors`, on the CPU.
    """
    steps = _steps(decisions)
    strengths = decisions.to(images.device, non_blocking=True)
    rows = torch.tensor([row for step in steps for row in step.rows]).to(images.device, non_blocking=True)
    for step, chosen in zip(steps, rows.split([len(step.rows) for step in steps]), strict=True):
        if len(chosen) == len(images):
            images = step.operation(images, strengths[:, step.column])
        else:
            images[chosen] = step.operation(images[chosen], strengths[chosen, step.column])
    return images


class _Step(NamedTuple):
    operation: Callable[[Tensor, Tensor], Tensor]
    column: int  # with its strength
    rows: list[int]  # the images that it concerns


def _steps(decisions: Tensor) -> list[_Step]:
    images = [Colors(*row) for row in decisions.tolist()]
    orders = [ORDERS[int(image.order)] for image in images]
    concerned = [
        (operation, operation.__name__, [operation in order[place : place + 1] for order in orders])
        for place in range(len(JITTER))
        for operation in JITTER
    ]
    concerned += [
        (colors.grayscale, "grayscale", [image.grayscale == 1 for image in images]),
        (colors.narrow_blur, "sigma", [0 < image.sigma <= colors.NARROW for image in images]),
        (colors.blur, "sigma", [image.sigma > colors.NARROW for image in images]),
        (colors.solarize, "solarize", [image.solarize == 1 for image in images]),
    ]
    return [
        _Step(operation, Colors._fields.index(column), [row for row, yes in enumerate(flags) if yes])
        for operation, column, flags in concerned
        if any(flags)
    ]


def as_float(images: Tensor) -> Tensor:
    """A float32 copy in [0, 1] of uint8, or of what is in [0, 1]."""
    copy = torch.empty(images.shape, device=images.device).copy_(images)  # planes, however the pixels lie in memory
    return copy.div_(255) if images.dtype == torch.uint8 else copy


def normalized(images: Tensor) -> Tensor:
    """By ImageNet's mean and deviation, in place."""
    for channel, mean, std in zip(images.unbind(-3), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return images


def image_without_augmentation(size: int) -> Callable[[Tensor], Tensor]:
    """Resize the shorter side to 8/7 of ``size``, cut the centre: (3, H, W) uint8 to (3, size, size) float32."""
    v2 = require("torchvision.transforms.v2", "--data")
    resize = v2.Resize(round(size * 8 / 7), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return partial(_plain, v2.Compose([resize, v2.CenterCrop(size)]))


def _plain(centre: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return normalized(as_float(centre(image)))


def augment_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn, scale, shear, bend, brighten and roughen a batch of digits, each in its own way.

    Args:
        images: (N, 1, H, W) in [0, 1].
        generator: the only source of randomness.

    Returns:
        The same shape; the added noise (σ = 0.1) leaves [0, 1].
    """
    n, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, shear = uniform(-math.pi / 12, math.pi / 12), uniform(-0.15, 0.15)
    scale, stretch = uniform(-0.15, 0.15).exp(), uniform(-0.075, 0.075).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    shape = torch.stack([1 / (scale * stretch), shear, zero, stretch / scale], dim=1).view(n, 2, 2)
    shift = uniform(-0.24, 0.24, 2, 1)  # ±1 pixel of 8, in the units of affine_grid
    grid = F.affine_grid(torch.cat([rotation @ shape, shift], dim=2), list(images.shape), align_corners=False)
    bend = torch.randn(n, 2, 3, 3, generator=generator) * 0.15
    bend = F.interpolate(bend, size=(height, width), mode="bicubic", align_corners=False)
    moved = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    contrast, gamma = uniform(0.7, 1.3, 1, 1, 1), uniform(-0.4, 0.4, 1, 1, 1).exp()
    inked = (moved * contrast).clamp(0, 1) ** gamma
    return inked + 0.1 * torch.randn(images.shape, generator=generator)
