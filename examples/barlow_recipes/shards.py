"""Images in webdataset shards: tar archives in which the files ``KEY.jpg`` and ``KEY.cls`` make up a labelled image.

Each archive is indexed once, by its headers. After that an image is read from its place in the archive as if it were
a file of its own, so the order of the images, what is held out, and resuming in the middle of an epoch are exactly what
they are for folders, with any number of workers and processes. The price is a seek for every image: a network file
system on which seeks are slow wants bigger reads than these.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from barlow_recipes import checkpoint
from barlow_recipes.errors import Aborted, UsageError, first_line
from barlow_recipes.files import SUFFIXES, Catalogue, hidden

KEY = re.compile(r"((?:.*/)?[^./]+)\.(?:[^/]*\.)?([^./]+)")  # webdataset's key, and the last extension
NO_LABEL = -1


class Entry(NamedTuple):
    """An image in a shard; entries sort as the files of folders do."""

    label: int
    name: str
    shard: int
    offset: int
    size: int


def choose_shards(archives: Sequence[Path]) -> list[Path]:
    """Those to read: with "train" in any name, only the ones that have it; else those without "val" and "test".

    An archive beside the folder it was unpacked into is none.
    """
    shards = sorted(path for path in archives if not path.with_suffix("").is_dir())
    training = [path for path in shards if "train" in path.name]
    return training or [path for path in shards if "val" not in path.name and "test" not in path.name] or shards


def index_shards(root: Path, shards: Sequence[Path]) -> Catalogue:
    """The images of all shards below a folder, by class and name: in the order of the same files in folders.

    Raises:
        UsageError: a shard is damaged or has no image, or some of the images have no label.
    """
    columns = _cached(shards)
    if columns is None:
        entries = sorted(entry for number, shard in enumerate(shards) for entry in _index(number, shard))
        columns = torch.tensor([(label, number, offset, size) for label, _, number, offset, size in entries])
        _cache(shards, columns)
    labels, file, offset, size = columns.unbind(dim=1)
    unlabelled = int((labels == NO_LABEL).sum())
    if 0 < unlabelled < len(labels):
        raise UsageError(
            f"--data {root}: {unlabelled} of {len(labels)} images have no label. Expected a KEY.cls or a "
            "KEY.json with a whole number ≥ 0 for each image, or for none"
        )
    classes = labels.unique(return_inverse=True)[1]
    return Catalogue.of(root, (str(shard.relative_to(root)) for shard in shards), classes, file, offset, size)


def _index(number: int, shard: Path) -> list[Entry]:
    images: list[tuple[str, Entry]] = []
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                match = KEY.fullmatch(member.name)
                if not member.isreg() or not match or any(map(hidden, member.name.removeprefix("./").split("/"))):
                    continue
                key, extension = match[1], match[2].lower()
                if f".{extension}" in SUFFIXES:
                    images.append((key, Entry(NO_LABEL, member.name, number, member.offset_data, member.size)))
                elif extension in ("cls", "json"):
                    content = archive.extractfile(member)
                    label = _label(content.read() if content else b"", extension)
                    labels[key] = max(label, labels.get(key, NO_LABEL))
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UsageError(f"--data {shard}: not a whole tar archive, uncompressed ({first_line(error)})") from None
    if not images:
        raise UsageError(f"--data {shard}: no image in it. Expected files KEY{', KEY'.join(SUFFIXES)}")
    return [entry._replace(label=labels.get(key, NO_LABEL)) for key, entry in images]


def _label(content: bytes, extension: str) -> int:
    try:
        if extension == "json":
            fields = json.loads(content)
            content = str(fields.get("label", fields.get("cls"))).encode()
        label = int(content)
    except (AttributeError, ValueError):
        return NO_LABEL
    return label if 0 <= label < 2**63 else NO_LABEL


def _check_end(file: BinaryIO, offset: int) -> None:
    """Tell a damaged header, for tarfile as good as the end, from the block of zeros that is one."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut off at byte {offset}")


def _cache_path(shards: Sequence[Path]) -> Path:
    """Its name says of which shards it is: any that changes has another size or another time."""
    stats = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    key = hashlib.blake2b(repr((SUFFIXES, stats)).encode(), digest_size=16).hexdigest()
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "barlow-loss" / f"shards-{key}"


def _cached(shards: Sequence[Path]) -> Tensor | None:
    with suppress(OSError, RuntimeError, ValueError):  # no cache, no home, damage
        columns: Tensor = checkpoint.read(_cache_path(shards))
        return columns
    return None


def _cache(shards: Sequence[Path], columns: Tensor) -> None:
    """Keep the index, if there is a place for it: of a 1 GB archive of 10,000 images it takes a second to make."""
    with suppress(OSError, RuntimeError, Aborted):
        path = _cache_path(shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, columns)
