"""The stopwatch measures what a step does, and makes no device wait unless it is asked for a profile."""

import pytest
import torch

from barlow_recipes import timing
from barlow_recipes.timing import Profile, Stopwatch, loader_bound

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
    for part, seconds in [*TAKES.items()] * 2:  # as where the gradient is accumulated: laps add up
        with watch.lap(part):
            timing.time.sleep(slower * seconds / 2)
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
    expected = {part: 1000 * seconds for part, seconds in (TAKES | {"other": 0.002}).items()}
    assert {row["part"]: row["milliseconds"] for row in profile.rows} == pytest.approx(expected)
    shares = {part: ms / sum(expected.values()) for part, ms in expected.items()}
    assert {row["part"]: row["share"] for row in profile.rows} == pytest.approx(shares)
    assert profile.images_per_second == pytest.approx(64 / (sum(TAKES.values()) + 0.002))


def test_the_table_of_a_profile() -> None:
    seconds = {"data": 0.04, "forward": 1.2, "loss": 0.02, "backward": 0.18, "optimizer": 0.16}
    assert str(Profile([seconds], images=800)).splitlines() == [
        "part       median ms   share",
        "────────────────────────────",
        "data           40.00   2.5 %",
        "forward     1,200.00  75.0 %",
        "loss           20.00   1.2 %",
        "backward      180.00  11.2 %",
        "optimizer     160.00  10.0 %",
        "other           0.00   0.0 %",
        "500 images/s",
    ]


def test_only_a_profile_waits_for_the_device(synchronized: list[torch.device]) -> None:
    step(Stopwatch(GPU, images=1))
    assert synchronized == []
    watch = Stopwatch(GPU, images=1, profile=1)
    for _ in range(4):
        step(watch)
    assert set(synchronized) == {GPU}
    assert len(synchronized) == 1 + 4 * (2 * 2 * len(TAKES) + 1)
    synchronized.clear()
    step(watch)
    assert synchronized == []  # it is over


def test_the_wait_for_images_and_the_speed_are_of_the_epoch_alone() -> None:
    watch, usual = Stopwatch(CPU, images=100), sum(TAKES.values()) + 0.002
    assert watch.images_per_second == watch.epoch_images_per_second == 0
    step(watch)
    timing.time.sleep(0.1)  # a look at held-out images
    watch.begin_epoch()
    assert watch.waited == watch.seconds == 0
    for slower in [9] * 5 + [1] * 10:
        step(watch, slower)
    timing.time.sleep(0.1)  # after the last step
    assert watch.waited == pytest.approx((9 * 5 + 10) * TAKES["data"])
    assert watch.seconds == pytest.approx(5 * (9 * usual - 8 * 0.002) + 10 * usual)
    assert watch.images_per_second == pytest.approx(100 / usual)  # of the last ten steps
    assert watch.epoch_images_per_second == pytest.approx(1500 / watch.seconds)


def test_a_run_that_waits_for_images_is_told() -> None:
    assert loader_bound(waited=20, total=100) is loader_bound(waited=0, total=0) is None
    warning = loader_bound(waited=43.4, total=100)
    for words in ("43 % of the time", "--workers", "--augment-on device", "disk", "shards"):
        assert words in str(warning)
