"""Class folders to train on and to measure on, as batches: this process's share of them, the same bits every time."""

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from barlow_recipes.command_line import Positive, RunSettings, Side
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.distributed import own_rows
from barlow_recipes.errors import UsageError, require
from barlow_recipes.files import Catalogue, class_folders, index_folder
from barlow_recipes.images import Loader
from barlow_recipes.pixels import PixelSettings, as_float

HELD_OUT = ("val", "test")  # the first of them that is there
RESIZE = 8 / 7  # of the shorter side before the centre is cut: 256 for 224 pixels
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Reading(RunSettings, PixelSettings):
    """Flags that say how images are read."""

    image_size: Side = 224
    "side of the square that the encoder sees"
    batch_size: Positive = 256
    "images in a step, of all processes together"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the encoder sees."""
        return self.channels, self.image_size, self.image_size


class Tree(NamedTuple):
    """Two parts of a data set, with the same classes."""

    name: str
    classes: list[str]
    train: Catalogue
    validation: Catalogue

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in (self.train, self.validation))


def load_tree(root: Path) -> Tree:
    """Index root/train, and root/val or root/test.

    Raises:
        UsageError: there is no such folder, it has no classes or an empty one, or the parts differ in their classes.
    """
    if not root.is_dir():
        found = "a file; evaluation wants a folder with train/ and val/" if root.exists() else "no such folder"
        raise UsageError(f"--data {root}: {found}")
    folders = [_part(root, names) for names in (["train"], HELD_OUT)]
    train, held_out = map(index_folder, folders)
    classes = [class_folders(folder) for folder in folders]
    for one, other in ((0, 1), (1, 0)):
        if missing := sorted(set(classes[one]) - set(classes[other])):
            raise UsageError(
                f"--data {root}: expected the same class folders in train/ and {folders[1].name}/; {len(missing)} of "
                f"{folders[one].name}/ are not in {folders[other].name}/, the first is {missing[0]}"
            )
    return Tree(root.resolve().name, classes[0], train, held_out)


def _part(root: Path, names: Sequence[str]) -> Path:
    found = [root / name for name in names if (root / name).is_dir()]
    if not found:
        wanted = " or ".join(f"{name}/" for name in names)
        raise UsageError(f"--data {root}: expected a folder {wanted} of class folders")
    if not class_folders(found[0]):
        raise UsageError(f"--data {found[0]}: no class folders. Sort its images into one folder for each class")
    return found[0]


def paths_of(part: Catalogue) -> list[str]:
    """Of every image, below the catalogue's root."""
    packed, starts = part.names.numpy().tobytes(), part.starts.tolist()
    return [os.fsdecode(packed[starts[file] : starts[file + 1]]) for file in part.file.tolist()]


def training_view(settings: Reading) -> View:
    """A random part of an image, flipped or not: (C, H, W) to (C, side, side) float32.

    Source: evaluate.py of facebookresearch/barlowtwins; bilinear, where pretraining is bicubic.
    """
    v2 = require("torchvision.transforms.v2", "--data")
    crop = v2.RandomResizedCrop(settings.image_size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return partial(_pixels, v2.Compose([crop, v2.RandomHorizontalFlip()]), settings)


def centre_view(settings: Reading) -> View:
    """The centre of an image, with 1/8 of the shorter side cut off: (C, H, W) to (C, side, side) float32."""
    v2 = require("torchvision.transforms.v2", "--data")
    side = settings.image_size
    resize = v2.Resize(round(side * RESIZE), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return partial(_pixels, v2.Compose([resize, v2.CenterCrop(side)]), settings)


def _pixels(cut: View, settings: Reading, image: Tensor) -> Tensor:
    return settings.normalized(as_float(cut(image)))


class Views(Dataset[tuple[Tensor, int]]):
    """A view of an image, a pure function of (seed, epoch, index), and its label: −1 where it cannot be read."""

    def __init__(self, catalogue: Catalogue, view: View, settings: Reading) -> None:
        self.catalogue, self.view, self.settings = catalogue, view, settings

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            image, label = decode(*self.catalogue.read(index), self.settings), int(self.catalogue.labels[index])
        except OSError:
            image, label = torch.zeros(self.settings.channels, 8, 8, dtype=torch.uint8), -1
        seed = seed_of(self.settings.seed, epoch, index)
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            return self.view(image), label


class EveryImage(EpochBatches):
    """This process's rows of all batches of an epoch, of the incomplete last one too, where it may have none."""

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in super().__iter__():
            yield batch[own_rows(len(batch))]


class TrainingImages:
    """Labelled views of the images, in batches, from worker processes that live as long as this object."""

    def __init__(self, catalogue: Catalogue, settings: Reading) -> None:
        self.order = EveryImage(len(catalogue), settings.batch_size, settings.seed)
        views = Views(catalogue, training_view(settings), settings)
        self.loader = _loader(views, self.order, persistent_workers=settings.workers > 0)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        self.order.epoch = epoch
        return self.loader


def centres(catalogue: Catalogue, settings: Reading) -> Loader:
    """This process's part of the images, without augmentation and in their order."""
    own = torch.arange(len(catalogue))[own_rows(len(catalogue))]
    keys = [[(0, index) for index in part.tolist()] for part in own.split(settings.batch_size) if len(part)]
    return _loader(Views(catalogue, centre_view(settings), settings), keys)


def _loader(views: Views, keys: Iterable[list[tuple[int, int]]], **more: Any) -> Loader:
    settings = views.settings
    pinned = torch.cuda.is_available() and (settings.device is None or settings.device.type == "cuda")
    more |= {"num_workers": settings.workers, "pin_memory": pinned, "collate_fn": partial(_collated, settings.shape)}
    return Loader(views, settings.loader_timeout, batch_sampler=keys, **more)


def _collated(shape: tuple[int, ...], samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    if samples:
        images, labels = default_collate(samples)
        return images, labels
    return torch.empty(0, *shape), torch.empty(0, dtype=torch.int64)
