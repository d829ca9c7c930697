"""Which of the training images have labels: a published list of them, or the same share of every class."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from barlow_recipes.catalogue import Catalogue
from barlow_recipes.data import hold_out
from barlow_recipes.errors import UsageError, first_line
from barlow_recipes.labelled import paths_of

SPLIT_SEED = 0  # the same images for every --seed, so that runs can be compared


class LabelledPart(NamedTuple):
    images: Tensor  # (n,) their numbers in the catalogue, ascending
    source: str  # in words


def from_list(flag: str, path: Path, train: Catalogue, classes: list[str]) -> LabelledPart:
    """The images that a list names, one a line, such as n01440764_10043.JPEG of the class folder n01440764.

    Args:
        flag: that gave the path, for messages.
        path: of the list, such as SimCLR's ``imagenet_subsets/1percent.txt``.
        train: the images of all classes.
        classes: names of the class folders.

    Raises:
        UsageError: the list cannot be read, is empty, names a class or a file that is not there, or a file twice; or a
            class has none.
    """
    where = f"{flag} {path}"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: expected a list of image files, one a line ({first_line(error)})") from None
    if not names:
        raise UsageError(f"{where}: expected a list of image files, one a line; it is empty")
    _refuse(where, "listed twice", [name for name, count in Counter(names).items() if count > 1], len(names))
    folder = {name: name.partition("_")[0] for name in names}
    known = set(classes)
    unknown = [name for name in names if folder[name] not in known]
    _refuse(where, "of a class that train/ does not have", unknown, len(names))
    wanted = {f"{folder[name]}{os.sep}{name}": name for name in names}
    found = {wanted[path]: number for number, path in enumerate(paths_of(train)) if path in wanted}
    _refuse(where, "not in train/", [name for name in names if name not in found], len(names))
    images = torch.tensor(sorted(found.values()))
    counts = torch.bincount(train.labels[images], minlength=len(classes))
    lacking = (counts == 0).nonzero().flatten().tolist()
    if lacking:
        raise UsageError(
            f"{where}: expected an image of every class, {len(lacking)} of {len(classes)} have none, the first is "
            f"{classes[lacking[0]]}"
        )
    return LabelledPart(images, f"{len(images):,} images listed in {path.name}")


def _refuse(where: str, what: str, names: list[str], total: int) -> None:
    if names:
        raise UsageError(f"{where}: {len(names)} of {total} images are {what}, the first is {names[0]}")


def stratified(percent: int, train: Catalogue, classes: list[str]) -> LabelledPart:
    """That share of every class by a fixed seed, rounded down, but one image at least."""
    labels = train.labels
    chosen = hold_out(labels, percent / 100, SPLIT_SEED)
    lacking = torch.bincount(labels[chosen], minlength=len(classes)) == 0
    chosen |= hold_out(labels, 1.0, SPLIT_SEED, at_most=1) & lacking[labels]
    source = f"{int(chosen.sum()):,} images, {percent} % of each class by a fixed seed, not a published list"
    if lacking.any():
        source += f"; one image for each of {int(lacking.sum())} classes where that is less than one"
    return LabelledPart(chosen.nonzero().flatten(), source)
