"""Images in webdataset shards: tar archives in which the files ``KEY.jpg`` and ``KEY.cls`` make up a labelled image.

Each archive is indexed once, by its headers. After that an image is read from its place in it like a file of its own:
order, what is held out and resuming are those of folders. The price is a seek for every image.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from barlow_recipes import checkpoint
from barlow_recipes.errors import Aborted, UsageError, first_line
from barlow_recipes.files import SUFFIXES, Catalogue, hidden

KEY = re.compile(r"((?:.*/)?[^./]+)\.(?:[^/]*\.)?([^./]+)")  # webdataset's key, and the last extension
NO_LABEL = -1


Entry = tuple[int, str, int, int, int]  # label, name, number of the shard, offset and size; sorted as files of folders


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
    table: Tensor | None = None
    with suppress(OSError, RuntimeError, ValueError):  # no index is kept, no home, damage
        table = checkpoint.read(_place(shards))
    if table is None:
        entries = sorted(entry for number, shard in enumerate(shards) for entry in _index(number, shard))
        table = torch.tensor([(label, number, offset, size) for label, _, number, offset, size in entries])
        with suppress(OSError, RuntimeError, Aborted):  # there may be no place; a 1 GB archive takes a second to index
            place = _place(shards)
            place.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(place, table)
    unlabelled = int((table[:, 0] == NO_LABEL).sum())
    if 0 < unlabelled < len(table):
        raise UsageError(
            f"--data {root}: {unlabelled} of {len(table)} images have no label. Expected a KEY.cls with a whole number "
            "≥ 0 for each image, or for none"
        )
    table[:, 0] = table[:, 0].unique(return_inverse=True)[1]
    return Catalogue.of(root, (str(shard.relative_to(root)) for shard in shards), table)


def _index(number: int, shard: Path) -> list[Entry]:
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                match = KEY.fullmatch(member.name)
                if not member.isreg() or not match or any(map(hidden, member.name.removeprefix("./").split("/"))):
                    continue
                key, extension = match[1], match[2].lower()
                if f".{extension}" in SUFFIXES:
                    images.append((key, member.name, member.offset_data, member.size))
                elif extension == "cls" and (content := archive.extractfile(member)):
                    number_read = re.fullmatch(rb"\s*(\d{1,18})\s*", content.read())
                    labels[key] = int(number_read[1]) if number_read else NO_LABEL
            # A damaged header is for tarfile as good as the end, which is a block of zeros.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UsageError(f"--data {shard}: not a whole tar archive, uncompressed ({first_line(error)})") from None
    if not images:
        raise UsageError(f"--data {shard}: no image in it. Expected files KEY{', KEY'.join(SUFFIXES)}")
    return [(labels.get(key, NO_LABEL), name, number, offset, size) for key, name, offset, size in images]


def _place(shards: Sequence[Path]) -> Path:
    """Where the index of these shards is kept: any of them that changes has another size or another time."""
    stats = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    key = hashlib.blake2b(repr((SUFFIXES, stats)).encode(), digest_size=16).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "barlow-loss", f"shards-{key}")
