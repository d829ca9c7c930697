"""Images that a Dataset gives by their number: one of Hugging Face's on disk, or the user's own."""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barlow_recipes.errors import UsageError, first_line, require

LABELS = ("label", "labels", "fine_label", "class", "target")  # the columns that may have them, the first that is there


@dataclass(frozen=True)
class Items:
    """Some of a Dataset's images, as :class:`~barlow_recipes.files.Catalogue` is of encoded ones."""

    name: str
    dataset: Any  # by numbers
    column: str | None  # with the image; None: an item is one, or begins with one
    labels: Tensor  # (N,), from 0; all 0 without labels
    numbers: Tensor  # (N,)

    @classmethod
    def of(cls, name: str, dataset: Any, column: str | None, labels: Any) -> "Items":
        """All of them. Labels of any kind become numbers; there are none if there is not one for each image."""
        images = len(dataset)
        values = [
            label.item() if isinstance(label, Tensor) else label
            for label in (labels if isinstance(labels, Iterable) else [])
        ]
        if len(values) != images or any(isinstance(value, (list, dict)) or value is None for value in values):
            values = [0] * images
        classes = torch.from_numpy(np.unique(values, return_inverse=True)[1])
        return cls(name, dataset, column, classes, torch.arange(images))

    def __len__(self) -> int:
        return len(self.numbers)

    def subset(self, indices: Tensor) -> "Items":
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])

    def fingerprint(self) -> str:
        """Of which images there are; of what they show, only as far as the dataset has a fingerprint of its own."""
        own = getattr(self.dataset, "_fingerprint", "")
        facts = f"{self.name} {own} {self.labels.tolist()} {self.numbers.tolist()}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def read(self, index: int) -> tuple[Any, str]:
        """A Pillow image, bytes, an array or a Tensor, and what to call it."""
        number = int(self.numbers[index])
        item = self.dataset[number]
        if self.column is not None:  # Hugging Face's, not decoded
            item = item[self.column]["bytes"] or Path(item[self.column]["path"]).read_bytes()
        return item[0] if isinstance(item, (tuple, list)) else item, f"{self.name}, image {number}"


def from_hugging_face(path: Path, parquet: Sequence[Path] = ()) -> Items:
    """What ``datasets`` has saved to a folder, of splits the one called train; or files of .parquet.

    Raises:
        UsageError: it cannot be read, or has no column of images.
    """
    hugging_face = require("datasets", f"--data {path}")
    try:
        files = [str(file) for file in parquet]
        found = hugging_face.Dataset.from_parquet(files) if files else hugging_face.load_from_disk(str(path))
        found = found["train"] if isinstance(found, dict) else found
    except Exception as error:  # pyarrow and datasets have their own
        raise UsageError(
            f"--data {path}: expected a data set, of splits one called train ({first_line(error)})"
        ) from None
    columns = found.features
    image = next((name for name, feature in columns.items() if isinstance(feature, hugging_face.Image)), None)
    if image is None:
        raise UsageError(f"--data {path}: no column of images among {', '.join(columns)}")
    found = found.cast_column(image, hugging_face.Image(decode=False))
    label = next((name for name in LABELS if name in columns), None)
    return Items.of(str(path), found, image, found[label] if label else None)


def from_callable(source: str) -> Items:
    """The Dataset that ``module:callable`` returns, whose items are images or begin with one.

    Its labels are those of its attribute ``targets`` or ``labels``: nothing is read to find them. The image of a number
    must always be the same, or a run that is resumed is another.

    Raises:
        UsageError: there is no such callable, or it does not return a Dataset with a length.
    """
    module, _, name = source.partition(":")
    sys.path.insert(0, "")  # of the working directory
    try:
        dataset = getattr(importlib.import_module(module), name)()
        dataset[0]
        return Items.of(source, dataset, None, getattr(dataset, "targets", getattr(dataset, "labels", None)))
    except (ImportError, AttributeError, TypeError, LookupError) as error:
        raise UsageError(
            f"--data {source}: expected a callable that returns a Dataset with images ({first_line(error)})"
        ) from None
    finally:
        sys.path.remove("")
