"""How a program of the example begins and ends: with what it was asked for, or with one line that says why not."""

import sys
from collections.abc import Callable
from io import TextIOWrapper

from barlow_recipes import distributed
from barlow_recipes.errors import LOST_WORKER, Aborted, Interrupted, UsageError

OUT_OF_MEMORY = "out of memory: try --chunk-size, --checkpoint-activations, a smaller --batch-size or --projector"


def exit_status(body: Callable[[], None], out_of_memory: str = OUT_OF_MEMORY) -> int:
    """Call the body, joined with the processes that torchrun has started, and tell its failure in one line.

    Returns:
        0: done; 2: a mistake in its use; 1: it could not go on; 128 + n: stopped by signal n.
    """
    known = {"by peer": "another process of this run has ended", "DataLoader worker": LOST_WORKER}  # in RuntimeErrors
    known |= {"out of memory": out_of_memory, "allocate memory": out_of_memory}
    try:
        with distributed.joined():
            body()
        return 0
    except UsageError as error:
        told, status = str(error), error.exit_code
    except KeyboardInterrupt:
        told, status = "interrupted", Interrupted.exit_code
    except OSError as error:
        told, status = str(error), Aborted.exit_code
    except RuntimeError as error:
        failures = [failure for text, failure in known.items() if text in str(error)]
        if not failures:
            raise
        told, status = failures[0], Aborted.exit_code
    print(f"error: {told}", file=sys.stderr)
    return status


def start(main: Callable[[], int]) -> None:
    """Run ``main`` as this process's program."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe, too
    sys.exit(main())
