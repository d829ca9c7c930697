"""How a program begins and ends: with what it was asked for, or with one line that says why not."""

import math
import signal
import sys
import time
from collections.abc import Callable
from io import TextIOWrapper
from types import FrameType

from barlow_recipes import distributed
from barlow_recipes.errors import LOST_WORKER, Aborted, Interrupted, UsageError

OUT_OF_MEMORY = "out of memory: try --chunk-size, a smaller --batch-size or --projector"
# Ctrl-C; what schedulers and torchrun send before they kill; what SLURM, on no Windows, can send before time is over.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SAME_CTRL_C = 1.0  # seconds: a terminal sends it to every process, and torchrun passes it on once more


def exit_status(body: Callable[[], None], out_of_memory: str = OUT_OF_MEMORY) -> int:
    """0: the body is done. Or say why not: 2, a mistake in its use; 1, it could not go on; 128 + n, signal n."""
    known = {"by peer": "another process of this run has ended", "DataLoader worker (pid": LOST_WORKER}  # of torch
    known |= {"out of memory": out_of_memory, "allocate memory": out_of_memory}
    try:
        with distributed.process_group():
            body()
        return 0
    except UsageError as error:
        message, status = str(error), error.exit_code
    except KeyboardInterrupt:
        message, status = "interrupted", Interrupted.exit_code
    except OSError as error:
        message, status = str(error), Aborted.exit_code
    except RuntimeError as error:
        failures = [failure for text, failure in known.items() if text in str(error)]
        if not failures:
            raise
        message, status = failures[0], Aborted.exit_code
    sys.stderr.write(f"error: {message}\n")  # one write, where print() may make two: other processes tell theirs, too
    return status


def start(main: Callable[[], int]) -> None:
    """Run ``main`` as this process's program."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe, too
    sys.exit(main())


class StopRequests:
    """Within, the signals are noted; outside, they do what they did before. A second Ctrl-C does not wait."""

    def __enter__(self) -> "StopRequests":
        self.seen, self.first_interrupt = dict.fromkeys(STOPPING, 0), math.inf
        self.before = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in self.before.items():
            signal.signal(number, self.handle if handler != signal.SIG_IGN else handler)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

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


def arrived(counts: list[int]) -> signal.Signals | None:
    """The signal that any process has seen, by the sums of all processes' counts."""
    return next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)


def leave_stopping_to_parent(worker: int) -> None:
    """In a process that reads images, to which a scheduler's signal comes as well, and which is needed to the end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
