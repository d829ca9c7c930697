"""The built-in data as tensors: what each task shows to its encoder, and which of the images have labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes.data import hold_out, seed_of
from barlow_recipes.digits import augment_digits, load_digits
from barlow_recipes.fashion_mnist import FINAL_BANK_PER_CLASS, NAME, SIDE, load_fashion_mnist
from barlow_recipes.pixels import as_float, normalized
from barlow_recipes.settings import PRESETS, read_settings
from barlow_recipes.views import PAPER, colored, crop_small, draw, grayscale, small_views

DIGITS, FASHION = "digits", NAME
CLASSES = 10  # of either
DIGIT_SIDE = 8
TOGETHER = 512  # images that pass through an encoder at once
SPLIT_SEED = 0  # of the images among which neighbours are sought: the same for every seed
KNN, MOST = "knn", "most"
COLUMNS = (KNN, "1", "10", "1%", "10%", MOST)  # labels of each class, or a share of all labels


class Labelled(NamedTuple):
    images: Tensor  # (N, C, H, W), uint8 or float32 in [0, 1]
    labels: Tensor  # (N,)


class DataSet(NamedTuple):
    """All images of a data set; pretraining sees ``train`` without its labels, and nothing is learned from ``test``."""

    train: Labelled
    test: Labelled
    bank: Tensor  # numbers of the training images among which neighbours are sought; the most that have labels

    def labelled(self, column: str, seed: int) -> Tensor:
        """The numbers of the training images that have labels; more labels of a seed contain the fewer."""
        if column in (KNN, MOST):
            return self.bank
        labels = self.train.labels
        count = labels_per_class(column, len(labels))
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
        return torch.cat([shuffled[labels[shuffled] == label][:count] for label in range(CLASSES)])


def labels_per_class(column: str, images: int) -> int:
    """How many images of each class have labels, of so many images in ten classes of about one size."""
    share = column.removesuffix("%")
    return max(1, images * int(share) // 100 // CLASSES) if share != column else int(column)


@cache  # a process does several jobs, and Fashion-MNIST takes seconds to read
def load(name: str, source: str) -> DataSet:
    """Read digits or, from ``source``, Fashion-MNIST, split and coloured as for pretraining; nobody changes it.

    Raises:
        UsageError: a file is missing or damaged.
    """
    if name == DIGITS:
        parts: Any = load_digits(1, seed=0, monitor=False).final
        train, test = (Labelled(*map(torch.cat, zip(*part, strict=True))) for part in (parts.bank, parts.queries))
    else:
        parts = load_fashion_mnist(source, recipes=PAPER, batch_size=1, seed=0, monitor=False).final
        train, test = (Labelled(part.images, part.labels) for part in (parts.bank, parts.queries))  # all, not some
    bank = hold_out(train.labels, 1, SPLIT_SEED, FINAL_BANK_PER_CLASS)
    return DataSet(train, test, bank.nonzero()[:, 0])


@dataclass(frozen=True)
class Task:
    """An encoder, pretrained on one data set, and the images of the same or another one that it is to classify."""

    pretrained_on: str
    data: str
    title: str
    columns: tuple[str, ...]  # for neighbours and linear classifiers
    trained: tuple[str, ...]  # for training from scratch; the others would take most of the ten minutes
    fine_tuned: tuple[str, ...]  # and from the pretrained weights

    @property
    def name(self) -> str:
        return self.data if self.data == self.pretrained_on else f"{self.pretrained_on}-to-{self.data}"

    @property
    def arch(self) -> str:
        return str(PRESETS[self.pretrained_on]["arch"])

    def tries_without(self, column: str) -> bool:
        """Whether to train from scratch without augmentation, too: where it was not tried with fewer labels."""
        return self.data == self.pretrained_on and column != "10%"

    def plain(self, images: Tensor) -> Tensor:
        """What the encoder is to see of them: float32."""
        if self.data == DIGITS:
            return images if self.pretrained_on == DIGITS else _digits_as_fashion(images)
        return normalized(as_float(images)) if self.pretrained_on == FASHION else _fashion_as_digits(as_float(images))

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """And with the random changes that pretraining on these images makes."""
        if self.data == DIGITS:
            return self.plain(augment_digits(images, generator))
        recipes = read_settings(["--data", NAME], "").recipes()
        first, second = (draw(recipe, len(images), generator) for recipe in recipes)
        decisions = torch.where(torch.rand(len(images), 1, generator=generator) < 0.5, first, second)  # either view
        if self.pretrained_on == FASHION:
            return small_views(images, decisions)
        return _fashion_as_digits(colored(crop_small(as_float(images), decisions), decisions))

    def batches(self, part: Labelled, numbers: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images without augmentation, and their labels."""
        chosen = torch.arange(len(part.labels)) if numbers is None else numbers
        for some in chosen.split(TOGETHER):
            yield self.plain(part.images[some]), part.labels[some]


def _fashion_as_digits(pixels: Tensor) -> Tensor:
    """Colours to grey, 28×28 to 8×8 by the mean of the areas; of floats in [0, 1]."""
    return F.adaptive_avg_pool2d(grayscale(pixels, pixels)[:, :1], DIGIT_SIDE)


def _digits_as_fashion(pixels: Tensor) -> Tensor:
    """8×8 to 28×28 by bilinear interpolation, the grey in all three channels; of floats in [0, 1]."""
    larger = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return normalized(larger.repeat(1, 3, 1, 1))


TASKS = {
    task.name: task
    for task in (
        Task(DIGITS, DIGITS, "Digits", (KNN, "1", "10", MOST), ("1", "10", MOST), ()),
        Task(FASHION, FASHION, "Fashion-MNIST in random colours", COLUMNS, ("1", "10", "1%", "10%"), ("1%", "10%")),
        Task(FASHION, DIGITS, "Fashion-MNIST → digits", (KNN, "1", "10", MOST), ("10",), ()),
        Task(DIGITS, FASHION, "Digits → Fashion-MNIST", COLUMNS, ("10",), ()),
    )
}
