"""Where a step's time goes: always how long the loop waits for images, and on demand every part of a step."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from barlow_recipes.tables import aligned

PARTS = ("data", "forward", "loss", "backward", "optimizer", "other")
WARM_UP = 3  # steps that are not profiled: memory is allocated and kernels are chosen in them
MOST_WAITING = 0.2  # of an epoch's time; above it, images come too slowly


class Profile:
    """What the profiled steps took; ``print(profile)`` is a table."""

    def __init__(self, steps: Sequence[Mapping[str, float]], images: int) -> None:
        """``steps`` are the seconds of each part of each step; ``images`` those of one step."""
        total = sum(sum(step.values()) for step in steps)
        self.images_per_second = images * len(steps) / total
        self.rows: list[dict[str, Any]] = []  # one for each part, for the metrics
        for part in PARTS:
            seconds = [step.get(part, 0.0) for step in steps]
            self.rows.append({"part": part, "milliseconds": 1000 * median(seconds), "share": sum(seconds) / total})

    def __str__(self) -> str:
        cells = [[row["part"], f"{row['milliseconds']:,.2f}", f"{100 * row['share']:.1f} %"] for row in self.rows]
        return aligned([["part", "median ms", "share"], *cells]) + f"\n{self.images_per_second:,.0f} images/s"


class Stopwatch:
    """Times the parts of steps of so many images, ``profile`` steps after the warm-up.

    Without profiling only the lap "data" is measured, the host's: ``waited`` adds it up over the epoch, in seconds. The
    device is never waited for then, and may still be at work while the host waits for images.
    """

    def __init__(self, device: torch.device, images: int, profile: int | None = None) -> None:
        self.device, self.images, self.left = device, images, profile and WARM_UP + profile
        self._profiled: list[Counter[str]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Begin to count anew, and leave out what has passed since the last step."""
        self.waited = 0.0
        self._ends = [self._now()]  # of the steps, after the beginning of the first
        self._laps: Counter[str] = Counter()

    @contextmanager
    def lap(self, part: str) -> Iterator[None]:
        """Time a part of the step; several laps of one part add up."""
        measured = self.left or part == "data"
        began = self._now() if measured else 0.0
        yield
        if measured:
            self._laps[part] += self._now() - began

    def end_step(self) -> Profile | None:
        """End the step; what was in no lap is "other". Once, after the last step to profile, get the profile."""
        self._ends.append(self._now())
        laps, self._laps = self._laps, Counter()
        self.waited += laps["data"]
        if not self.left:
            return None
        laps["other"] = self._ends[-1] - self._ends[-2] - laps.total()
        self._profiled.append(laps)
        self.left -= 1
        return None if self.left else Profile(self._profiled[WARM_UP:], self.images)

    @property
    def seconds(self) -> float:
        """From the beginning of the epoch to the end of its last step."""
        return self._ends[-1] - self._ends[0]

    @property
    def images_per_second(self) -> float:
        """Of the last ten steps of this epoch; 0 before the first has ended."""
        return self._rate(self._ends[-11:])

    @property
    def epoch_images_per_second(self) -> float:
        return self._rate(self._ends)

    def _rate(self, ends: list[float]) -> float:
        return self.images * (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else 0.0

    def _now(self) -> float:
        if self.left and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def loader_bound(waited: float, total: float) -> str | None:
    """A warning where too much of a time was spent on waiting for images, both in seconds."""
    if waited <= MOST_WAITING * total:
        return None
    remedies = "More --workers, --augment-on device, a faster disk or shards help"
    return f"loader-bound: {100 * waited / total:.0f} % of the time was spent on waiting for images. {remedies}"
