"""What the kinds of faults share: how many, where, and the row of the table that each of them fills."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Lock

import torch
from runs import Trainings

from programs import Wrong

# Two epochs, saved after every third step and after each epoch.
EPOCH = 11
DIGITS = (
    *("--no-probe", "--epochs", 2, "--batch-size", 16, "--projector", "64-64", "--device", "cpu"),
    *("--log-every", 1, "--save-every", 3, "--out", "out", "--resume"),
)
JPEGS, JPEGS_PER_STEP = 40, 8


@dataclass
class Row:
    """One kind of fault: how often it was injected, how often the run did as it must, and what was measured."""

    fault: str
    pass_figure: str
    injected: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.survived == self.injected > 0 and not self.failures

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Within, Wrong is a failure."""
        try:
            yield
        except Wrong as wrong:
            self.failures.append(f"{name}: {wrong}")

    @contextmanager
    def injection(self, name: str) -> Iterator[None]:
        """Within, one fault is injected; it is survived where nothing fails."""
        self.injected += 1
        before = len(self.failures)
        with self.check(name):
            yield
        self.survived += len(self.failures) == before

    def measure(self, what: str, value: float) -> None:
        """Keep the largest."""
        self.measured[what] = max(value, self.measured.get(what, value))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def worst(self) -> str:
        return "; ".join([*(f"{what} {value:.3g}" for what, value in self.measured.items()), *self.notes])

    def cells(self) -> tuple[str, ...]:
        survived = f"{self.survived}" if self.passed else f"**{self.survived}, FAILED**"
        return self.fault, f"{self.injected}", survived, self.pass_figure, self.worst


class References:
    """Runs on digits that nothing happens to, one for each number of processes, for all kinds."""

    def __init__(self, nursery: Trainings, folder: Path) -> None:
        self._nursery, self._folder, self._lock = nursery, folder, Lock()

    def of(self, size: int) -> Path:
        """What the run has left."""
        folder = self._folder / f"{size}"
        with self._lock:
            if not folder.exists():
                for run in self._nursery.ranks(size, folder, *DIGITS):
                    run.succeed()
        return folder / "out"


@dataclass
class Plan:
    """How thorough to be, and with what."""

    short: bool
    random: Random
    folder: Path  # this kind's own
    nursery: Trainings
    references: "References"

    def count(self, long: int, short: int) -> int:
        return short if self.short else long

    def at_most(self, seconds: float) -> float:
        """What is promised of a machine that does nothing else; the short form runs beside other tests."""
        return 10 * seconds if self.short else seconds

    def jpegs(self, name: str = "jpegs", images: int = JPEGS) -> Path:
        """Small reddish and bluish photographs in one class folder: 00.jpg, 01.jpg, ..."""
        from PIL import Image

        folder = self.folder / name / "all"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        for number in range(images):
            noise = torch.randint(-40, 40, (40, 48, 3), generator=generator)
            color = torch.tensor([180, 40, 40] if number % 2 else [40, 40, 180])
            pixels = (color + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.jpg", quality=90)
        return folder.parent


def on_jpegs(data: Path, workers: int, epochs: int = 3) -> tuple[object, ...]:
    """Flags of a run of five steps an epoch, each image in one of them."""
    return (
        *("--data", data, "--workers", workers, "--epochs", epochs, "--arch", "small-cnn", "--image-size", 28),
        *("--projector", "64-64", "--batch-size", JPEGS_PER_STEP, "--no-probe", "--device", "cpu"),
        *("--log-every", 1, "--save-every", 3, "--out", "out", "--resume"),
    )
