"""Any tree of image files with one folder per class, as torchvision's ImageFolder reads it; ImageNet is one."""

import os
from pathlib import Path

import torch

from barlow_recipes.catalogue import WHOLE_FILE, Catalogue
from barlow_recipes.errors import UsageError, require

PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of a data set


def index_folder(root: Path) -> Catalogue:
    """The image files of every class folder, by class and path.

    Raises:
        UsageError: no such folder, no class folders, or an empty class.
    """
    datasets = require("torchvision.datasets.folder", "--data")
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise UsageError(
            f"--data {root}: no class folders. Put the images into one folder per class, or all into {root / 'all'}"
        )
    if len(classes) > 1 and {name.lower() for name in classes} <= PARTS:
        raise UsageError(
            f"--data {root}: {', '.join(classes)} are no classes. Give the part to pretrain on, such as "
            f"{root / classes[0]}"
        )
    numbers = {name: label for label, name in enumerate(classes)}
    samples = datasets.make_dataset(str(root), numbers, datasets.IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        raise UsageError(
            f"--data {root}: no image in {len(empty)} of {len(classes)} class folders, the first is "
            f"{classes[empty[0]]}. Remove it or fill it ({', '.join(datasets.IMG_EXTENSIONS)})"
        )
    samples.sort(key=lambda sample: (sample[1], sample[0]))
    whole = torch.full((len(samples),), WHOLE_FILE)
    return Catalogue.of(
        root,
        files=(path.removeprefix(f"{root}{os.sep}") for path, _ in samples),
        labels=torch.tensor([label for _, label in samples]),
        file=torch.arange(len(samples)),
        offset=torch.zeros_like(whole),
        size=whole,
    )
