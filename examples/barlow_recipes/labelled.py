"""Class folders to train on and to measure on, which of them have labels, and this process's share as batches."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from barlow_recipes.command_line import Positive, RunSettings, Side
from barlow_recipes.data import SPLIT_SEED, EpochBatches, hold_out, seed_of
from barlow_recipes.distributed import shard
from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.files import ImageIndex, class_folders, files_below, index_folder, told
from barlow_recipes.images import Labelled, Loader
from barlow_recipes.pixels import PixelSettings, as_float

HELD_OUT = ("val", "test")  # the first of them that is there
RESIZE = 8 / 7  # of the shorter side before the centre is cut: 256 for 224 pixels
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(RunSettings, PixelSettings):
    """Flags that say how images are read."""

    image_size: Side = 224  # side of the square that the encoder sees
    batch_size: Positive = 256  # images in a step, of all processes together


class ImageFolders(NamedTuple):
    """Two parts of a data set, with the same classes."""

    name: str
    classes: list[str]
    train: ImageIndex
    validation: ImageIndex
    notes: tuple[str, ...] = ()  # of what is left out

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in (self.train, self.validation))


def load_tree(root: Path) -> ImageFolders:
    """Index root/train, and root/val or root/test; UsageError: a part or a class is missing, or has no image."""
    if not root.is_dir():
        found = "a file; evaluation wants a folder with train/ and val/" if root.exists() else "no such folder"
        raise UsageError(f"--data {root}: {found}")
    parts, skipped = [], list[str]()
    for names in (("train",), HELD_OUT):
        there = [root / name for name in names if (root / name).is_dir()]
        if not there:
            raise UsageError(f"--data {root}: expected a folder {'/ or '.join(names)}/ of class folders")
        parts.append(index_folder(there[0], files_below(there[0], skipped)))
    classes, others = (class_folders(part.root) for part in parts)
    if alone := sorted({*classes} ^ {*others}):
        raise UsageError(
            f"--data {root}: expected the same class folders in train/ and {parts[1].root.name}/; {len(alone)} are in "
            f"one of them alone, the first is {alone[0]}"
        )
    return ImageFolders(root.resolve().name, classes, *parts, told(root, skipped))


def from_list(path: Path, tree: ImageFolders) -> tuple[Tensor, str]:
    """The training images that a published list names, such as n01440764_10043.JPEG of the class folder n01440764.

    Returns their numbers (n,), ascending, and in words where they come from; UsageError: the list cannot be read, is
    empty, names a file that is not there, or twice; or a class has none.
    """
    where = f"--lists {path}: expected a list of image files, one a line"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} ({first_line(error)})") from None
    wanted = {f"{name.partition('_')[0]}{os.sep}{name}": name for name in names}
    paths = map(os.fsdecode, tree.train.names[tree.train.table[:, 1].numpy()])
    found = {wanted[path]: number for number, path in enumerate(paths) if path in wanted}
    missing = [name for name in names if name not in found]
    if missing or len(found) < len(names):
        problem = f"are not in train/, the first is {missing[0]}" if missing else "are listed twice"
        raise UsageError(f"{where}; {len(missing) or len(names) - len(found)} of {len(names)} images {problem}")
    images = torch.tensor(sorted(found.values()), dtype=torch.int64)
    if lacking := [name for label, name in enumerate(tree.classes) if label not in tree.train.labels[images]]:
        raise UsageError(f"{where}; {len(lacking)} of {len(tree.classes)} classes have none, the first is {lacking[0]}")
    return images, f"{len(images):,} images listed in {path.name}"


def stratified(percent: int, tree: ImageFolders) -> tuple[Tensor, str]:
    """That share of every class by a fixed seed, rounded down, but one image at least; and the same in words."""
    labels = tree.train.labels
    chosen = hold_out(labels, percent / 100, SPLIT_SEED)
    lacking = torch.bincount(labels[chosen], minlength=len(tree.classes)) == 0
    chosen |= hold_out(labels, 1.0, SPLIT_SEED, at_most=1) & lacking[labels]
    images = chosen.nonzero().flatten()
    return images, f"{len(images):,} images, {percent} % of each class or one, by a fixed seed, not a published list"


def training_view(settings: ReadingSettings) -> View:
    """A random part of an image, flipped or not: (C, H, W) to (C, side, side) float32.

    Source: evaluate.py of facebookresearch/barlowtwins; bilinear, where pretraining is bicubic.
    """
    v2: Any = require("torchvision.transforms.v2", "--data")
    cut = [v2.RandomResizedCrop(settings.image_size), v2.RandomHorizontalFlip()]
    return cast("View", v2.Compose([*cut, as_float, settings.normalized]))


def centre_view(settings: ReadingSettings) -> View:
    """The centre of an image, with 1/8 of the shorter side cut off."""
    v2: Any = require("torchvision.transforms.v2", "--data")
    cut = [v2.Resize(round(settings.image_size * RESIZE)), v2.CenterCrop(settings.image_size)]
    return cast("View", v2.Compose([*cut, as_float, settings.normalized]))


class Views(Labelled):
    """A random view of an image, a pure function of (seed, epoch, index), and its label: −1 where it cannot be read."""

    def __init__(self, catalogue: ImageIndex, settings: ReadingSettings) -> None:
        super().__init__(catalogue, training_view(settings), settings)
        self.seed = settings.seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return super().__getitem__(index)


class EveryImage(EpochBatches):
    """This process's rows of all batches of an epoch, of the incomplete last one too, where it may have none."""

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in super().__iter__():
            yield batch[shard(len(batch))]


def training_images(catalogue: ImageIndex, settings: ReadingSettings) -> Loader:
    """Labelled views of the images, from workers that live as long; its ``batch_sampler.epoch`` is to be set."""
    order = EveryImage(len(catalogue), settings.batch_size, settings.seed)
    return _loader(Views(catalogue, settings), settings, order, persistent_workers=settings.workers > 0)


def centres(catalogue: ImageIndex, settings: ReadingSettings) -> Loader:
    """This process's part of the images, without augmentation and in their order."""
    own = range(len(catalogue))[shard(len(catalogue))]
    batches = [own[start : start + settings.batch_size] for start in range(0, len(own), settings.batch_size)]
    return _loader(Labelled(catalogue, centre_view(settings), settings), settings, batches)


def _loader(images: Labelled, settings: ReadingSettings, batches: Iterable[Any], **more: Any) -> Loader:
    pinned = torch.cuda.is_available() and (settings.device is None or settings.device.type == "cuda")
    shape = settings.channels, settings.image_size, settings.image_size
    more |= {"num_workers": settings.workers, "pin_memory": pinned, "collate_fn": partial(_collated, shape)}
    return Loader(images, settings.loader_timeout, batch_sampler=batches, **more)


def _collated(shape: tuple[int, ...], samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    if samples:
        images, labels = default_collate(samples)
        return images, labels
    return torch.empty(0, *shape), torch.empty(0, dtype=torch.int64)
