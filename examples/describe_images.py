"""Say what the images of --data are, and print the flags that describe them to the other programs.

    python examples/describe_images.py --data DIR --channels 13

The last line has --mean, --std and, where the files' type does not tell what is black and what is white, --value-range.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from sklearn.preprocessing import StandardScaler

from barlow_recipes.command_line import Positive, read
from barlow_recipes.errors import UsageError
from barlow_recipes.files import find_images
from barlow_recipes.images import DARK
from barlow_recipes.pixels import PixelSettings, raw, white
from barlow_recipes.program import exit_status, start


@dataclass(frozen=True, kw_only=True)
class Settings(PixelSettings):
    data: str  # as imagenet_pretrain.py takes it
    images: Positive = 1000  # how many to read, evenly spaced


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: describe(read(Settings, argv, __doc__ or "")))


def describe(settings: Settings) -> None:
    """Read images as they are, and add up; what is given of --mean and --std does not count."""
    images, notes = find_images(settings.data)
    numbers = range(0, len(images), math.ceil(len(images) / settings.images))
    sizes, kinds, unreadable = Counter[str](), Counter[torch.dtype](), list[str]()
    scaler, low, high = StandardScaler(), math.inf, -math.inf
    for number in numbers:
        try:
            content, name = images.read(number)
            image = raw(content, name, settings)
        except OSError as error:
            unreadable.append(str(error))
            continue
        if not image.isfinite().all():
            unreadable.append(f"{name} has pixels that are not finite")
            continue
        sizes[f"{image.shape[2]}×{image.shape[1]}"] += 1
        kinds[image.dtype] += 1
        values = image.double()
        low, high = min(low, values.min().item()), max(high, values.max().item())
        scaler.partial_fit(values.flatten(1).T.numpy())
    print(*notes, f"{settings.data}: {len(images):,} images, {len(numbers):,} read", sep="\n")
    if unreadable:
        print(f"{len(unreadable)} cannot be read, the first: {unreadable[0]}")
    if not sizes:
        raise UsageError(f"--data {settings.data}: no image can be read")
    for title, counts in (("width×height", sizes), ("type", kinds)):
        found = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(5))
        print(f"{title}: {found}".replace("torch.", ""))
    print(f"channels: {settings.channels}, values from {low:g} to {high:g}")
    natural = white(next(iter(kinds))) if len(kinds) == 1 else None
    fits = natural is not None and low >= 0 and natural * DARK <= high <= natural
    black, bright = settings.value_range or ((0.0, natural or high) if fits else (low, high))
    mean, std = (scaler.mean_ - black) / (bright - black), scaler.var_**0.5 / (bright - black)
    flags = {"channels": [settings.channels], "mean": mean, "std": std}
    if settings.value_range or not fits:
        flags["value-range"] = [black, bright]
    digits = {"value-range": 17}  # a rounded range would shut out the very values that it is of
    print(*(f"--{name} {' '.join(f'{n:.{digits.get(name, 5)}g}' for n in numbers)}" for name, numbers in flags.items()))


if __name__ == "__main__":
    start(main)
