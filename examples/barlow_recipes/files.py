"""Encoded images by number, wherever they lie: files in folders, files of a list, or places in archives."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from barlow_recipes.errors import UsageError, first_line

WHOLE_FILE = -1  # as a size
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}  # what separates columns; of None, a space before a number
PATH_COLUMNS = {"path", "file", "filename", "file_name", "filepath", "image", "image_path", "name"}
LABEL_COLUMNS = {"label", "labels", "class", "target", "category"}
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of a data set
CAN_READ = (
    f"can read images ({' '.join(SUFFIXES)}) in folders or in a list (.txt .csv .tsv), .tar shards, .parquet or a "
    "folder of datasets' save_to_disk, and module:callable"
)


@dataclass(frozen=True)
class Catalogue:
    """Where every image lies, and its label.

    All of it in tensors: a look at an object in a Python list writes to the object, which counts its references, and a
    forked worker gets a copy of every page that it writes to. Of a list of 1.3 million paths and labels that came to
    250 MB for each worker, of this catalogue to nothing.
    """

    root: Path
    names: Tensor  # (bytes,) uint8: of the files below the root, one after the other
    starts: Tensor  # (files + 1,): of each name
    labels: Tensor  # (N,), from 0; all 0 without labels
    file: Tensor  # (N,): its number
    offset: Tensor  # (N,), in bytes
    size: Tensor  # (N,), in bytes

    @classmethod
    def of(
        cls, root: Path, files: Iterable[str], labels: Tensor, file: Tensor, offset: Tensor, size: Tensor
    ) -> "Catalogue":
        names = [os.fsencode(name) for name in files]
        starts = torch.tensor([0, *accumulate(map(len, names))])
        packed = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        return cls(root, packed, starts, labels, file, offset, size)

    @classmethod
    def of_files(cls, root: Path, files: list[str], labels: list[int]) -> "Catalogue":
        """Of whole files, by label and name."""
        numbers = sorted(range(len(files)), key=lambda number: (labels[number], files[number]))
        whole, zero = torch.full((len(files),), WHOLE_FILE), torch.zeros(len(files), dtype=torch.int64)
        sorted_labels = torch.tensor([labels[number] for number in numbers])
        return cls.of(root, (files[n] for n in numbers), sorted_labels, torch.arange(len(files)), zero, whole)

    def fingerprint(self) -> str:
        """The SHA-256 of all that is known here, but for the root, which machines may mount in different places."""
        columns = (self.names, self.starts, self.labels, self.file, self.offset, self.size)
        sha256 = hashlib.sha256()
        for column in columns:
            sha256.update(memoryview(column.contiguous().view(torch.uint8).numpy()))
        return sha256.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Catalogue":
        """The images of these numbers, numbered anew."""
        columns = {name: getattr(self, name)[indices] for name in ("labels", "file", "offset", "size")}
        return replace(self, **columns)

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image, and what to call it.

        Raises:
            OSError: they are not there.
        """
        number, offset, size = (int(column[index]) for column in (self.file, self.offset, self.size))
        start, end = self.starts[number : number + 2].tolist()
        path = self.root / os.fsdecode(bytes(self.names[start:end].tolist()))
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

    Args:
        root: the folder.
        files: below it, if they are known.
        labelled: whether there must be class folders and nothing beside them; else images beside them are taken, too,
            and none has a label.

    Raises:
        UsageError: no such folder, no class folders, an empty class, or nothing that can be read.
    """
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    files, classes = [*(files_below(root) if files is None else files)], class_folders(root)
    images = [name for name in files if is_image(name)]
    folder_of = [name.partition(os.sep)[0] if os.sep in name else "" for name in images]
    if len(classes) > 1 and {name.lower() for name in classes} <= PARTS:
        raise UsageError(
            f"--data {root}: {', '.join(classes)} are no classes. Give the part to pretrain on, such as "
            f"{root / classes[0]}"
        )
    if not images:
        raise UsageError(f"--data {root}: no image, found {kinds(files)}; {CAN_READ}")
    if "" in folder_of:
        if labelled:
            raise UsageError(f"--data {root}: expected class folders alone, found {folder_of.count('')} images beside")
        return Catalogue.of_files(root, images, [0] * len(images))
    if empty := sorted({*classes} - {*folder_of}):
        raise UsageError(
            f"--data {root}: no image in {len(empty)} of {len(classes)} class folders, the first is {empty[0]}. Remove "
            f"it or fill it ({', '.join(SUFFIXES)})"
        )
    numbers = {name: label for label, name in enumerate(classes)}
    return Catalogue.of_files(root, images, [numbers[folder] for folder in folder_of])


def index_list(path: Path) -> Catalogue:
    """The images that a list names; their paths begin at its folder.

    In a text file a path stands in each line, with or without a number behind it for the class. In a table the columns
    are told by their heads, such as path and label; without heads the path is the first and a label the second.

    Raises:
        UsageError: it cannot be read or is empty, names something else than images, or has a label for some alone.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path}: cannot be read as a list ({first_line(error)})") from None
    separator = LISTS[path.suffix.lower()]
    if separator:
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=separator) if any(row)
        ]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        rows = [[line] if is_image(line) else line.rsplit(maxsplit=1) for line in lines]
    place, label = 0, 1
    if rows and not any(map(is_image, rows[0])):
        heads = [head.lower() for head in rows.pop(0)]
        places = [[n for n, head in enumerate(heads) if head in known] for known in (PATH_COLUMNS, LABEL_COLUMNS)]
        place, label = (found[0] if found else default for found, default in zip(places, (0, len(heads)), strict=True))
    files = [row[place] for row in rows if place < len(row)]
    others = [name for name in files if not is_image(name)]
    if others or not files:
        found = f"{others[0]!r}" if others else "nothing"
        raise UsageError(f"--data {path}: expected a path of an image in each line ({' '.join(SUFFIXES)}), got {found}")
    labels = [row[label] for row in rows if label < len(row) and row[label]]
    if labels and len(labels) < len(files):
        raise UsageError(f"--data {path}: {len(files) - len(labels)} of {len(files)} images have no label")
    numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
    return Catalogue.of_files(path.parent, files, [numbers[name] for name in labels] or [0] * len(files))
