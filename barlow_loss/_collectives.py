"""The only file that knows torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["require_one_process", "world_size"]


def world_size(process_group: ProcessGroup | None = None) -> int:
    """Number of processes in ``process_group`` (default: the world); 1 where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


def require_one_process(process_group: ProcessGroup | None, *, caller: str, remedy: str) -> None:
    """Refuse to return a local result where a global one was asked for.

    Raises:
        NotImplementedError: the group has more than one process.
    """
    size = world_size(process_group)
    if size > 1:
        raise NotImplementedError(
            f"{caller}: expected one process, got a process group of world size {size}; statistics over several "
            f"processes are not implemented in this version. {remedy}"
        )
