"""Annotated images for a detector: read, flipped, in batches, from worker processes.

As in the pretraining, no random state travels from step to step: the order of the images is a pure function of (seed,
epoch), and whether one is flipped is one of (seed, epoch, index).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coding
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes

from barlow_recipes import distributed
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.detection.data import Example
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.images import Loader

Target = dict[str, Tensor]
Item = tuple[Tensor | None, Target, int]  # of one image, as in a batch; None where none could be read
TRIES = 32  # images in a row that cannot be read end the run


class Batch(NamedTuple):
    """Images, (3, H, W) uint8 of any sizes, and what is on them; ``unreadable`` were replaced by others or left out."""

    images: list[Tensor]
    targets: list[Target]
    unreadable: int


class Annotated(Dataset[Item]):
    """Images by (epoch, index): half of them flipped, one that cannot be read replaced by the next.

    In the test the epoch is None: no image is flipped or replaced.
    """

    def __init__(self, examples: Sequence[Example], masks: bool, seed: int = 0) -> None:
        self.examples, self.masks, self.seed = examples, masks, seed

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        epoch, index = key
        tries = 1 if epoch is None else min(TRIES, len(self.examples))
        for failures in range(tries):
            try:
                image, target = self.read((index + failures) % len(self.examples))
            except OSError:
                continue
            if epoch is not None and random.Random(seed_of(self.seed, epoch, index)).random() < 0.5:
                image, target = flipped(image, target)
            return image, target, failures
        return None, {}, tries

    def read(self, index: int) -> tuple[Tensor, Target]:
        """An image and its objects; OSError: it cannot be read, or is not of the size that is annotated."""
        path, size, boxes, labels, ignored, runs = self.examples[index]
        image = decode(path.read_bytes(), str(path))
        if image.shape[1:] != size:
            raise OSError(f"{path}: expected the annotated size")
        masks = [coding.decode({"size": size, "counts": counts}) for counts in runs.split()]
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "iscrowd": torch.from_numpy(ignored).long(),
            "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), np.uint8)),
        }
        return image, {name: value for name, value in target.items() if self.masks or name != "masks"}


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left to right."""
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
    mirrored = {"boxes": horizontal_flip(boxes).as_subclass(Tensor)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image.flip(2), target | mirrored


class TrainingBatches:
    """This process's rows of the batches of an epoch."""

    def __init__(self, examples: Sequence[Example], *, masks: bool, batch_size: int, seed: int, **loading: Any) -> None:
        if len(examples) < batch_size:
            raise UsageError(f"--batch-size {batch_size}: expected at most all annotated images, {len(examples)}")
        rows = distributed.own_rows(batch_size)
        self.order = EpochBatches(len(examples), batch_size, seed, rows)
        self.own = rows.stop - rows.start
        self.loader = _loader(Annotated(examples, masks, seed), self.order, **loading)

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from a step of the run on, epoch after epoch."""
        epoch, first = divmod(step, len(self.order))
        while True:
            yield from self.of_epoch(epoch, first)
            epoch, first = epoch + 1, 0

    def of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on; Aborted: too many images in a row cannot be read."""
        self.order.epoch, self.order.first_step = epoch, first_step
        for batch in self.loader:
            if len(batch.images) < self.own:
                raise Aborted(
                    f"{TRIES} images in a row cannot be read, or none of all: is the storage of --data whole?"
                )
            yield batch


def images_of_test(examples: Sequence[Example], *, masks: bool, batch_size: int, **loading: Any) -> Loader:
    """This process's share of the images of the test, every one of them once."""
    own = [(None, index) for index in range(distributed.rank(), len(examples), distributed.world_size())]
    rows = max(1, batch_size // distributed.world_size())
    batches = [own[start : start + rows] for start in range(0, len(own), rows)]
    return _loader(Annotated(examples, masks), batches, **loading)


def _loader(dataset: Annotated, batches: Any, *, workers: int, **loading: Any) -> Loader:
    persistent = {"num_workers": workers, "persistent_workers": workers > 0}
    return Loader(dataset, batch_sampler=batches, collate_fn=_collated, **persistent, **loading)


def _collated(items: list[Item]) -> Batch:
    read = [(image, target) for image, target, _ in items if image is not None]
    return Batch([image for image, _ in read], [target for _, target in read], sum(item[2] for item in items))
