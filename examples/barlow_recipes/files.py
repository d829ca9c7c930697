"""Images by number, wherever they lie: in folders, lists, tar archives, data sets of Hugging Face, the user's own."""

import csv
import hashlib
import importlib
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow_recipes.errors import UsageError, first_line, require

WHOLE_FILE, NO_LABEL = -1, -1  # as a size, as a label
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}  # what separates columns; of None, a space before a number
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of a data set
LABELS = ("label", "labels", "fine_label", "class", "target")  # columns of Hugging Face, the first that is there
CAN_READ = (
    f"can read images ({' '.join(SUFFIXES)}) in folders or in a list (.txt .csv .tsv), .tar shards, .parquet or a "
    "folder of datasets' save_to_disk, and module:callable"
)
OF_SYSTEMS = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "desktop.ini",
}  # fmt: skip
KEY = re.compile(r"((?:.*/)?[^./]+)\.(?:[^/]*\.)?([^./]+)")  # webdataset's key, and the last extension


class Member(NamedTuple):
    """A file in a tar archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ImageIndex:
    """Where every encoded image lies, and its label.

    In arrays: to look at a Python object is to write to its count of references, and a forked worker copies each page
    that it writes to. A list of 1.3 million paths came to 250 MB for each worker, this to nothing.
    """

    root: Path
    names: NDArray[np.bytes_]  # of the files, below the root
    table: Tensor  # (N, 4): label, from 0 (all 0 without labels); number of the file; offset and size in it, in bytes

    @staticmethod
    def of_files(root: Path, files: Sequence[str], classes: Sequence[str]) -> "ImageIndex":
        """Of whole files, by class and name."""
        images = sorted(zip(numbered(classes).tolist(), files, strict=True))
        table = torch.tensor([(label, number, 0, WHOLE_FILE) for number, (label, _) in enumerate(images)])
        return ImageIndex(root, np.array([os.fsencode(name) for _, name in images]), table)

    @property
    def labels(self) -> Tensor:
        return self.table[:, 0]

    def fingerprint(self) -> str:
        """The SHA-256 of all that is known here, but for the root, which machines may mount in different places."""
        facts = (self.names.dtype.str.encode(), self.names.tobytes(), self.table.numpy().tobytes())
        return hashlib.sha256(b"".join(facts)).hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    def subset(self, indices: Tensor) -> "ImageIndex":
        return replace(self, table=self.table[indices])

    def read(self, index: int) -> tuple[Any, str]:
        """The bytes of an image, and what to call it; OSError where they are not there."""
        _, number, offset, size = self.table[index].tolist()
        path = self.root / os.fsdecode(self.names[number])
        name = str(path) if size == WHOLE_FILE else f"{path}, byte {offset}"
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{name}: expected {size} bytes, found {len(content)}")
        return content, name


@dataclass(frozen=True)
class Items(ImageIndex):
    """Images that a Dataset gives by their number, which stands in the table."""

    dataset: Any
    column: str | None  # with the image; None: an item is one, or begins with one

    @classmethod
    def of_dataset(cls, name: str, dataset: Any, column: str | None, labels: Any) -> "Items":
        """All of them. Labels of any kind become numbers; there are none if there is not one for each image."""
        images, given = len(dataset), labels if isinstance(labels, Iterable) else []
        values = [label.item() if isinstance(label, Tensor) else label for label in given]
        if len(values) != images or any(isinstance(value, (list, dict)) or value is None for value in values):
            values = [0] * images
        own = getattr(dataset, "_fingerprint", "")  # of what the images show, where the dataset has one
        table = torch.stack([numbered(values), torch.arange(images)], dim=1)
        return cls(Path(name), np.array([os.fsencode(f"{name} {own}")]), table, dataset, column)

    def read(self, index: int) -> tuple[Any, str]:
        """A Pillow image, bytes, an array or a Tensor, and what to call it."""
        number = int(self.table[index, 1])
        item = self.dataset[number]
        if self.column is not None:  # Hugging Face's, not decoded
            item = item[self.column]["bytes"] or Path(item[self.column]["path"]).read_bytes()
        return item[0] if isinstance(item, (tuple, list)) else item, f"{self.root}, image {number}"


def numbered(labels: Sequence[Any]) -> Tensor:
    """Labels of any kind as numbers from 0."""
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1])


def find_images(source: str) -> tuple[ImageIndex, tuple[str, ...]]:
    """The images of --data, in ``source/train`` if there is one, and in words what is left out."""
    path, suffix = Path(source), Path(source).suffix.lower()
    if not path.exists():
        if re.fullmatch(r"[\w.]+:\w+", source):
            return from_callable(source), ()
        raise UsageError(f"--data {path}: no such file or folder")
    if path.is_file():
        if suffix in LISTS:
            return index_list(path), ()
        if suffix not in (".tar", ".parquet"):
            raise UsageError(f"--data {path}: a file that cannot be read; {CAN_READ}")
        if suffix == ".parquet":
            return from_hugging_face(path, [path]), ()
        skipped = list[str]()
        return index_shards(path.parent, [path], skipped), told(path, skipped)
    root = path / "train" if (path / "train").is_dir() else path
    if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return from_hugging_face(root), ()
    skipped = list[str]()
    files = [*files_below(root, skipped)]
    images = [name for name in files if is_image(name)]
    shards, parquet = (choose_shards(root, files, ending) for ending in (".tar", ".parquet"))
    if sum(map(bool, (images, shards, parquet))) > 1:
        raise UsageError(f"--data {root}: found {kinds(files)}; expected images, .tar or .parquet alone: give one kind")
    others = sorted({*files} - {*images, *(str(path.relative_to(root)) for path in (*shards, *parquet))})
    notes = (f"left out of {root}: {kinds(others)}",) if others else ()
    if shards:
        found: ImageIndex = index_shards(root, shards, skipped)
    else:
        found = from_hugging_face(root, parquet) if parquet else index_folder(root, files, labelled=False)
    return found, notes + told(root, skipped)


def hidden(name: str) -> bool:
    """Put there by a system or a program: .ipynb_checkpoints, ._0001.png, __MACOSX, @eaDir, Thumbs.db."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def told(root: Path, skipped: Sequence[str]) -> tuple[str, ...]:
    """What was skipped because it is hidden, in words."""
    few = ", ".join(sorted(set(skipped))[:3])
    return (f"left out of {root}: {len(skipped)} hidden files and folders ({few})",) if skipped else ()


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def files_below(root: Path, skipped: list[str]) -> Iterator[str]:
    """All files at any depth but the hidden ones, through links but in no circle, named from the root.

    The root itself may be hidden. The names of the hidden files and folders come to ``skipped``.
    """

    def walk(folder: str, within: tuple[str, ...]) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if hidden(entry.name):
                    skipped.append(entry.name)
                elif not entry.is_dir():
                    yield entry.path
                elif (real := os.path.realpath(entry.path)) not in within:
                    yield from walk(entry.path, (*within, real))

    return (os.path.relpath(path, root) for path in walk(str(root), (os.path.realpath(root),)))


def kinds(files: Iterable[str]) -> str:
    """What files there are, in words: "12 .h5, 1 without a suffix"."""
    counts = Counter("".join(re.findall(r"(?:\.tar)?\.\w+$", name.lower())) for name in files)
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in counts.most_common(5)) or "nothing"


def class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not hidden(entry.name))


def index_folder(root: Path, files: Iterable[str] | None = None, *, labelled: bool = True) -> ImageIndex:
    """The image files at any depth, by class and path. The folders directly below are the classes.

    Unless it must be ``labelled``, images beside the class folders are taken, too, and none has a label.
    """
    files, classes = [*(files_below(root, []) if files is None else files)], class_folders(root)
    images = [name for name in files if is_image(name)]
    folder_of = [name.partition(os.sep)[0] if os.sep in name else "" for name in images]
    if len(classes) > 1 and {name.lower() for name in classes} <= PARTS:
        part = root / classes[0]
        raise UsageError(f"--data {root}: {', '.join(classes)} are no classes. Give the part to read, such as {part}")
    if not images:
        raise UsageError(f"--data {root}: no image, found {kinds(files)}; {CAN_READ}")
    if (beside := folder_of.count("")) and labelled:
        raise UsageError(f"--data {root}: expected class folders alone, found {beside} images beside")
    empty = sorted({*classes} - {*folder_of})
    if empty and not beside:
        count = f"{len(empty)} of {len(classes)} class folders"
        raise UsageError(f"--data {root}: no image in {count}, the first is {empty[0]}. Remove it or fill it")
    return ImageIndex.of_files(root, images, [""] * len(images) if beside else folder_of)


def index_list(path: Path) -> ImageIndex:
    """The images that a list names: in each line a path from the list's folder, and perhaps a label."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path}: cannot be read as a list ({first_line(error)})") from None
    if separator := LISTS[path.suffix.lower()]:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
        rows = rows[1:] if len(rows) > 1 and not is_image(rows[0][0]) else rows
    else:
        rows = [[line] if is_image(line) else line.rsplit(maxsplit=1) for line in lines]
    files, labels = [row[0] for row in rows], ["".join(row[1:2]) for row in rows]
    if others := [name for name in files or ["nothing"] if not is_image(name)]:
        wanted = f"expected a path of an image in each line ({' '.join(SUFFIXES)})"
        raise UsageError(f"--data {path}: {wanted}, got {others[0]!r}")
    if any(labels) and not all(labels):
        raise UsageError(f"--data {path}: {labels.count('')} of {len(files)} images have no label")
    return ImageIndex.of_files(path.parent, files, labels)


def choose_shards(root: Path, files: Iterable[str], ending: str) -> list[Path]:
    """Those to read: with "train" in any name, only the ones that have it; else those without "val" and "test"."""
    found = sorted(root / name for name in files if name.lower().endswith(ending))
    shards = [path for path in found if not path.with_suffix("").is_dir()]  # it was unpacked beside it
    training = [path for path in shards if "train" in path.name]
    return training or [path for path in shards if "val" not in path.name and "test" not in path.name] or shards


def index_shards(root: Path, shards: Sequence[Path], skipped: list[str] | None = None) -> ImageIndex:
    """The images of webdataset's shards: tar archives in which ``KEY.jpg`` and ``KEY.cls`` make up a labelled image.

    As there, what precedes the first dot of a file's name is the key of its sample, and a sample has one image: that of
    ``KEY.jpg``, not of ``KEY.seg.png`` beside it.

    Their headers are read at every start, a million in a minute. An image is then read from its place, like a file.
    The names of hidden files come to ``skipped``.
    """
    skipped = [] if skipped is None else skipped
    entries = sorted(entry for number, shard in enumerate(shards) for entry in _index(number, shard, skipped))
    table = torch.tensor([(label, number, offset, size) for label, _, number, offset, size in entries])
    unlabelled = int((table[:, 0] == NO_LABEL).sum())
    if 0 < unlabelled < len(table):
        wanted = "Expected a KEY.cls with a whole number ≥ 0 for each image, or for none"
        raise UsageError(f"--data {root}: {unlabelled} of {len(table)} images have no label. {wanted}")
    table[:, 0] = table[:, 0].unique(return_inverse=True)[1]
    return ImageIndex(root, np.array([os.fsencode(shard.relative_to(root)) for shard in shards]), table)


def _index(number: int, shard: Path, skipped: list[str]) -> list[tuple[int, str, int, int, int]]:
    """Label, name, number of the shard, offset and size of each image."""
    images: dict[str, list[Member]] = {}  # by key
    labels: dict[str, int] = {}  # by name without extension
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                match = KEY.fullmatch(member.name)
                if member.isreg() and any(map(hidden, member.name.removeprefix("./").split("/"))):
                    skipped.append(member.name)
                    continue
                if not member.isreg() or not match:
                    continue
                key, extension = match[1], match[2].lower()
                if f".{extension}" in SUFFIXES:
                    images.setdefault(key, []).append(Member(member.name, member.offset_data, member.size))
                elif extension == "cls" and (content := archive.extractfile(member)):
                    number_read = re.fullmatch(rb"\s*(\d{1,18})\s*", content.read())
                    labels[stem_of(member.name)] = int(number_read[1]) if number_read else NO_LABEL
            file.seek(archive.offset)  # a damaged header is for tarfile as good as the end, which is a block of zeros
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UsageError(f"--data {shard}: not a whole tar archive, uncompressed ({first_line(error)})") from None
    if not images:
        raise UsageError(f"--data {shard}: no image in it. Expected files KEY{', KEY'.join(SUFFIXES)}")
    chosen = {key: choose_image(shard, key, members) for key, members in images.items()}
    return [
        (labels.get(stem_of(image.name), labels.get(key, NO_LABEL)), image.name, number, image.offset, image.size)
        for key, image in chosen.items()
    ]


def choose_image(shard: Path, key: str, images: Sequence[Member]) -> Member:
    """``KEY.jpg`` before ``KEY.seg.png``, a picture before an array; UsageError: two would be the sample's image."""

    def rank(image: Member) -> tuple[bool, bool]:
        return stem_of(image.name) != key, image.name.lower().endswith(".npy")

    best = min(map(rank, images))
    first, *others = (image for image in images if rank(image) == best)
    if others:
        remedy = "Give each image a name of its own before the first dot, or leave one of them"
        found = f"{first.name} and {others[0].name}"
        raise UsageError(f"--data {shard}: {found} are images of one sample, which webdataset calls {key}. {remedy}")
    return first


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def from_hugging_face(path: Path, parquet: Sequence[Path] = ()) -> Items:
    """What ``datasets`` has saved to a folder, of splits the one called train; or files of .parquet."""
    hugging_face = require("datasets", f"--data {path}")
    try:
        files = [str(file) for file in parquet]
        found = hugging_face.Dataset.from_parquet(files) if files else hugging_face.load_from_disk(str(path))
        found = found["train"] if isinstance(found, dict) else found
    except Exception as error:  # pyarrow and datasets have their own
        wanted = f"expected a data set, of splits one called train ({first_line(error)})"
        raise UsageError(f"--data {path}: {wanted}") from None
    columns = found.features
    images = [name for name, feature in columns.items() if isinstance(feature, hugging_face.Image)]
    if not images:
        raise UsageError(f"--data {path}: no column of images among {', '.join(columns)}")
    found = found.cast_column(images[0], hugging_face.Image(decode=False))
    labels = next((found[name] for name in LABELS if name in columns), None)
    return Items.of_dataset(str(path), found, images[0], labels)


def from_callable(source: str) -> Items:
    """The Dataset that ``module:callable`` returns, whose items are images or begin with one, always the same.

    Its labels are those of its attribute ``targets`` or ``labels``: nothing is read to find them.
    """
    module, _, name = source.partition(":")
    sys.path.insert(0, "")  # of the working directory
    try:
        dataset = getattr(importlib.import_module(module), name)()
        dataset[0]
        return Items.of_dataset(source, dataset, None, getattr(dataset, "targets", getattr(dataset, "labels", None)))
    except (ImportError, AttributeError, TypeError, LookupError) as error:
        wanted = f"expected a callable that returns a Dataset with images ({first_line(error)})"
        raise UsageError(f"--data {source}: {wanted}") from None
    finally:
        sys.path.remove("")
