"""Class folders to train on and to validate on, as batches: this process's share of them, the same bits every time."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.distributed import own_rows
from barlow_recipes.errors import UsageError, require
from barlow_recipes.files import Catalogue, class_folders, index_folder
from barlow_recipes.images import Labelled, Loader
from barlow_recipes.pixels import as_float, normalized

RESIZE = 8 / 7  # of the shorter side before the centre is cut: 256 for 224 pixels


class Tree(NamedTuple):
    """Two parts of a data set, with the same classes."""

    name: str
    classes: list[str]
    train: Catalogue
    validation: Catalogue

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in (self.train, self.validation))


class Reading(NamedTuple):
    """How images are read."""

    image_size: int
    batch_size: int  # of all processes together
    workers: int
    timeout: float
    pin_memory: bool

    def loader(self, dataset: Dataset[Any], **settings: Any) -> Loader:
        return Loader(dataset, self.timeout, num_workers=self.workers, pin_memory=self.pin_memory, **settings)


def load_tree(root: Path, validation: Sequence[str] = ("val",)) -> Tree:
    """Index root/train, and the first of root's folders that ``validation`` names.

    Raises:
        UsageError: there is no such folder, it has no classes or an empty one, or the parts differ in their classes.
    """
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    train, held_out = (_part(root, names) for names in (["train"], validation))
    classes, others = map(class_folders, (train, held_out))
    if classes and not others:
        raise UsageError(
            f"--data {held_out}: no class folders. Sort its images into class folders, as in {train.name}/"
        )
    for other, part, missing in (
        (train, held_out, set(classes) - set(others)),
        (held_out, train, set(others) - set(classes)),
    ):
        if missing and classes:
            raise UsageError(
                f"--data {root}: expected the same class folders in {train.name}/ and {held_out.name}/; {len(missing)} "
                f"of {other.name}/ are not in {part.name}/, the first is {min(missing)}"
            )
    return Tree(root.resolve().name, classes, index_folder(train), index_folder(held_out))


def _part(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"--data {root}: expected a folder {' or '.join(f'{name}/' for name in names)} of class folders")


def training_view(size: int) -> Callable[[Tensor], Tensor]:
    """A random part of an image, flipped or not: (3, H, W) uint8 to (3, size, size) float32.

    Source: evaluate.py of facebookresearch/barlowtwins; bilinear, where pretraining is bicubic.
    """
    v2 = require("torchvision.transforms.v2", "--data")
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return partial(_pixels, v2.Compose([crop, v2.RandomHorizontalFlip()]))


def centre_view(size: int) -> Callable[[Tensor], Tensor]:
    """The centre of an image, with 1/8 of the shorter side cut off: (3, H, W) uint8 to (3, size, size) float32."""
    v2 = require("torchvision.transforms.v2", "--data")
    resize = v2.Resize(round(size * RESIZE), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return partial(_pixels, v2.Compose([resize, v2.CenterCrop(size)]))


def _pixels(cut: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return normalized(as_float(cut(image)))


class Augmented(Dataset[tuple[Tensor, int]]):
    """A view of an image, a pure function of (seed, epoch, index), and its label: −1 where it cannot be read."""

    def __init__(self, catalogue: Catalogue, view: Callable[[Tensor], Tensor], seed: int) -> None:
        self.catalogue, self.view, self.seed = catalogue, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            image, label = decode(*self.catalogue.read(index)), int(self.catalogue.labels[index])
        except OSError:
            image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), -1
        seed = seed_of(self.seed, epoch, index)
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

    def __init__(self, catalogue: Catalogue, reading: Reading, seed: int) -> None:
        self.order = EveryImage(len(catalogue), reading.batch_size, seed)
        size = reading.image_size
        self.loader = reading.loader(
            Augmented(catalogue, training_view(size), seed),
            batch_sampler=self.order,
            persistent_workers=reading.workers > 0,
            collate_fn=partial(_collated, size),
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        self.order.epoch = epoch
        return self.loader


def _collated(size: int, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    if samples:
        images, labels = default_collate(samples)
        return images, labels
    return torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64)


def centres(catalogue: Catalogue, reading: Reading) -> Loader:
    """This process's part of the images, without augmentation and in their order."""
    own = catalogue.subset(torch.arange(len(catalogue))[own_rows(len(catalogue))])
    return reading.loader(Labelled(own, centre_view(reading.image_size)), batch_size=reading.batch_size)
