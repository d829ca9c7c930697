"""What the diagnostics look at: the rows of all processes, once all of them agree about the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barlow_loss._collectives import Shards, gather_rows, group_of
from barlow_loss._header import MustMatch, check_on_all_ranks
from barlow_loss._plan import vector_dtype
from barlow_loss._validation import check_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["agreed", "rows_of_all"]


def agreed(
    caller: str,
    views: Sequence[Any],
    process_group: ProcessGroup | None,
    synchronize: bool,
    check: Callable[[], MustMatch],
) -> Shards:
    """How many rows each process has. ``check`` looks at views and settings, and returns the settings as all have them.

    Raises:
        TypeError, ValueError: what ``check`` raises on one process, or arguments that differ; on every process.
    """

    def checked() -> tuple[int, MustMatch]:
        check_flags(caller, synchronize=synchronize)
        settings = check()
        z = views[0]
        return z.shape[0], {
            "D": z.shape[1],
            "views": len(views),
            "dtype": z.dtype,
            "device": z.device.type,
            **settings,
        }

    return check_on_all_ranks(caller, group_of(caller, process_group, synchronize), next(iter(views), None), checked)


def rows_of_all(shards: Shards, z: Tensor) -> Tensor:
    """(n, D) of each process to (N, D) on every one, in float64 where the device has it."""
    return gather_rows(shards, z).to(vector_dtype(z.device))
