"""Signals that ask the run to stop: it ends after the step it is in, saved, and says which signal it was."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C; what schedulers and torchrun send before they kill; what SLURM, on no Windows, can send before time is over.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SAME_CTRL_C = 1.0  # seconds: a terminal sends it to every process, and torchrun passes it on once more


class StopRequests:
    """The signals that have come. A second Ctrl-C does not wait for the end of the step."""

    def __init__(self) -> None:
        self.seen = dict.fromkeys(STOPPING, 0)
        self.first_interrupt = math.inf

    def counts(self) -> list[int]:
        """How many of each, in the order of ``STOPPING``: every step, they are added up over the processes."""
        return list(self.seen.values())

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.seen[signal.Signals(number)] += 1
        if number == signal.SIGINT:
            now = time.monotonic()
            self.first_interrupt = min(self.first_interrupt, now)
            if now - self.first_interrupt > SAME_CTRL_C:
                raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Within, the signals are noted; outside, they do what they did before."""
    requests = StopRequests()
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, requests.handle)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arrived(counts: list[int]) -> signal.Signals | None:
    """The signal that any process has seen, by the sums of all processes' counts."""
    return next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)


def leave_stopping_to_parent(worker: int) -> None:
    """For a process that reads images: a scheduler's signal comes to every process, and this one is needed to the end.

    It goes when its parent terminates it, or is gone. ``worker_init_fn`` of a DataLoader.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
