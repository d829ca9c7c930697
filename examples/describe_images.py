"""Say what the images of --data are, and print the flags that describe them to the other programs.

    python examples/describe_images.py --data DIR --channels 13

The last line has --mean, --std and, where the files' type does not tell what is black and what is white, --value-range.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from barlow_recipes.command_line import Positive, read
from barlow_recipes.decoding import SIXTEEN_BITS, raw
from barlow_recipes.errors import UsageError
from barlow_recipes.images import DARK, find_images
from barlow_recipes.pixels import PixelSettings
from barlow_recipes.program import exit_status, start


@dataclass(frozen=True, kw_only=True)
class Settings(PixelSettings):
    """What to look at; --mean and --std are not looked at."""

    data: str
    "as imagenet_pretrain.py takes it"
    images: Positive = 1000
    "how many to read, evenly spaced"


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: describe(read(Settings, argv, __doc__ or "")))


def describe(settings: Settings) -> None:
    """Read images as they are, and add up."""
    images, notes = find_images(settings.data)
    numbers = torch.linspace(0, len(images) - 1, min(len(images), settings.images)).long().tolist()
    sizes, kinds, unreadable = Counter[str](), Counter[str](), list[str]()
    sums = torch.zeros(3, settings.channels, dtype=torch.float64)  # of ones, values, squares
    low, high, natural = float("inf"), float("-inf"), 0.0
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
        kinds[str(image.dtype).removeprefix("torch.")] += 1
        natural = max(natural, white(image.dtype))
        values = image.double()
        low, high = min(low, values.min().item()), max(high, values.max().item())
        sums += torch.stack([(values**power).sum(dim=(1, 2)) for power in range(3)])
    print(*notes, f"{settings.data}: {len(images):,} images, {len(numbers):,} read", sep="\n")
    if unreadable:
        print(f"{len(unreadable)} cannot be read, the first: {unreadable[0]}")
    if not sizes:
        raise UsageError(f"--data {settings.data}: no image can be read")
    for title, counts in (("width×height", sizes), ("type", kinds)):
        print(f"{title}: {', '.join(f'{name} ({count:,})' for name, count in counts.most_common(5))}")
    print(f"channels: {settings.channels}, values from {low:g} to {high:g}")
    fits = low >= 0 and natural * DARK <= high <= natural and len(kinds) == 1
    black, white_ = settings.value_range or ((0.0, natural) if fits else (low, high))
    means, spread = sums[1] / sums[0], white_ - black
    deviations = (sums[2] / sums[0] - means**2).clamp(min=0).sqrt() / spread
    flags = {"channels": [settings.channels], "mean": ((means - black) / spread).tolist(), "std": deviations.tolist()}
    if settings.value_range or not fits:
        flags["value-range"] = [black, white_]
    digits = {"value-range": 17}  # a rounded range would shut out the very values that it is of
    print(*(f"--{name} {' '.join(f'{n:.{digits.get(name, 5)}g}' for n in numbers)}" for name, numbers in flags.items()))


def white(kind: torch.dtype) -> float:
    """The value that is 1 where no range is declared."""
    return 255.0 if kind == torch.uint8 else 1.0 if kind.is_floating_point or kind == torch.bool else SIXTEEN_BITS


if __name__ == "__main__":
    start(main)
