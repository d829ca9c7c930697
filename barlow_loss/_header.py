"""The header: before the first sum of a call, every rank learns what the others were given.

What is wrong on one rank then raises the same error on all of them, in milliseconds. Without it gloo aborts one process
and shows the others a closed connection, and a rank that catches its error and continues blocks them until the timeout.
The header is three integers per rank; the texts are exchanged only where there is something to say.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._collectives import Group, Shards, assert_equal_on_all_ranks, gather_integers, gather_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["UNEVEN", "MustMatch", "check_on_all_ranks", "check_samples", "may_synchronize"]

MustMatch = dict[str, Any]  # by name, what every rank must have alike

# A number of the header names an error's type; the last that fits, since a NotImplementedError is a RuntimeError too.
_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, NotImplementedError)
_MOST_LISTED = 8
_SHAPE_LINES = ("D =", "C =", "dtype =")
UNEVEN = (
    "expected as many rows on every rank under torch.compile and in a CUDA graph. Use drop_last=True in the data "
    "loader, or eager mode, which takes shards of any sizes."
)


def check_on_all_ranks(caller: str, group: Group, z: Any, check: Callable[[], tuple[int, MustMatch]]) -> Shards:
    """Check the arguments on every rank and return the shards of the batch, or raise the same error on every rank.

    A compiled graph and a CUDA graph cannot wait for a value. There the header shrinks to an assertion on the device
    that all ranks have equally many rows, and what else is wrong on one rank leaves the others waiting.

    Args:
        caller: the function called, for messages.
        group: the processes.
        z: a tensor of the call, if it is one. Its device carries the header where the group has no backend for the CPU.
        check: checks this rank's arguments; returns its number of rows, and what every rank must have alike.

    Raises:
        Exception: what ``check`` raised on this rank or on another.
        ValueError: what must match differs among the ranks.
    """
    if group.size == 1:
        return Shards(group, (check()[0],))
    if not may_synchronize(z):
        n, _ = check()
        sums = assert_equal_on_all_ranks(group, n, z.device, f"{caller}: {UNEVEN}")
        # An empty shard must reach the assertion, not a check of the sizes that it alone would fail.
        return Shards(group, (n or 1,) * group.size, sums)
    failure, n = None, 0
    try:
        n, must_match = check()
        text = _lines({"function": caller} | must_match)
    except Exception as error:  # of any type: the peers are already in the collective
        failure, text = error, str(error)
    headers = gather_integers(caller, group, (_kind(failure), n, _fingerprint(text)), z)
    kinds, counts, fingerprints = (tuple(column) for column in zip(*headers, strict=True))
    if any(kinds):
        raise _common_failure(caller, kinds, counts, gather_texts(caller, group, text, z)) from failure
    if len(set(fingerprints)) > 1:
        raise ValueError(_disagreement(caller, gather_texts(caller, group, text, z)))
    return Shards(group, counts)


def may_synchronize(z: Any) -> bool:
    """Whether a value may be read back here: not while torch.compile traces, not while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (isinstance(z, Tensor) and z.is_cuda and torch.cuda.is_current_stream_capturing())


def check_samples(caller: str, z: Tensor, shards: Shards) -> None:
    """At least two samples in the global batch.

    Raises:
        ValueError: fewer; on every rank, since all of them know the counts.
    """
    if shards.total >= 2:
        return
    got = f"got {tuple(z.shape)}"
    if shards.group.size > 1:
        got = f"got {_listed([f'N = {count} on rank {rank}' for rank, count in enumerate(shards.counts)], '; ')}"
    raise ValueError(
        f"{caller}: expected N ≥ 2 samples in the batch, {got}. Statistics over the batch need at least two; "
        "use a larger batch and drop_last=True in the data loader."
    )


def _kind(failure: Exception | None) -> int:
    """The type of a failure as a number of the header; 0 for none."""
    if failure is None:
        return 0
    return max((k for k, known in enumerate(_ERRORS, start=1) if isinstance(failure, known)), default=1)


def _lines(must_match: MustMatch) -> str:
    return "\n".join(f"{name} = {value}" for name, value in must_match.items())


def _fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _common_failure(caller: str, kinds: Sequence[int], counts: Sequence[int], texts: list[str]) -> Exception:
    """The first failed rank's error, with those of others, or the sizes and dtypes of the ranks that have none."""
    failed = [rank for rank, kind in enumerate(kinds) if kind]
    message = texts[failed[0]]
    if len(set(texts)) > 1:
        for rank, text in enumerate(texts):
            if not kinds[rank]:
                named = [line for line in text.split("\n") if line.startswith(_SHAPE_LINES)]
                texts[rank] = ", ".join([f"N = {counts[rank]}", *named])
        others = [f"{_ranks(ranks)}: {what}" for what, ranks in _grouped(texts) if what != message]
        message = f"{message} (From {_ranks(failed)} of {len(kinds)}, raised on all. {_listed(others, '; ')}.)"
    return _ERRORS[kinds[failed[0]] - 1](message if message.startswith(caller) else f"{caller}: {message}")


def _disagreement(caller: str, texts: list[str]) -> str:
    """Everything that differs, with its values and the ranks that have them; of different functions, that alone."""
    differing = [
        _listed([f"{value} on {_ranks(ranks)}" for value, ranks in _grouped(values)], ", ")
        for values in zip(*(text.split("\n") for text in texts), strict=False)
        if len(set(values)) > 1
    ]
    if differing[0].startswith("function"):
        differing = differing[:1]
    return (
        f"{caller}: expected the same arguments on every rank except the number of rows, got {'; '.join(differing)}. "
        "Give every rank the same model, settings and call."
    )


def _grouped(texts: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Each text once, in one line, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text.replace("\n", ", "), []).append(rank)
    return list(ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_listed([str(rank) for rank in ranks], ', ')}"


def _listed(items: Sequence[str], separator: str) -> str:
    more = f"{separator}… ({len(items)} in all)" if len(items) > _MOST_LISTED else ""
    return separator.join(items[:_MOST_LISTED]) + more
