"""Encoded images by number, wherever they lie: files in folders, files of a list, or places in archives."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow_recipes.errors import UsageError, first_line

WHOLE_FILE = -1  # as a size
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}  # what separates columns; of None, a space before a number
LABEL_COLUMNS = {"label", "labels", "class", "target", "category"}
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of a data set
CAN_READ = (
    f"can read images ({' '.join(SUFFIXES)}) in folders or in a list (.txt .csv .tsv), .tar shards, .parquet or a "
    "folder of datasets' save_to_disk, and module:callable"
)


@dataclass(frozen=True)
class Catalogue:
    """Where every image lies, and its label.

    In arrays: to look at an object in a Python list is to write to it, to its count of references, and a forked worker
    copies each page that it writes to. A list of 1.3 million paths came to 250 MB for each worker, this to nothing.
    """

    root: Path
    names: NDArray[np.bytes_]  # of the files, below the root
    table: Tensor  # (N, 4): label, from 0 (all 0 without labels); number of the file; offset and size in it, in bytes

    @classmethod
    def of(cls, root: Path, files: Iterable[str], table: Tensor) -> "Catalogue":
        return cls(root, np.array([os.fsencode(name) for name in files]), table)

    @classmethod
    def of_files(cls, root: Path, files: Sequence[str], classes: Sequence[str]) -> "Catalogue":
        """Of whole files, by class and name."""
        labels = np.unique(classes, return_inverse=True)[1].tolist()
        images = sorted(zip(labels, files, strict=True))
        table = torch.tensor([(label, number, 0, WHOLE_FILE) for number, (label, _) in enumerate(images)])
        return cls.of(root, (name for _, name in images), table)

    @property
    def labels(self) -> Tensor:
        return self.table[:, 0]

    def fingerprint(self) -> str:
        """The SHA-256 of all that is known here, but for the root, which machines may mount in different places."""
        facts = (self.names.dtype.str.encode(), self.names.tobytes(), self.table.numpy().tobytes())
        return hashlib.sha256(b"".join(facts)).hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    def subset(self, indices: Tensor) -> "Catalogue":
        """The images of these numbers, numbered anew."""
        return replace(self, table=self.table[indices])

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image, and what to call it.

        Raises:
            OSError: they are not there.
        """
        _, number, offset, size = self.table[index].tolist()
        path = self.root / os.fsdecode(self.names[number])
        if size == WHOLE_FILE:
            return path.read_bytes(), str(path)
        name = f"{path}, byte {offset}"
        with path.open("rb") as archive:
            archive.seek(offset)
            content = archive.read(size)
        if len(content) < size:
            raise OSError(f"{name}: expected {size} bytes, found {len(content)}")
        return content, name


def hidden(name: str) -> bool:
    """Whether a system or a program has put it there: .ipynb_checkpoints, ._0001.png, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def files_below(root: Path) -> Iterator[str]:
    """All files at any depth but the hidden ones, through links but in no circle, named from the root."""

    def walk(folder: str, within: tuple[str, ...]) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if hidden(entry.name):
                    continue
                if not entry.is_dir():
                    yield entry.path
                elif (real := os.path.realpath(entry.path)) not in within:
                    yield from walk(entry.path, (*within, real))

    return (os.path.relpath(path, root) for path in walk(str(root), (os.path.realpath(root),)))


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def kinds(files: Iterable[str]) -> str:
    """What files there are, in words: "12 .h5, 1 without a suffix"."""
    counts = Counter("".join(re.findall(r"(?:\.tar)?\.\w+$", name.lower())) for name in files)
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in counts.most_common(5)) or "nothing"


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not hidden(entry.name))


def index_folder(root: Path, files: Iterable[str] | None = None, *, labelled: bool = True) -> Catalogue:
    """The image files at any depth, by class and path. The folders directly below are the classes.

    ``files`` are those below the folder, if they are known. Unless it must be ``labelled``, images beside the class
    folders are taken, too, and none has a label.

    Raises:
        UsageError: no class folders, an empty class, or nothing that can be read.
    """
    files, classes = [*(files or files_below(root))], class_folders(root)
    images = [name for name in files if is_image(name)]
    folder_of = [name.partition(os.sep)[0] if os.sep in name else "" for name in images]
    if len(classes) > 1 and {name.lower() for name in classes} <= PARTS:
        part = root / classes[0]
        raise UsageError(f"--data {root}: {', '.join(classes)} are no classes. Give the part to read, such as {part}")
    if not images:
        raise UsageError(f"--data {root}: no image, found {kinds(files)}; {CAN_READ}")
    if "" in folder_of:
        if labelled:
            raise UsageError(f"--data {root}: expected class folders alone, found {folder_of.count('')} images beside")
        return Catalogue.of_files(root, images, [""] * len(images))
    if empty := sorted({*classes} - {*folder_of}):
        count = f"{len(empty)} of {len(classes)} class folders"
        raise UsageError(f"--data {root}: no image in {count}, the first is {empty[0]}. Remove it or fill it")
    return Catalogue.of_files(root, images, folder_of)


def index_list(path: Path) -> Catalogue:
    """The images that a list names; their paths begin at its folder.

    In a text file a path stands in each line, with or without a number behind it for the class. In a table it is in the
    first column that has images, and the label in the next one, or in the one that a line of heads calls so.

    Raises:
        UsageError: it cannot be read or is empty, names something else than images, or has a label for some alone.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path}: cannot be read as a list ({first_line(error)})") from None
    if separator := LISTS[path.suffix.lower()]:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    else:
        rows = [[line] if is_image(line) else line.rsplit(maxsplit=1) for line in lines]
    heads = rows.pop(0) if len(rows) > 1 and not any(map(is_image, rows[0])) else []
    place = next((number for number, cell in enumerate(rows[0] if rows else []) if is_image(cell)), 0)
    named = [number for number, head in enumerate(heads) if head.lower() in LABEL_COLUMNS]
    label = named[0] if named else len(heads) or place + 1
    files = ["".join(row[place : place + 1]) for row in rows]
    labels = ["".join(row[label : label + 1]) for row in rows]
    others = [name for name in files if not is_image(name)]
    if others or not files:
        found = repr(others[0]) if others else "nothing"
        raise UsageError(f"--data {path}: expected a path of an image in each line ({' '.join(SUFFIXES)}), got {found}")
    if any(labels) and not all(labels):
        raise UsageError(f"--data {path}: {labels.count('')} of {len(files)} images have no label")
    return Catalogue.of_files(path.parent, files, labels)
