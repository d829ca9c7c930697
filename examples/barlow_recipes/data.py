"""What every data set of the example offers: pairs of views to train on, labelled images to probe with.

No random state travels from step to step. The order of the images is a pure function of (seed, epoch) and each view
one of (seed, epoch, position, view), so a run that stops and resumes, with any number of workers, sees the same pixels.
Several processes share every batch: each takes its rows of it, which have the pixels that one process would see.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from barlow_recipes.pixels import USUAL, PixelSettings
from barlow_recipes.views import UnfinishedView

WHOLE = slice(None)
MemoryView = Callable[[Tensor, torch.Generator], Tensor]


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that is a pure function of the numbers, the same on every platform."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Batch(NamedTuple):
    """Two views of the same images; ``unreadable`` of them had to be replaced by others."""

    views: tuple[Tensor | UnfinishedView, Tensor | UnfinishedView]  # each (N, C, H, W), to be finished on the device
    unreadable: int


class Pairs(Protocol):
    """Training data: its length is the number of batches in an epoch."""

    first_unreadable: str  # the file that could not be read, and why; "" for none

    def __len__(self) -> int: ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...


class Probe(NamedTuple):
    """Labelled images, in batches of (images, labels), that measure what the encoder has learned.

    Accuracy is measured on ``queries``; ``bank`` holds the neighbours and the labelled examples. A label below 0 marks
    an image that cannot be read.
    """

    bank: Iterable[tuple[Tensor, Tensor]]
    queries: Iterable[tuple[Tensor, Tensor]]
    linear: bool  # whether to fit a linear probe to the whole bank
    labels_per_class: tuple[int, ...]  # the sizes of the few-label probes' training sets


@dataclass(frozen=True)
class PretrainingData:
    """A data set, split before pretraining begins."""

    name: str
    images: int  # in the pretraining part
    pairs: Pairs
    monitor: Probe | None  # while training
    final: Probe | None  # once, at the end: on images that the monitor has not seen, or, of a folder, the monitor again
    notes: tuple[str, ...] = ()
    pixels: PixelSettings = USUAL  # how many channels there are, and what views are normalised by
    tolerated_unreadable: int = 0  # per epoch
    fingerprint: str = ""  # of what and where the images are; the same on every process, or their rows do not fit


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), or some rows of each: one shuffle per epoch, the incomplete last batch dropped.

    Set ``epoch`` and ``first_step`` before iterating. The indices carry the epoch, so workers that outlive an epoch
    need no message.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rows: slice = WHOLE) -> None:
        self.images, self.batch_size, self.seed, self.rows = images, batch_size, seed, rows
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for step in range(self.first_step, len(self)):
            start = step * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size][self.rows]]


class MemoryPairs:
    """Two views of images in memory: decided about for whole batches, whichever rows of them are wanted.

    Args:
        images: how many.
        views: what makes view 1 and view 2 of a batch, from the images' numbers (N,), by the generator alone, and
            returns the rows that are wanted.
        batch_size: of all processes together.
        seed: of order and views.
    """

    first_unreadable = ""

    def __init__(self, images: int, views: Sequence[MemoryView], batch_size: int, seed: int) -> None:
        self.views, self.seed = views, seed
        self.order = EpochBatches(images, batch_size, seed)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.first_step = epoch, first_step
        for step, keys in enumerate(self.order, start=first_step):
            numbers = torch.tensor([index for _, index in keys])
            generators = (torch.Generator().manual_seed(seed_of(self.seed, epoch, step, view)) for view in (1, 2))
            view1, view2 = (view(numbers, own) for view, own in zip(self.views, generators, strict=True))
            yield Batch((view1, view2), unreadable=0)


def hold_out(labels: Tensor, fraction: float, seed: int, at_most: int | None = None) -> Tensor:
    """Choose the same fraction of every class.

    Args:
        labels: (N,) integers.
        fraction: of each class, between 0 and 1, rounded down.
        seed: of the choice.
        at_most: images per class; None for no limit.

    Returns:
        (N,) booleans, True for the chosen.
    """
    generator = torch.Generator().manual_seed(seed_of(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    for members in grouped.split(torch.bincount(labels).tolist()):
        count = int(len(members) * fraction)
        chosen[members[: count if at_most is None else min(count, at_most)]] = True
    return chosen
