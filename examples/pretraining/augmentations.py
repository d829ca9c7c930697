"""Two random views of an image: the published ones for photographs, and some that suit handwritten digits."""

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import require

if TYPE_CHECKING:
    from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel


def image_view(view: int, size: int) -> "v2.Compose":
    """The random transformation of view 1 or view 2, as published: they differ in blur and solarization.

    Args:
        view: 1 or 2.
        size: of the square result, in pixels.

    Returns:
        A transform from (3, H, W) uint8 to (3, size, size) float32, drawing from torch's default generator.

    Source: Zbontar et al. (2021), arXiv 2103.03230, appendix A, and ``main.py`` of facebookresearch/barlowtwins.
    """
    v2 = require("torchvision.transforms.v2", "--data")
    blur, solarize = {1: (1.0, 0.0), 2: (0.1, 0.2)}[view]
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=blur),  # 13 pixels: ±3σ of the widest
            v2.RandomSolarize(128, p=solarize),
            *_to_float(v2),
        ]
    )


def image_without_augmentation(size: int) -> "v2.Compose":
    """Resize the shorter side to 8/7 of ``size``, cut the centre: (3, H, W) uint8 to (3, size, size) float32."""
    v2 = require("torchvision.transforms.v2", "--data")
    resize = v2.Resize(round(size * 8 / 7), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_float(v2)])


def _to_float(v2: ModuleType) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


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
