"""What the numbers in an image file mean, and how an encoder is to see them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from barlow_recipes.command_line import Positive
from barlow_recipes.errors import UsageError

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

    def normalized(self, images: Tensor) -> Tensor:
        """By mean and deviation of each channel, in place: (..., C, H, W) float32 in [0, 1]."""
        for channel, mean, std in zip(images.unbind(-3), *self.statistics(), strict=True):
            channel.sub_(mean).div_(std)
        return images

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel."""
        usual = (MEAN, STD) if self.channels == 3 else ((0.5,) * self.channels, (0.25,) * self.channels)
        return self.mean or usual[0], self.std or usual[1]

    def check_pixels(self) -> None:
        """Raise UsageError if mean and deviation are not for each channel, a deviation is 0 or the range empty."""
        for flag, values in zip(("--mean", "--std"), self.statistics(), strict=True):
            if len(values) != self.channels:
                raise UsageError(f"{flag}: expected {self.channels} numbers, as many as --channels, got {len(values)}")
        if self.std and min(self.std) <= 0:
            raise UsageError(f"--std: expected numbers above 0, got {min(self.std):g}")
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise UsageError("--value-range {:g} {:g}: expected the lower value first".format(*self.value_range))


USUAL = PixelSettings()


def as_float(images: Tensor) -> Tensor:
    """A float32 copy in [0, 1] of uint8, or of what is in [0, 1]."""
    copy = torch.empty(images.shape, device=images.device).copy_(images)  # planes, however the pixels lie in memory
    return copy.div_(255) if images.dtype == torch.uint8 else copy


def normalized(images: Tensor) -> Tensor:
    """By ImageNet's mean and deviation, in place."""
    return USUAL.normalized(images)
