"""The stopwatch measures what a step does, and makes no device wait unless it is asked for a profile."""

import pytest
import torch

from barlow_recipes import steps
from barlow_recipes.steps import Stopwatch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TAKES = {"data": 0.004, "forward": 0.008, "loss": 0.002, "backward": 0.006, "optimizer": 0.002}  # seconds


class Clock:
    """Time passes when something waits for it, and not otherwise."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(steps, "time", clock)
    return clock


def step(watch: Stopwatch, slower: float = 1.0) -> None:
    for part, seconds in [*TAKES.items()] * 2:  # laps add up
        with watch.lap(part):
            steps.time.sleep(slower * seconds / 2)
    steps.time.sleep(0.002)
    watch.end_step()


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were waited for."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    return waited


def test_a_profile_is_the_mean_of_the_steps_of_an_epoch() -> None:
    watch = Stopwatch(CPU, images=64, profile=True)
    step(watch, 50)
    steps.time.sleep(9)  # a look
    watch.begin_epoch()
    for factor in (1, 1, 3, 3):
        step(watch, factor)
    expected = {part: 2000 * seconds for part, seconds in TAKES.items()} | {"other": 2}
    assert {row["part"]: row["milliseconds"] for row in watch.rows()} == pytest.approx(expected)
    shares = {part: ms / sum(expected.values()) for part, ms in expected.items()}
    assert {row["part"]: row["share"] for row in watch.rows()} == pytest.approx(shares)


def test_only_a_profile_waits_for_the_device(synchronized: list[torch.device]) -> None:
    step(Stopwatch(GPU, images=1))
    assert synchronized == []
    step(Stopwatch(GPU, images=1, profile=True))
    assert synchronized == [GPU] * (1 + 2 * 2 * len(TAKES) + 1)


def test_the_wait_for_images_and_the_speed_are_of_the_epoch_alone() -> None:
    watch, usual = Stopwatch(CPU, images=100), sum(TAKES.values()) + 0.002
    assert watch.images_per_second == 0
    step(watch)
    steps.time.sleep(0.1)  # a look at held-out images
    watch.begin_epoch()
    assert watch.parts["data"] == watch.seconds == 0
    for slower in [9] * 5 + [1] * 10:
        step(watch, slower)
    steps.time.sleep(0.1)  # after the last step
    assert watch.parts["data"] == pytest.approx((9 * 5 + 10) * TAKES["data"])
    assert watch.seconds == pytest.approx(5 * (9 * usual - 8 * 0.002) + 10 * usual)
    assert watch.images_per_second == pytest.approx(1500 / watch.seconds)
