"""Where a step's time goes: always how long the loop waits for images, and on demand every part of a step."""

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

PARTS = ("data", "forward", "loss", "backward", "optimizer", "other")
WARM_UP = 3  # steps that are not profiled: memory is allocated and kernels are chosen in them
RECENT = 10  # steps
MOST_WAITING = 0.2  # of an epoch's time; above it, images come too slowly


@dataclass(frozen=True)
class Profile:
    """What the profiled steps took; ``print(profile)`` is a table."""

    steps: int
    images_per_second: float
    milliseconds: dict[str, float]  # of each part: the median over the steps
    shares: dict[str, float]  # of each part in the time of all profiled steps; their sum is 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each part, for the metrics."""
        return [{"part": part, "milliseconds": self.milliseconds[part], "share": self.shares[part]} for part in PARTS]

    def __str__(self) -> str:
        table = [f"{part:<10} {self.milliseconds[part]:>10,.2f} {100 * self.shares[part]:>6.1f} %" for part in PARTS]
        return "\n".join(
            [
                f"{'part':<10} {'median ms':>10} {'share':>8}",
                "─" * 30,
                *table,
                f"{self.steps} steps, {self.images_per_second:,.0f} images/s",
                f"the loss and its gradient take {100 * self.shares['loss']:.1f} % of a step",
            ]
        )


class Stopwatch:
    """Times the laps of training steps.

    Without profiling only the lap "data" is measured, which is the host's time: the device is never waited for, and may
    still be at work while the host waits for images.

    Attributes:
        waited: seconds of this epoch in which the loop waited for images.
    """

    def __init__(self, device: torch.device, images: int, profile: int | None = None) -> None:
        """``images`` are those of a step; ``profile`` is the number of steps to profile after the warm-up."""
        self.device, self.images, self.profile = device, images, profile
        self._profiling = profile is not None
        self._profiled: list[dict[str, float]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Begin to count anew, and leave out what has passed since the last step."""
        self.waited = 0.0
        self._began = self._now()
        self._steps = 0
        self._ends = deque([self._began], maxlen=RECENT + 1)
        self._laps: dict[str, float] = defaultdict(float)

    def lap(self, part: str) -> AbstractContextManager[None]:
        """Time a part of the step; several laps of one part add up."""
        return self._lap(part) if self._profiling or part == "data" else nullcontext()

    @contextmanager
    def _lap(self, part: str) -> Iterator[None]:
        began = self._now()
        yield
        seconds = self._now() - began
        self._laps[part] += seconds
        if part == "data":
            self.waited += seconds

    def end_step(self) -> Profile | None:
        """End the step; what was in no lap is "other". Once, after the last step to profile, get the profile."""
        self._ends.append(self._now())
        self._steps += 1
        laps, self._laps = self._laps, defaultdict(float)
        if not self._profiling or self.profile is None:
            return None
        laps["other"] = self._ends[-1] - self._ends[-2] - sum(laps.values())
        self._profiled.append(laps)
        if len(self._profiled) < WARM_UP + self.profile:
            return None
        self._profiling = False
        return _profile(self._profiled[WARM_UP:], self.images)

    @property
    def seconds(self) -> float:
        """From the beginning of the epoch to the end of its last step."""
        return self._ends[-1] - self._began

    @property
    def images_per_second(self) -> float:
        """Of the last steps, in this epoch; 0 before the first has ended."""
        return _rate(self.images * (len(self._ends) - 1), self._ends[-1] - self._ends[0])

    @property
    def epoch_images_per_second(self) -> float:
        return _rate(self.images * self._steps, self.seconds)

    def _now(self) -> float:
        if self._profiling and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _rate(images: int, seconds: float) -> float:
    return images / seconds if seconds else 0.0


def _profile(steps: Sequence[dict[str, float]], images: int) -> Profile:
    laps = {part: [step[part] for step in steps] for part in PARTS}
    total = sum(map(sum, laps.values()))
    return Profile(
        steps=len(steps),
        images_per_second=images * len(steps) / total,
        milliseconds={part: 1000 * statistics.median(seconds) for part, seconds in laps.items()},
        shares={part: sum(seconds) / total for part, seconds in laps.items()},
    )


def loader_bound(waited: float, total: float) -> str | None:
    """A warning where too much of a time was spent on waiting for images, both in seconds."""
    if waited <= MOST_WAITING * total:
        return None
    return (
        f"loader-bound: {100 * waited / total:.0f} % of the time was spent on waiting for images. More --workers, "
        "--augment-on device, a faster disk or shards help"
    )
