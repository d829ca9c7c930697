"""Annotated images for a detector: read, flipped, in batches, from worker processes.

As in the pretraining, no random state travels from step to step: the order of the images is a pure function of (seed,
epoch), and whether one is flipped is one of (seed, epoch, index).
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from barlow_recipes import distributed
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.detection.annotations import Example, decoded
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.images import Loader

Target = dict[str, Tensor]
TRIES = 32  # images in a row that cannot be read end the run


class Batch(NamedTuple):
    """Images, (3, H, W) uint8 of any sizes, and what is on them; ``unreadable`` were replaced by others or left out."""

    images: list[Tensor]
    targets: list[Target]
    unreadable: int


class Annotated(Dataset[tuple[Tensor | None, Target, int]]):
    """Base of the two parts: reads one image, with its boxes, labels and masks."""

    def __init__(self, examples: Sequence[Example], masks: bool) -> None:
        self.examples, self.masks = examples, masks

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int) -> tuple[Tensor, Target]:
        """An image and its objects, ``iscrowd`` where they are ignored.

        Raises:
            OSError: the image cannot be read, or is not of the size that is annotated.
        """
        example = self.examples[index]
        image = decode(example.path.read_bytes(), str(example.path))
        if image.shape[1:] != (example.height, example.width):
            raise OSError(f"{example.path}: expected the annotated size")
        target = {
            "boxes": torch.from_numpy(example.boxes),
            "labels": torch.from_numpy(example.labels),
            "iscrowd": torch.from_numpy(example.ignored).long(),
        }
        if self.masks:
            segmentations = json.loads(example.segmentations or "[]")
            target["masks"] = torch.from_numpy(decoded(segmentations, example.height, example.width))
        return image, target


class TrainingImages(Annotated):
    """By (epoch, index): half of them flipped from left to right, one that cannot be read replaced by the next."""

    def __init__(self, examples: Sequence[Example], masks: bool, seed: int) -> None:
        super().__init__(examples, masks)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, Target, int]:
        epoch, index = key
        for unreadable in range(min(TRIES, len(self))):
            try:
                image, target = self.read((index + unreadable) % len(self))
            except OSError:
                continue
            flip = random.Random(seed_of(self.seed, epoch, index)).random() < 0.5
            return *(flipped(image, target) if flip else (image, target)), unreadable
        return None, {}, TRIES


class TestImages(Annotated):
    """By index: as they are."""

    __test__ = False  # no class of tests

    def __getitem__(self, index: int) -> tuple[Tensor | None, Target, int]:
        try:
            return *self.read(index), 0
        except OSError:
            return None, {}, 1


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[2]
    mirrored = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image.flip(2), mirrored


def collated(items: list[tuple[Tensor | None, Target, int]]) -> Batch:
    read = [(image, target) for image, target, _ in items if image is not None]
    return Batch([image for image, _ in read], [target for _, target in read], sum(item[2] for item in items))


class TrainingBatches:
    """This process's rows of the batches of an epoch."""

    def __init__(self, examples: Sequence[Example], *, masks: bool, batch_size: int, seed: int, **loading: Any) -> None:
        if len(examples) < batch_size:
            raise UsageError(
                f"--batch-size {batch_size}: expected at most the number of annotated images, {len(examples)}"
            )
        self.order = EpochBatches(len(examples), batch_size, seed, distributed.own_rows(batch_size))
        self.loader = _loader(TrainingImages(examples, masks, seed), batch_sampler=self.order, **loading)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on.

        Raises:
            Aborted: images in a row cannot be read.
        """
        self.order.epoch, self.order.first_step = epoch, first_step
        for batch in self.loader:
            if len(batch.images) < len(range(*self.order.rows.indices(self.order.batch_size))):
                raise Aborted(
                    f"{TRIES} images in a row cannot be read, or none of all: is the storage of --data whole?"
                )
            yield batch


def test_batches(examples: Sequence[Example], *, masks: bool, batch_size: int, **loading: Any) -> Loader:
    """This process's share of the images of the test, every one of them once."""
    own = range(distributed.rank(), len(examples), distributed.world_size())
    batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    return _loader(TestImages(examples, masks), batch_sampler=batches, **loading)


test_batches.__test__ = False  # type: ignore[attr-defined]


def _loader(dataset: Annotated, *, batch_sampler: Any, workers: int, timeout: float, pin_memory: bool) -> Loader:
    return Loader(
        dataset,
        timeout,
        batch_sampler=batch_sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        collate_fn=collated,
    )
