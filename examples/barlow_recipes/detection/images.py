"""Annotated images for a detector: read, flipped, in batches, from worker processes.

No random state travels from step to step: the order is a function of (seed, epoch), a flip of (seed, epoch, index).
"""

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes

from barlow_recipes import distributed
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.detection.data import DetectionData, Example
from barlow_recipes.detection.settings import Settings
from barlow_recipes.errors import Aborted, UsageError, require
from barlow_recipes.images import Loader

Target = dict[str, Tensor]
Item = tuple[Tensor | None, Target, int]  # of one image, as in a batch; None where none could be read
TRIES = 32  # images in a row that cannot be read end the run


class Batch(NamedTuple):
    """Images, (3, H, W) uint8 of any sizes, and what is on them; ``unreadable`` were replaced by others or left out."""

    images: list[Tensor]
    targets: list[Target]
    unreadable: int


class Images(Dataset[Item]):
    """The images of a run, by (epoch, index) those to train on, by (None, index) those of the test; and their batches.

    In training half of them are flipped, and one that cannot be read is replaced by the next; in the test it is not.
    Of every batch these are this process's rows.
    """

    def __init__(self, data: DetectionData, settings: Settings, *, pin_memory: bool = False) -> None:
        count, batch_size = len(data.train.examples), settings.batch_size
        if count < batch_size:
            raise UsageError(f"--batch-size {batch_size}: expected at most all annotated images, {count}")
        self.data, self.settings, self.pin_memory = data, settings, pin_memory
        rows = distributed.own_rows(batch_size)
        self.own = rows.stop - rows.start
        self.order = EpochBatches(count, batch_size, settings.seed, rows)

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        epoch, index = key
        examples = self.data.test.examples if epoch is None else self.data.train.examples
        tries = 1 if epoch is None else min(TRIES, len(examples))
        for failures in range(tries):
            try:
                image, target = read(examples[(index + failures) % len(examples)], masks=self.data.masks)
            except OSError:
                continue
            if epoch is not None and random.Random(seed_of(self.settings.seed, epoch, index)).random() < 0.5:
                image, target = flipped(image, target)
            return image, target, failures
        return None, {}, tries

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches to train on from a step of the run on, epoch after epoch."""
        epoch, first = divmod(step, len(self.order))
        while True:
            yield from self.of_epoch(epoch, first)
            epoch, first = epoch + 1, 0

    def of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on; Aborted: too many images in a row cannot be read."""
        order = copy.copy(self.order)  # of this epoch: a test amid the training has one of its own
        order.epoch, order.first_step = epoch, first_step
        for batch in self._loader(order):
            if len(batch.images) < self.own:
                raise Aborted(f"{TRIES} images in a row, or all of fewer, cannot be read: is --data whole?")
            yield batch

    def of_test(self) -> Iterator[Batch]:
        """Every image of the test once, spread over the processes."""
        own = range(distributed.rank(), len(self.data.test.examples), distributed.world_size())
        starts = range(0, len(own), self.own)
        return iter(self._loader([[(None, index) for index in own[start : start + self.own]] for start in starts]))

    def _loader(self, batches: Any) -> Loader:
        patience, workers = self.settings.loader_timeout, self.settings.workers
        how: dict[str, Any] = {"num_workers": workers, "pin_memory": self.pin_memory, "collate_fn": _collated}
        return Loader(self, patience, batch_sampler=batches, **how)


def read(example: Example, *, masks: bool) -> tuple[Tensor, Target]:
    """An image and its objects; OSError: it cannot be read, or is not of the size that is annotated."""
    path, size, boxes, labels, ignored, runs = example
    image = decode(path.read_bytes(), str(path))
    if image.shape[1:] != size:
        raise OSError(f"{path}: expected the annotated size")
    target = {"boxes": boxes, "labels": labels, "iscrowd": ignored.astype(np.int64)}
    if masks:
        decode_runs = require("pycocotools.mask", "masks").decode
        each = [decode_runs({"size": size, "counts": counts}) for counts in runs.split()]
        target["masks"] = np.stack(each) if each else np.zeros((0, *size), np.uint8)
    return image, {name: torch.from_numpy(value) for name, value in target.items()}


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left to right."""
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
    mirrored = {"boxes": horizontal_flip(boxes).as_subclass(Tensor)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image.flip(2), target | mirrored


def _collated(items: list[Item]) -> Batch:
    read = [(image, target) for image, target, _ in items if image is not None]
    return Batch([image for image, _ in read], [target for _, target in read], sum(item[2] for item in items))
