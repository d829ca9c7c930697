"""Waits for the other ranks, and says which of them keep this one waiting, long before the group's timeout."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["wait"]

# A rank that has waited for a second says so in the store. The warning comes once, from one rank: a checkpoint or a
# compilation on one rank makes the others wait too.
VISIBLE_AFTER, TOLD_AFTER = 1.0, 10.0
_REMEDY = (
    "Every rank of the group has to call it, equally often. For one rank alone pass synchronize=False, where it can be "
    "passed; a rank that has no rows left takes part with none (z[:0])."
)
_logger = logging.getLogger("barlow_loss")


def wait(work: Any, caller: str, store: Any, rank: int, size: int) -> None:
    """Wait for a collective on the CPU that every rank of the group starts in a call of ``caller``.

    Args:
        work: the collective, started.
        caller: the function called, for messages.
        store: the group's key-value store.
        rank: of this process in the group.
        size: W, the ranks of the group.

    Raises:
        RuntimeError: a rank has ended, or has not come within the group's timeout.
    """
    try:
        if not _done_within(VISIBLE_AFTER, work):
            with _visible(store, rank):
                if not _done_within(TOLD_AFTER - VISIBLE_AFTER, work):
                    _tell(caller, store, rank, size)
                    work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"{caller}: expected all {size} ranks of the group to call it, but rank {rank} waited in vain: another "
            f"rank has ended, or did not call it within the group's timeout. {_REMEDY} (torch.distributed: {error})"
        ) from error


def _done_within(seconds: float, work: Any) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:  # the collective has failed, or is not done; the latter does it no harm
        if not work.is_completed():
            return False
        work.wait()
    return True


@contextmanager
def _visible(store: Any, rank: int) -> Generator[None]:
    store.set(_key(rank), "waits")
    try:
        yield
    finally:
        store.delete_key(_key(rank))


def _tell(caller: str, store: Any, rank: int, size: int) -> None:
    waiting = [other for other in range(size) if other == rank or store.check([_key(other)])]
    missing = [str(other) for other in range(size) if other not in waiting]
    if missing and rank == min(waiting):
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
        _logger.warning(
            f"{caller}: rank {rank} has waited for {TOLD_AFTER:.0f} s for {ranks} of {size}, and goes on waiting until "
            f"the group's timeout. {_REMEDY}"
        )


def _key(rank: int) -> str:
    return f"barlow_loss/rank {rank} waits"
