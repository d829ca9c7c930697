"""What the numbers in an image file mean, and how an encoder is to see them."""

from dataclasses import dataclass

from barlow_recipes.command_line import Positive

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """Flags of every program that reads images."""

    channels: Positive = 3
    "of an image; files with another number are converted where that is usual (grey, palette, CMYK), else refused"
    value_range: tuple[float, float] | None = None
    "the values that become 0 and 1; without it those of the files' type: 0 and 255, 65535, or 1 of floats"
    mean: tuple[float, ...] = ()
    "of each channel, to be subtracted; without it ImageNet's, or 0.5 for other than three channels"
    std: tuple[float, ...] = ()
    "of each channel, to divide by; without it ImageNet's, or 0.25 for other than three channels"
