"""Which of the training images have labels: a published list of them, or the same share of every class."""

import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from barlow_recipes.data import hold_out
from barlow_recipes.errors import UsageError, first_line
from barlow_recipes.labelled import Tree, paths_of

SPLIT_SEED = 0  # the same images for every --seed, so that runs can be compared


def from_list(path: Path, tree: Tree) -> tuple[Tensor, str]:
    """The training images that a list names, such as n01440764_10043.JPEG of the class folder n01440764.

    Returns:
        Their numbers (n,), ascending; and in words, where they come from.

    Raises:
        UsageError: the list cannot be read, is empty, names a file that is not there, or twice; or a class has none.
    """
    where = f"--lists {path}: expected a list of image files, one a line"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} ({first_line(error)})") from None
    if not names:
        raise UsageError(f"{where}; it is empty")
    wanted = {f"{name.partition('_')[0]}{os.sep}{name}": name for name in names}
    found = {wanted[path]: number for number, path in enumerate(paths_of(tree.train)) if path in wanted}
    images = torch.tensor(sorted(found.values()), dtype=torch.int64)
    counts = torch.bincount(tree.train.labels[images], minlength=len(tree.classes))
    problems = {
        "images are listed twice": (len(names), [name for name, count in Counter(names).items() if count > 1]),
        "images are not in train/": (len(names), [name for name in names if name not in found]),
        "classes have none": (len(counts), [tree.classes[label] for label in (counts == 0).nonzero()]),
    }
    for problem, (of, bad) in problems.items():
        if bad:
            raise UsageError(f"{where}; {len(bad)} of {of} {problem}, the first is {bad[0]}")
    return images, f"{len(images):,} images listed in {path.name}"


def stratified(percent: int, tree: Tree) -> tuple[Tensor, str]:
    """That share of every class by a fixed seed, rounded down, but one image at least; and the same in words."""
    labels = tree.train.labels
    chosen = hold_out(labels, percent / 100, SPLIT_SEED)
    lacking = torch.bincount(labels[chosen], minlength=len(tree.classes)) == 0
    chosen |= hold_out(labels, 1.0, SPLIT_SEED, at_most=1) & lacking[labels]
    images = chosen.nonzero().flatten()
    return images, f"{len(images):,} images, {percent} % of each class or one, by a fixed seed, not a published list"
