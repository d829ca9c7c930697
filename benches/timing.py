"""How things are timed: in turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator

Turn = Callable[[], object]
Clock = Callable[[Turn, int], float]

TURN_SECONDS = 0.1
LEAST_ROUNDS = 3


def time_calls(turn: Turn, calls: int = 1) -> float:
    """Seconds per call of ``turn``."""
    start = time.perf_counter()
    for _ in range(calls):
        turn()
    return (time.perf_counter() - start) / calls


def processor_time(turn: Turn, calls: int = 1) -> float:
    """Seconds of this thread's processor per call of ``turn``: what else the machine does is not in them."""
    start = time.thread_time_ns()
    for _ in range(calls):
        turn()
    return (time.thread_time_ns() - start) / 1e9 / calls


def interleave(
    turns: dict[str, Turn], rounds: int, seconds: float, clock: Clock = time_calls
) -> dict[str, list[float]]:
    """Seconds per call of each of ``turns``, round by round; after ``seconds`` only the least number of rounds.

    All have run before, so that nothing is set up here; a fast one is repeated until its turn lasts.
    """
    taken = {name: _Repeated(turn, clock) for name, turn in turns.items()}
    for _ in _rounds(taken, rounds, seconds):
        for repeated in taken.values():
            repeated.take()
    return {name: repeated.times for name, repeated in taken.items()}


def beside(
    turns: dict[str, Turn], reference: str, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The same, with a turn of ``reference`` right before that of every other one; and the ratios of these pairs.

    A round in which others take seconds is long; two turns that follow each other share what the machine does.
    """
    taken = {name: _Repeated(turn, time_calls) for name, turn in turns.items()}
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    for _ in _rounds(taken, rounds, seconds):
        for name, repeated in taken.items():
            own = taken[reference].take()
            ratios[name].append(1.0 if name == reference else repeated.take() / own)
    return {name: repeated.times for name, repeated in taken.items()}, ratios


class _Repeated:
    """Takes turns, and keeps their ``times`` per call, and the seconds ``spent``."""

    def __init__(self, turn: Turn, clock: Clock) -> None:
        self._turn = turn
        self._clock = clock
        self._calls = 0
        self.times: list[float] = []
        self.spent = 0.0

    def take(self) -> float:
        """Seconds per call in this turn; the first call of a slow one is its first turn."""
        if self._calls == 0:
            first = self._clock(self._turn, 1)
            self._calls = max(1, math.ceil(TURN_SECONDS / first))
            if self._calls == 1:
                return self._keep(first)
        return self._keep(self._clock(self._turn, self._calls))

    def _keep(self, seconds: float) -> float:
        self.times.append(seconds)
        self.spent += self._calls * seconds
        return seconds


def _rounds(taken: dict[str, _Repeated], rounds: int, seconds: float) -> Iterator[int]:
    """Counts rounds, without garbage collection, until there is enough."""
    gc.disable()
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and sum(repeated.spent for repeated in taken.values()) > seconds:
                return
            yield done
    finally:
        gc.enable()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Each one's time over that of ``over``, taken within each round."""
    return {name: spread([t / base for t, base in zip(own, times[over], strict=True)]) for name, own in times.items()}
