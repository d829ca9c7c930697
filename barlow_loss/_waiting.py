"""Waits for the other ranks, and says which of them keep this one waiting, long before the group's timeout."""

from __future__ import annotations

import contextlib
import logging
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Peers", "wait"]

# A rank that has waited for a second says so in the store. The warning comes once, from one rank: a checkpoint or a
# compilation on one rank makes the others wait too.
VISIBLE_AFTER, TOLD_AFTER = 1.0, 10.0
# At the end of the interpreter a thread within torch's C++ aborts the process (pytorch/pytorch#38228), so it is waited
# for; but not longer than this, since its store may block.
ENDED_WITHIN = 1.0
THREAD = "barlow_loss waits for other ranks"
_REMEDY = (
    "Every rank of the group has to call it, equally often. For one rank alone pass synchronize=False, where it can be "
    "passed; a rank that has no rows left takes part with none (z[:0])."
)
_logger = logging.getLogger("barlow_loss")


class Peers(NamedTuple):
    """The ranks of a group, as the world numbers them, this one among them, and what gives the group's store."""

    store: Callable[[], Any]
    ranks: list[int]
    own: int


def wait(work: Any, caller: str, peers: Callable[[], Peers]) -> None:
    """Wait for a collective on the CPU that every rank of the group starts in a call of ``caller``.

    Args:
        work: the collective, started.
        caller: the function called, for messages.
        peers: gives the group, if it is asked for: only where the collective takes long, or fails.

    Raises:
        RuntimeError: a rank has ended, or has not come within the group's timeout.
    """
    try:
        if not _done_within(VISIBLE_AFTER, work):
            _wait_watched(work, caller, peers())
    except RuntimeError as error:
        _, ranks, own = peers()
        raise RuntimeError(
            f"{caller}: expected all {len(ranks)} ranks of the group to call it, but rank {own} waited in vain: "
            f"another rank has ended, or did not call it within the group's timeout. {_REMEDY} "
            f"(torch.distributed: {error})"
        ) from error


def _done_within(seconds: float, work: Any) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
        return True
    except RuntimeError:  # the collective has failed, or it takes longer, which does it no harm
        if not work.is_completed():
            return False
    work.wait()  # raises why it has failed
    return True


def _wait_watched(work: Any, caller: str, peers: Peers) -> None:
    """Wait in slices, between which Ctrl-C is noticed, while a thread looks at the store.

    A thread, since a store may fail or block, where the collective does neither.
    """
    done = threading.Event()
    watching = threading.Thread(target=_watch, args=(done, caller, peers), name=THREAD, daemon=True)
    watching.start()
    try:
        while not _done_within(VISIBLE_AFTER, work):
            pass
    finally:
        done.set()
        watching.join(ENDED_WITHIN)


def _watch(done: threading.Event, caller: str, peers: Peers) -> None:
    """Be seen in the store while the collective takes; tell once who is not.

    Whoever came within the first ``TOLD_AFTER`` seconds is to be seen ``VISIBLE_AFTER`` later.
    """
    with contextlib.suppress(Exception):
        store, ranks, own = peers.store(), peers.ranks, peers.own
        store.set(_key(own), "waits")
        if not done.wait(TOLD_AFTER):
            _tell(caller, store, ranks, own)
            done.wait()
        store.delete_key(_key(own))


def _tell(caller: str, store: Any, ranks: list[int], own: int) -> None:
    waiting = [rank for rank in ranks if rank == own or store.check([_key(rank)])]
    missing = [str(rank) for rank in ranks if rank not in waiting]
    if missing and own == min(waiting):
        named = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
        _logger.warning(
            f"{caller}: rank {own} has waited for {TOLD_AFTER:.0f} s for {named}, and goes on waiting until the "
            f"group's timeout. {len(ranks)} ranks are in the group. {_REMEDY}"
        )


def _key(rank: int) -> str:
    return f"barlow_loss/rank {rank} waits"
