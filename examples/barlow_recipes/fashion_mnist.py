"""Fashion-MNIST: 70,000 photographs of clothes in ten classes, 28×28 and grey; each gets two colours of its own here.

The colours say nothing about the class, so whoever looks at pixels is misled, and a representation is good if the
views have taught it to ignore them.

Source: Xiao et al. (2017), arXiv 1708.07747.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from barlow_recipes.data import WHOLE, MemoryPairs, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.errors import UsageError
from barlow_recipes.pixels import as_float, normalized
from barlow_recipes.views import ViewRecipe, draw, small_views

NAME, PACKAGE = "fashion-mnist", "dataset-fashion-mnist"  # of Debian
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
LAYOUTS = ("", "raw", "FashionMNIST/raw")  # the latter two as torchvision downloads it
TRAIN, TEST = "train", "t10k"
SIDE = 28
SPLIT_SEED = 0  # split and colours are the same for every --seed, so that runs can be compared
HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 100  # to watch the run, not pretrained on
WATCHED_BANK_PER_CLASS, FINAL_BANK_PER_CLASS = 500, 1000


class PlainBatches:
    """Labelled images without augmentation."""

    def __init__(self, images: Tensor, labels: Tensor, chosen: Tensor, batch_size: int = 512) -> None:
        self.images, self.labels = images, labels
        self.batches = chosen.nonzero()[:, 0].split(batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers in self.batches:
            yield normalized(as_float(self.images[numbers])), self.labels[numbers]


def is_fashion_mnist(source: str | Path) -> bool:
    """Whether --data means Fashion-MNIST, by its name or by the files in the folder."""
    return _folder(source) is not None


def _folder(source: str | Path) -> Path | None:
    if str(source) == NAME and not Path(source).exists():
        return INSTALLED
    names = (f"{TRAIN}-images-idx3-ubyte{suffix}" for suffix in ("", ".gz"))
    folders = [Path(source, layout) for layout in LAYOUTS]
    return next((folder for name in names for folder in folders if (folder / name).is_file()), None)


def load_fashion_mnist(
    source: str | Path,
    *,
    recipes: tuple[ViewRecipe, ViewRecipe],
    batch_size: int,
    seed: int,
    monitor: bool,
    rows: slice = WHOLE,
) -> PretrainingData:
    """Read the files, colour the images, and hold a tenth of the training images out, at most 100 of a class, to watch.

    The test images are for the final evaluation.

    Args:
        source: "fashion-mnist", for the files of the Debian package, or the folder they are in.
        recipes: of the two views.
        batch_size: of all processes together.
        seed: of order and views.
        monitor: whether to hold images out.
        rows: of every batch, this process's.

    Raises:
        UsageError: a file is missing or damaged, or the batch is larger than the pretraining part.
    """
    folder = _folder(source) or Path(source)
    images, labels = _read(folder, TRAIN)
    test_images, test_labels = _read(folder, TEST)
    watched = hold_out(labels, HELD_OUT if monitor else 0, SPLIT_SEED, MOST_HELD_OUT_PER_CLASS)
    pretraining = (~watched).nonzero()[:, 0]
    if batch_size > len(pretraining):
        raise UsageError(f"--batch-size {batch_size} is more than the {len(pretraining)} images to pretrain on")

    def bank(most_per_class: int) -> PlainBatches:
        chosen = torch.zeros_like(watched)
        chosen[pretraining] = hold_out(labels[pretraining], 1, SPLIT_SEED, most_per_class)
        return PlainBatches(images, labels, chosen)

    def view(recipe: ViewRecipe, numbers: Tensor, generator: torch.Generator) -> Tensor:
        decisions = draw(recipe, len(numbers), generator)[rows]
        return small_views(images[pretraining[numbers[rows]]], decisions)

    views = [partial(view, recipe) for recipe in recipes]
    return PretrainingData(
        name=NAME,
        images=len(pretraining),
        pairs=MemoryPairs(len(pretraining), views, batch_size, seed),
        monitor=Probe(
            bank=bank(WATCHED_BANK_PER_CLASS),
            queries=PlainBatches(images, labels, watched),
            linear=True,
            labels_per_class=(),
        )
        if monitor
        else None,
        final=Probe(
            bank=bank(FINAL_BANK_PER_CLASS),
            queries=PlainBatches(test_images, test_labels, torch.ones_like(test_labels, dtype=torch.bool)),
            linear=True,
            labels_per_class=(1, 5),
        ),
    )


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The images of a part in colour, (N, 3, 28, 28) uint8, and their labels."""
    images_path, labels_path = _find(folder, f"{part}-images-idx3-ubyte"), _find(folder, f"{part}-labels-idx1-ubyte")
    grey, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if grey.shape[1:] != (SIDE, SIDE):
        raise UsageError(f"--data {images_path}: expected images of {SIDE}×{SIDE}, got {tuple(grey.shape)}")
    if len(grey) != len(labels):
        raise UsageError(f"--data {labels_path}: expected {len(grey)} labels, one for each image, got {len(labels)}")
    return in_two_colors(grey, seed_of(SPLIT_SEED, part == TEST)), labels.long()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    remedy = f"apt install {PACKAGE}, or give the folder with the four files to --data"
    raise UsageError(f"--data: no {name}.gz in {folder}" + f": {remedy}" * (folder == INSTALLED))


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of bytes in the idx format: a magic number, the shape, the values.

    Source: http://yann.lecun.com/exdb/mnist
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data {path}: cannot be read, is it damaged? ({error})") from None
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise UsageError(f"--data {path}: expected an idx file that begins with {magic.hex()}, got {content[:4].hex()}")
    shape = torch.Size(struct.unpack(f">{dimensions}I", content[4:start]))
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:]
    if len(values) != shape.numel() or not len(values):
        raise UsageError(f"--data {path}: expected {shape.numel()} values after the header, got {len(values)}")
    return values.view(shape)


def in_two_colors(grey: Tensor, seed: int) -> Tensor:
    """Draw a background and a foreground for each image, at least 64 of 256 apart in red, green and blue.

    Args:
        grey: (N, H, W) uint8, 0 for the background.
        seed: of the colours, which are a function of it and the number of the image.

    Returns:
        (N, 3, H, W) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (len(grey), 2, 3, 1, 1), generator=generator)
    foreground = (colors[:, 0] + 64 + colors[:, 1] // 2) % 256
    images = torch.empty(len(grey), 3, *grey.shape[1:], dtype=torch.uint8)
    whole = (images, colors[:, 0].float(), foreground.float(), grey[:, None])
    for part, low, high, ink in zip(*(tensor.split(256) for tensor in whole), strict=True):  # they fit a cache
        part.copy_(torch.lerp(low, high, ink / 255).round_())
    return images
