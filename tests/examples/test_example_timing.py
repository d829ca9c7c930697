"""The stopwatch measures what a step does, and makes no device wait unless it is asked for a profile."""

import time

import pytest
import torch

from barlow_recipes import timing
from barlow_recipes.timing import PARTS, Profile, Stopwatch, loader_bound

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
    monkeypatch.setattr(timing, "time", clock)
    return clock


def step(watch: Stopwatch, slower: float = 1.0) -> Profile | None:
    for part, seconds in TAKES.items():
        with watch.lap(part):
            timing.time.sleep(slower * seconds)
    timing.time.sleep(0.002)
    return watch.end_step()


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that have been waited for; there need be none."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", devices.append)
    return devices


def test_a_profile_leaves_the_warm_up_out_and_adds_up() -> None:
    watch = Stopwatch(CPU, images=64, profile=4)
    profiles = [step(watch, slower=3 if number < 3 else 1) for number in range(9)]
    assert [profile is not None for profile in profiles] == [False] * 6 + [True] + [False] * 2
    profile = profiles[6]
    assert profile is not None
    assert profile.steps == 4
    expected = {part: 1000 * seconds for part, seconds in (TAKES | {"other": 0.002}).items()}
    assert profile.milliseconds == pytest.approx(expected)
    assert profile.shares == pytest.approx({part: ms / sum(expected.values()) for part, ms in expected.items()})
    assert [row["part"] for row in profile.rows] == list(PARTS)
    assert profile.images_per_second == pytest.approx(64 / (sum(TAKES.values()) + 0.002))


def test_the_table_of_a_profile() -> None:
    shares = dict(zip(PARTS, (0.1, 0.3, 0.05, 0.45, 0.08, 0.02), strict=True))
    profile = Profile(20, 2345.6, {part: 400 * share for part, share in shares.items()}, shares)
    assert str(profile).splitlines() == [
        "part        median ms    share",
        "──────────────────────────────",
        "data            40.00   10.0 %",
        "forward        120.00   30.0 %",
        "loss            20.00    5.0 %",
        "backward       180.00   45.0 %",
        "optimizer       32.00    8.0 %",
        "other            8.00    2.0 %",
        "20 steps, 2,346 images/s",
        "the loss and its gradient take 5.0 % of a step",
    ]


def test_only_a_profile_waits_for_the_device(synchronized: list[torch.device]) -> None:
    step(Stopwatch(GPU, images=1))
    assert synchronized == []
    watch = Stopwatch(GPU, images=1, profile=1)
    for _ in range(4):
        step(watch)
    assert set(synchronized) == {GPU}
    assert len(synchronized) == 1 + 4 * (2 * len(TAKES) + 1)
    synchronized.clear()
    step(watch)
    assert synchronized == []  # it is over


def test_several_laps_of_a_part_add_up() -> None:
    """As in a step whose gradient is accumulated."""
    watch = Stopwatch(CPU, images=1, profile=1)
    for _ in range(4):
        for _ in range(3):
            with watch.lap("forward"):
                timing.time.sleep(0.005)
        profile = watch.end_step()
    assert profile is not None
    assert profile.milliseconds["forward"] == pytest.approx(15)


def test_the_wait_for_images_and_the_speed_are_of_the_epoch_alone() -> None:
    watch = Stopwatch(CPU, images=100)
    assert watch.images_per_second == watch.epoch_images_per_second == 0
    step(watch)
    timing.time.sleep(0.1)  # a look at held-out images
    watch.begin_epoch()
    assert watch.waited == watch.seconds == 0
    for _ in range(3):
        step(watch)
    assert watch.waited == pytest.approx(3 * TAKES["data"])
    assert watch.seconds == pytest.approx(3 * (sum(TAKES.values()) + 0.002))
    assert watch.epoch_images_per_second == pytest.approx(300 / watch.seconds)
    assert watch.images_per_second == pytest.approx(watch.epoch_images_per_second)
    timing.time.sleep(0.1)
    assert watch.epoch_images_per_second == pytest.approx(300 / watch.seconds)  # to the end of the last step


def test_laps_that_nobody_asked_for_cost_nothing() -> None:
    """A hundredth of a millisecond for the laps of a step, which takes tens of them; the best of some tries."""
    watch = Stopwatch(CPU, images=1)

    def microseconds() -> float:
        began = time.perf_counter()
        for _ in range(200):
            for part in TAKES:
                with watch.lap(part):
                    pass
            watch.end_step()
        return 1e6 * (time.perf_counter() - began) / 200

    assert min(microseconds() for _ in range(20)) < 20


def test_a_run_that_waits_for_images_is_told() -> None:
    assert loader_bound(waited=20, total=100) is None
    warning = loader_bound(waited=43.4, total=100)
    assert warning is not None
    assert "43 % of the time" in warning
    for remedy in ("--workers", "--augment-on device", "disk", "shards"):
        assert remedy in warning
    assert loader_bound(waited=0, total=0) is None
