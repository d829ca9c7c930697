"""A program in one process, or in two that are the ranks of one run."""

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from programs import Nursery


class Done(NamedTuple):
    """What the processes of a run have said, one after the other, and the first status that is not 0."""

    status: int
    output: str
    errors: str

    @property
    def told(self) -> list[str]:
        """What the program itself says went wrong."""
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


def launch(nursery: Nursery, folder: Path, processes: int, program: Path, *flags: object) -> Done:
    """Run a program to its end; a hang is a failure."""
    with ExitStack() as stack:
        ranks = [stack.enter_context(rank) for rank in nursery.ranks(processes, [program, *flags], folder)]
        statuses = [rank.wait() for rank in ranks]
    status = next(filter(None, statuses), 0)
    return Done(status, "".join(rank.output for rank in ranks), "".join(rank.errors for rank in ranks))
