"""Annotated images for a detector: read, flipped, in batches, from worker processes.

No random state travels from step to step: the order is a function of (seed, epoch), a flip of (seed, epoch, index).
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset
from torchvision.transforms.v2.functional import horizontal_flip_bounding_boxes, to_dtype
from torchvision.tv_tensors import BoundingBoxFormat

from barlow_recipes import distributed
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.detection.data import DetectionData, Example
from barlow_recipes.detection.settings import Settings
from barlow_recipes.errors import Aborted, UsageError, require
from barlow_recipes.images import Loader
from barlow_recipes.pixels import decode

Target = dict[str, Tensor]
Item = tuple[Tensor | None, Target, int]  # of one image, as in a batch; None where none could be read
TRIES = 32  # images in a row that cannot be read end the run


class Batch(NamedTuple):
    """Images, (3, H, W) uint8 of any sizes, and what is on them; ``unreadable`` were replaced by others or left out."""

    images: list[Tensor]
    targets: list[Target]
    unreadable: int

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Target]]:
        """As torchvision's detectors take them: the images from 0 to 1."""
        on = partial(Tensor.to, device=device, non_blocking=True)
        targets = [{name: on(value) for name, value in target.items()} for target in self.targets]
        return [to_dtype(on(image), scale=True) for image in self.images], targets


class Images(Dataset[Item]):
    """The images of a run, by (epoch, index) those to train on, by (None, index) those of the test; and their batches.

    In training half of them are flipped, and one that cannot be read is replaced by the next; in the test it is not.
    Of every batch these are this process's rows.
    """

    def __init__(self, data: DetectionData, settings: Settings, *, pin_memory: bool = False) -> None:
        self.data, self.settings, self.pin_memory = data, settings, pin_memory
        count, batch_size, processes = len(data.train.examples), settings.batch_size, distributed.world_size()
        if not processes <= batch_size <= count:
            expected = f"from {processes}, one for each process, to {count}, all annotated images"
            raise UsageError(f"--batch-size {batch_size}: expected {expected}")
        self.rows = distributed.own_rows(batch_size)
        self.own = self.rows.stop - self.rows.start

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        epoch, index = key
        examples = self.data.test.examples if epoch is None else self.data.train.examples
        tries = 1 if epoch is None else min(TRIES, len(examples))
        for failures in range(tries):
            with suppress(OSError):
                image, target = read(examples[(index + failures) % len(examples)], masks=self.data.masks)
                if epoch is not None and random.Random(seed_of(self.settings.seed, epoch, index)).random() < 0.5:
                    image, target = flipped(image, target)
                return image, target, failures
        return None, {}, tries

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches to train on from a step on, without an end; Aborted: too many images in a row cannot be read."""
        for batch in self._batches(self._keys(step)):
            if len(batch.images) < self.own:
                raise Aborted(f"{TRIES} images in a row, or all of fewer, cannot be read: is --data whole?")
            yield batch

    def _keys(self, step: int) -> Iterator[list[tuple[int, int]]]:
        order = EpochBatches(len(self.data.train.examples), self.settings.batch_size, self.settings.seed, self.rows)
        order.epoch, order.first_step = divmod(step, len(order))
        while True:
            yield from order
            order.epoch, order.first_step = order.epoch + 1, 0

    def of_test(self) -> Iterator[Batch]:
        """Every image of the test once, spread over the processes."""
        own = range(distributed.rank(), len(self.data.test.examples), distributed.world_size())
        return self._batches(BatchSampler([(None, index) for index in own], self.own, drop_last=False))

    def _batches(self, keys: Any) -> Iterator[Batch]:
        how = {"num_workers": self.settings.workers, "pin_memory": self.pin_memory, "collate_fn": _collated}
        return iter(Loader(self, self.settings.loader_timeout, batch_sampler=keys, **how))


def read(example: Example, *, masks: bool) -> tuple[Tensor, Target]:
    """An image and its objects; OSError: it cannot be read, or is not of the size that is annotated."""
    path, size, boxes, labels, ignored, runs = example
    image = decode(path.read_bytes(), str(path))
    if image.shape[1:] != size:
        raise OSError(f"{path}: expected the annotated size")
    target = {"boxes": boxes, "labels": labels, "iscrowd": ignored}
    if masks:
        decoded = require("pycocotools.mask", "masks").decode
        each = [decoded({"size": size, "counts": counts}) for counts in runs]
        target["masks"] = np.array(each, np.uint8).reshape(-1, *size)
    return image, {name: torch.from_numpy(value) for name, value in target.items()}


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left to right."""
    boxes = horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, image.shape[1:])
    masks = {"masks": target["masks"].flip(2)} if "masks" in target else {}
    return image.flip(2), target | {"boxes": boxes} | masks


def _collated(items: list[Item]) -> Batch:
    read = [(image, target) for image, target, _ in items if image is not None]
    return Batch([image for image, _ in read], [target for _, target in read], sum(item[2] for item in items))
