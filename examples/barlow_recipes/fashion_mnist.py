"""Fashion-MNIST: 70,000 photographs of clothes in ten classes, 28×28 and grey; each gets two colours of its own here.

The colours say nothing about the class, so whoever looks at pixels is misled, and a representation is good if the
views have taught it to ignore them.

Source: Xiao et al. (2017), arXiv 1708.07747.
"""

import gzip
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from barlow_recipes.data import SPLIT_SEED, WHOLE, MemoryPairs, PlainBatches, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.errors import UsageError
from barlow_recipes.views import ViewRecipe, draw, small_views

NAME, PACKAGE = "fashion-mnist", "dataset-fashion-mnist"  # of Debian
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
LAYOUTS = ("", "raw", "FashionMNIST/raw")  # the latter two as torchvision downloads it
TRAIN, TEST = "train", "t10k"
SIDE = 28
HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 100  # to watch the run, not pretrained on
WATCHED_BANK_PER_CLASS, FINAL_BANK_PER_CLASS = 500, 1000


def is_fashion_mnist(source: str | Path) -> bool:
    """Whether --data means Fashion-MNIST, by its name or by the files in the folder."""
    return _folder(source) is not None


def _folder(source: str | Path) -> Path | None:
    if str(source) == NAME and not Path(source).exists():
        return INSTALLED
    found = (path for layout in LAYOUTS for path in Path(source, layout).glob(f"{TRAIN}-images-idx3-ubyte*"))
    return next((path.parent for path in found), None)


def load_fashion_mnist(
    source: str | Path,
    *,
    recipes: Sequence[ViewRecipe],
    batch_size: int,
    seed: int,
    monitor: bool,
    rows: slice = WHOLE,
) -> PretrainingData:
    """Read the files (UsageError), colour the images, and hold a tenth, at most 100 of a class, out to watch.

    The test images are for the final evaluation. ``source`` is "fashion-mnist", for the files of the Debian package, or
    the folder they are in; ``rows`` of every batch are this process's.
    """
    folder = _folder(source) or Path(source)
    images, labels = _read(folder, TRAIN)
    test_images, test_labels = _read(folder, TEST)
    held_out = hold_out(labels, HELD_OUT if monitor else 0, at_most=MOST_HELD_OUT_PER_CLASS)
    pretraining = (~held_out).nonzero()[:, 0]
    queries = PlainBatches(images, labels, held_out)
    test = PlainBatches(test_images, test_labels, torch.ones(len(test_labels), dtype=torch.bool))

    def bank(most_per_class: int) -> PlainBatches:
        chosen = torch.zeros_like(held_out)
        chosen[pretraining] = hold_out(labels[pretraining], 1, at_most=most_per_class)
        return PlainBatches(images, labels, chosen)

    def view(recipe: ViewRecipe, numbers: Tensor, generator: torch.Generator) -> Tensor:
        decisions = draw(recipe, len(numbers), generator)[rows]
        return small_views(images[pretraining[numbers[rows]]], decisions, recipe.size)

    return PretrainingData(
        name=NAME,
        images=len(pretraining),
        pairs=MemoryPairs(len(pretraining), [partial(view, recipe) for recipe in recipes], batch_size, seed),
        monitor=Probe(bank(WATCHED_BANK_PER_CLASS), queries, linear=True, labels_per_class=()) if monitor else None,
        final=Probe(bank(FINAL_BANK_PER_CLASS), test, linear=True, labels_per_class=(1, 5)),
    )


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The images of a part in colour, (N, 3, 28, 28) uint8, and their labels."""
    grey = _read_idx(folder, f"{part}-images-idx3-ubyte", SIDE, SIDE)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte")
    if len(labels) != len(grey):
        raise UsageError(
            f"--data {folder}: expected a label for each of {len(grey)} images of {part}, got {len(labels)}"
        )
    return in_two_colors(grey, seed_of(SPLIT_SEED, part == TEST)), labels.long()


def _read_idx(folder: Path, name: str, *item: int) -> Tensor:
    """A file of bytes in the idx format: a magic number, the shape, the values.

    Source: http://yann.lecun.com/exdb/mnist
    """
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        remedy = f"apt install {PACKAGE}, or give the folder with the four files to --data"
        raise UsageError(f"--data: no {name}.gz in {folder}" + f": {remedy}" * (folder == INSTALLED))
    start = 8 + 4 * len(item)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, *shape = struct.unpack_from(f">{start // 4}I", content)
        if not (magic == 0x801 + len(item) and shape == [*item] and count):
            raise ValueError(f"its shape is {(count, *shape)}, expected (N, {', '.join(map(str, item))})")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(count, *item)
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, struct.error) as error:
        raise UsageError(f"--data {path}: cannot be read, is it damaged? ({error})") from None


def in_two_colors(grey: Tensor, seed: int) -> Tensor:
    """Draw a background and a foreground for each image, at least 64 of 256 apart in red, green and blue.

    From (N, H, W) uint8, 0 for the background, to (N, 3, H, W); colours depend on the seed and the image's number.
    """
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (len(grey), 2, 3, 1, 1), generator=generator)
    foreground = (colors[:, 0] + 64 + colors[:, 1] // 2) % 256
    images = torch.empty(len(grey), 3, *grey.shape[1:], dtype=torch.uint8)
    whole = (images, colors[:, 0].float(), foreground.float(), grey[:, None])
    for part, low, high, ink in zip(*(tensor.split(256) for tensor in whole), strict=True):  # they fit a cache
        part.copy_(torch.lerp(low, high, ink / 255).round_())
    return images
