"""Images that a Dataset gives by their number: one of Hugging Face's on disk, or the user's own."""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        item, name = self.dataset[number], f"{self.name}, image {number}"
        if self.column is not None:
            item = item[self.column]
        elif isinstance(item, (tuple, list)):
            item = item[0]
        if isinstance(item, dict):  # Hugging Face's, not decoded
            item = item["bytes"] or Path(item["path"]).read_bytes()
        return item, name


def from_hugging_face(path: Path, parquet: Sequence[Path] = ()) -> Items:
    """What ``datasets`` has saved to a folder, of splits the one called train; or files of .parquet.

    Raises:
        UsageError: it cannot be read, or has no column of images.
    """
    hugging_face = require("datasets", f"--data {path}")
    try:
        if parquet:
            found = hugging_face.Dataset.from_parquet([str(file) for file in parquet])
        else:
            found = hugging_face.load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets have their own
        raise UsageError(f"--data {path}: cannot be read as a data set ({first_line(error)})") from None
    if isinstance(found, dict):
        if "train" not in found:
            raise UsageError(
                f"--data {path}: expected a split called train among {', '.join(found)}; give one's folder"
            )
        found = found["train"]
    columns = found.features
    images = [
        name
        for name, feature in columns.items()
        if isinstance(feature, hugging_face.Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})
    ]
    if not images:
        raise UsageError(f"--data {path}: no column of images among {', '.join(columns)}")
    if isinstance(columns[images[0]], hugging_face.Image):
        found = found.cast_column(images[0], hugging_face.Image(decode=False))
    label = next((name for name in LABELS if name in columns), None)
    return Items(
        str(path), found, images[0], _numbered(found[label] if label else None, len(found)), torch.arange(len(found))
    )


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
        images = len(dataset)
        dataset[0]
    except (ImportError, AttributeError, TypeError, LookupError) as error:
        raise UsageError(
            f"--data {source}: expected a callable that returns a Dataset with images ({first_line(error)})"
        ) from None
    finally:
        sys.path.remove("")
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    return Items(source, dataset, None, _numbered(labels, images), torch.arange(images))


def _numbered(labels: Any, images: int) -> Tensor:
    """Labels of any kind as numbers from 0; all 0 if there is not one for each image."""
    each = labels if isinstance(labels, Iterable) else []  # a Dataset's attribute of that name may be anything
    values = [label.item() if isinstance(label, Tensor) else label for label in each]
    if len(values) != images or any(isinstance(value, (list, dict)) or value is None for value in values):
        return torch.zeros(images, dtype=torch.int64)
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    return torch.tensor([numbers[value] for value in values])
