"""How a program of the example begins and ends: with what it was asked for, or with one line that says why not."""

import sys
from collections.abc import Callable
from io import TextIOWrapper

from barlow_recipes import distributed
from barlow_recipes.errors import LOST_WORKER, Aborted, Interrupted, UsageError

OUT_OF_MEMORY = "out of memory: try --checkpoint-activations, --accumulate, a smaller --batch-size or --projector"
KNOWN_FAILURES = {  # by a part of a RuntimeError's message
    "out of memory": OUT_OF_MEMORY,
    "allocate memory": OUT_OF_MEMORY,
    "DataLoader worker": LOST_WORKER,
    "by peer": "another process of this run has ended",
}


def exit_status(body: Callable[[], None], out_of_memory: str = OUT_OF_MEMORY) -> int:
    """Call the body, joined with the processes that torchrun has started, and tell its failure in one line.

    Returns:
        0: done; 2: a mistake in its use; 1: it could not go on; 128 + n: stopped by signal n.
    """
    try:
        with distributed.joined():
            body()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        known = [failure for text, failure in KNOWN_FAILURES.items() if text in str(error)]
        if not known:
            raise
        print(f"error: {known[0]}", file=sys.stderr)
        return Aborted.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return Aborted.exit_code
    return 0


def start(main: Callable[[], int]) -> None:
    """Run ``main`` as this process's program."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe, too
    sys.exit(main())
