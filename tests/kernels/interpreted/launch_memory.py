"""What one kernel launch may touch, and which of its programs touched what: bounds and races.

A storage's cells are as wide as the narrowest element of the tensors that share it. The record of a cell is two
numbers: the program that stored it and the program that loaded it. Records live in pages that are made on first touch,
so that a storage of 2**31 elements costs only what the launch reaches.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

PAGE = 1 << 20  # cells; a page's two int32 arrays are zeroed lazily by the operating system
NOBODY, SEVERAL = 0, -1  # in place of a program's number, which starts at 1


class OutOfBounds(IndexError):
    """A load or store outside the storage of the tensor that its pointer came from."""


class Race(RuntimeError):
    """Two programs of one launch meet at an address, and at least one stores."""


class StorageRecord:
    """The bounds of one storage and the record of its cells."""

    def __init__(self, start: int, nbytes: int, cell: int) -> None:
        self.start, self.nbytes, self.cell = start, nbytes, cell
        self._pages: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def contains(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of `width` bytes lie wholly inside."""
        start, stop = np.uint64(self.start), np.uint64(self.start + self.nbytes)
        # An address that wrapped below zero is huge: compare before adding the width to it.
        return (addresses >= start) & (addresses < stop) & (stop - addresses >= np.uint64(width))

    def touch(self, addresses: np.ndarray, width: int, program: int, *, store: bool) -> str | None:
        """Records the access; returns what another program did there first, if that makes a race."""
        for stored_by, loaded_by, index in self._cells(addresses, width):
            for deed, by in (("stored", stored_by), ("loaded", loaded_by)) if store else (("stored", stored_by),):
                others = by[index]
                others = others[(others != NOBODY) & (others != program)]
                if others.size:
                    return f"what {_name(int(others[0]))} {deed} ({others.size} of {addresses.size} lanes)"
            if store:
                stored_by[index] = program
            else:
                alone = (loaded_by[index] == NOBODY) | (loaded_by[index] == program)
                loaded_by[index] = np.where(alone, program, SEVERAL)
        return None

    def _cells(self, addresses: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        cells = (addresses - np.uint64(self.start)).astype(np.int64) // self.cell
        if width > self.cell:
            cells = (cells[:, None] + np.arange(width // self.cell)).reshape(-1)
        pages = cells // PAGE
        first, last = int(pages.min()), int(pages.max())
        for number in (first,) if first == last else np.unique(pages).tolist():
            yield *self._page(number), cells[pages == number] - number * PAGE

    def _page(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._pages:
            size = min(PAGE, -(-self.nbytes // self.cell) - number * PAGE)
            self._pages[number] = np.zeros(size, np.int32), np.zeros(size, np.int32)
        return self._pages[number]


class LaunchMemory:
    """The storages of the tensors passed to one launch."""

    def __init__(self, kernel: str, tensors: Iterable[torch.Tensor]) -> None:
        self.kernel = kernel
        self._storages: dict[int, StorageRecord] = {}
        for tensor in tensors:
            self._admit(tensor)

    def _admit(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        start, cell = storage.data_ptr(), tensor.element_size()
        known = self._storages.get(start)
        self._storages[start] = StorageRecord(start, storage.nbytes(), min(cell, known.cell) if known else cell)

    def access(self, addresses: np.ndarray, width: int, program: int, *, store: bool, home: int | None) -> None:
        """Checks and records the lanes of one load or store by program number `program` (from 1).

        Args:
            addresses: those of the lanes that the mask lets through.
            width: bytes per lane.
            program: its number, from 1.
            store: whether it stores.
            home: start of the storage that the pointer was computed from; None where that is unknown.

        Raises:
            OutOfBounds: a lane lies outside `home`, or outside every storage of this launch.
            Race: another program of this launch stored there, or loaded what is stored now.
        """
        deed = "store" if store else "load"
        storages = list(self._storages.values()) if home is None else [self._storages[home]]
        inside = np.zeros(addresses.shape, bool)
        for storage in storages:
            inside |= storage.contains(addresses, width)
        if not inside.all():
            raise OutOfBounds(self._describe(deed, addresses[~inside], addresses.size, program, storages))
        for storage in storages:
            own = addresses if home is not None else addresses[storage.contains(addresses, width)]
            conflict = storage.touch(own, width, program, store=store) if own.size else None
            if conflict:
                raise Race(f"kernel {self.kernel}: {_name(program)} {deed}s {conflict} in the same launch")

    def _describe(self, deed: str, outside: np.ndarray, lanes: int, program: int, storages: list[StorageRecord]) -> str:
        text = f"kernel {self.kernel}: {_name(program)} {deed}s out of bounds in {outside.size} of {lanes} lanes"
        if len(storages) != 1:
            return f"{text}, outside every tensor of the launch"
        offset = (int(outside[0]) - storages[0].start + 2**63) % 2**64 - 2**63
        return f"{text}, the first at byte {offset} of a storage of {storages[0].nbytes} bytes"


def tensors_among(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors of an argument list, those in tuples and in wrappers with a `base` too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_among(value)
        elif hasattr(value, "base"):
            yield from tensors_among([value.base])


def _name(program: int) -> str:
    return "more than one other program" if program == SEVERAL else f"program {program - 1}"
