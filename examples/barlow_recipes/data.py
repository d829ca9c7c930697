"""What every data set of the example offers: views to train on, labelled images to probe with.

The order is a pure function of (seed, epoch), each view one of (seed, epoch, position, view): a run that resumes, with
any number of workers, sees the same pixels, and of several processes each takes its rows of every batch.
"""

import hashlib
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from barlow_recipes.errors import UsageError
from barlow_recipes.pixels import USUAL, PixelSettings, as_float, normalized
from barlow_recipes.views import PartialView

WHOLE = slice(None)
SPLIT_SEED = 0  # what is held out is the same for every --seed, so that runs can be compared


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that is a pure function of the numbers, the same on every platform."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Batch(NamedTuple):
    """Views of the same images; ``unreadable`` of them had to be replaced by others."""

    views: tuple[Tensor | PartialView, ...]  # each (N, C, H, W), finished on the device; local crops last
    unreadable: int


class Probe(NamedTuple):
    """Labelled images, in batches of (images, labels); a label below 0 marks an image that cannot be read."""

    bank: Iterable[tuple[Tensor, Tensor]]  # the neighbours and the labelled examples
    queries: Iterable[tuple[Tensor, Tensor]]  # to measure the accuracy on
    linear: bool  # whether to fit a linear probe to the whole bank
    labels_per_class: tuple[int, ...]  # the sizes of the few-label probes' training sets


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), or some rows of each: one shuffle per epoch, the incomplete last batch dropped."""

    def __init__(self, images: int, batch_size: int, seed: int, rows: slice = WHOLE) -> None:
        self.images, self.batch_size, self.seed, self.rows = images, batch_size, seed, rows
        self.epoch = self.first_step = 0  # to be set before iterating

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for step in range(self.first_step, len(self)):
            start = step * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size][self.rows]]


class PairLoader:
    """Training data, in the order's batches."""

    order: EpochBatches
    first_unreadable = ""  # the file that could not be read, and why

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...


class MemoryPairs(PairLoader):
    """Views of so many images in memory, by one function each: of a batch's numbers (N,) and a generator."""

    def __init__(self, images: int, views: Sequence[Callable[..., Tensor]], batch_size: int, seed: int) -> None:
        self.views, self.seed, self.order = views, seed, EpochBatches(images, batch_size, seed)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.first_step = epoch, first_step
        for step, keys in enumerate(self.order, start=first_step):
            numbers = torch.tensor([index for _, index in keys])
            seeds = (seed_of(self.seed, epoch, step, view) for view in range(1, len(self.views) + 1))
            generators = (torch.Generator().manual_seed(seed) for seed in seeds)
            made = (view(numbers, own) for view, own in zip(self.views, generators, strict=True))
            yield Batch(tuple(made), unreadable=0)


class PlainBatches:
    """Labelled images in memory, without augmentation, of which (N,) booleans choose; uint8 is normalised."""

    def __init__(self, images: Tensor, labels: Tensor, chosen: Tensor) -> None:
        self.images, self.labels, self.chosen = images, labels, chosen

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers in self.chosen.nonzero()[:, 0].split(512):
            images = self.images[numbers]
            yield images if images.is_floating_point() else normalized(as_float(images)), self.labels[numbers]


@dataclass(frozen=True)
class PretrainingData:
    """A data set, split before pretraining begins."""

    name: str
    images: int  # in the pretraining part
    pairs: PairLoader
    monitor: Probe | None  # while training
    final: Probe | None  # once, at the end: on images that the monitor has not seen, or, of a folder, the monitor again
    notes: tuple[str, ...] = ()
    pixels: PixelSettings = USUAL  # how many channels there are, and what views are normalised by
    tolerated_unreadable: int = 0  # per epoch
    fingerprint: str = ""  # of what and where the images are; the same on every process, or their rows do not fit

    def __post_init__(self) -> None:
        if not len(self.pairs):
            size = self.pairs.order.batch_size
            raise UsageError(f"--batch-size {size} is more than the {self.images} images to pretrain on")


def hold_out(labels: Tensor, fraction: float, seed: int = SPLIT_SEED, at_most: int = sys.maxsize) -> Tensor:
    """Choose the same fraction of every class, rounded down: (N,) labels to (N,) booleans."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members in grouped.split(torch.bincount(labels).tolist()):
        chosen[members[: min(int(len(members) * fraction), at_most)]] = True
    return chosen
