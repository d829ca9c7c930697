"""Encoded images by number, wherever they lie: each in a file of its own, or many in one."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

WHOLE_FILE = -1  # as a size


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
    labels: Tensor  # (N,), from 0
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
