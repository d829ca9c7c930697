"""The only file that knows torch.distributed: whose rows form one batch, sums over them, and their exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, library

from barlow_loss._waiting import Peers, wait

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ALONE",
    "TRANSFORMS",
    "Group",
    "Shards",
    "all_reduce_matrix",
    "all_reduce_max",
    "all_reduce_sum",
    "assert_equal_on_all_ranks",
    "gather_integers",
    "gather_rows",
    "gather_texts",
    "group_of",
    "is_first",
    "once_even",
]


class Group(NamedTuple):
    """The processes whose rows form one batch."""

    size: int
    handle: ProcessGroup | None


ALONE = Group(1, None)
TRANSFORMS = "torch.func's transforms, forward-mode derivatives and torch.jit.trace"


class Shards(NamedTuple):
    """A batch, by rows per rank; in a graph Σ n and Σ n² over the ranks too, for ``once_even``."""

    group: Group
    counts: tuple[int, ...]
    sums: Tensor | None = None

    @property
    def total(self) -> int:
        """N, the rows of the global batch."""
        return sum(self.counts)


def group_of(caller: str, process_group: Any, synchronize: bool = True) -> Group:
    """The group to synchronise over: this process alone unless torch.distributed runs more than one in it.

    Raises:
        TypeError: ``process_group`` is no process group.
        ValueError: this process is not one of the group.
    """
    if not dist.is_available():
        return ALONE
    if process_group is not None:
        check_group(caller, process_group)
        if not isinstance(process_group, dist.ProcessGroup):
            raise ValueError(
                f"{caller}: expected a process_group that this process belongs to; it is not among the ranks that "
                "torch.distributed.new_group was given. Call it on the group's own processes only, each with its group."
            )
    if not synchronize:
        return ALONE
    if not dist.is_initialized():
        if process_group is not None:
            raise ValueError(
                f"{caller}: expected a living process_group, but torch.distributed is not initialised (any more). "
                "Call it between init_process_group() and destroy_process_group(), or pass process_group=None."
            )
        return ALONE
    size = dist.get_world_size(process_group)
    return Group(size, process_group) if size > 1 else ALONE


def is_first(group: Group) -> bool:
    """Whether this process is the one that speaks for the group."""
    return group.size == 1 or dist.get_rank(group.handle) == 0


def only_alone(caller: str, group: Group, what: str) -> None:
    """RuntimeError where what is asked for is not done over several processes."""
    if group.size > 1:
        raise RuntimeError(
            f"{caller}: {what} are taken in one process only, and this call has {group.size}. Pass synchronize=False, "
            "where it can be passed, for this process's rows."
        )


def check_group(caller: str, process_group: Any) -> None:
    """Accept a process group, or what ``new_group`` returns to a process outside of it, which may be kept but not used.

    Raises:
        TypeError: ``process_group`` is no process group.
    """
    if process_group is None or not dist.is_available():
        return
    if isinstance(process_group, dist.ProcessGroup) or process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return
    raise TypeError(
        f"{caller}: expected process_group to be a torch.distributed.ProcessGroup, got "
        f"{type(process_group).__name__}. Use torch.distributed.new_group(ranks), or mesh.get_group() of a DeviceMesh."
    )


def all_reduce_sum(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Σ over the ranks of several tensors of one dtype, in one collective; differentiable where gradients are recorded.

    Alone, the tensors themselves.
    """
    if group.size == 1:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    if torch.is_grad_enabled() and packed.requires_grad:
        packed = _Sum.apply(packed, group)
    else:
        dist.all_reduce(packed, group=group.handle)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


class _Sum(torch.autograd.Function):
    """y = Σ_r x_r on every rank, so ∂/∂x_r is the sum over the ranks of their ∂/∂y."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.clone()
        dist.all_reduce(y, group=group.handle)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(ctx.group, grads[0])[0], None


def all_reduce_matrix(group: Group, matrix: Tensor) -> Tensor:
    """Σ over the ranks of a large tensor, over the tensor itself where it can; added in float32 at least."""
    if group.size == 1:
        return matrix
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    dist.all_reduce(wide, group=group.handle)
    return wide.to(matrix.dtype)


def all_reduce_max(group: Group, tensor: Tensor) -> Tensor:
    """The largest over the ranks, elementwise."""
    if group.size == 1:
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return largest


def gather_rows(shards: Shards, rows: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks: (n, D) of each to (N, D) on every one.

    The collective takes equal shapes only, so shorter shards are filled up on the way.
    """
    group, counts, _ = shards
    if group.size == 1:
        return rows
    most = max(counts)
    even = min(counts) == most
    filled = rows if rows.shape[0] == most else torch.nn.functional.pad(rows, (0, 0, 0, most - rows.shape[0]))
    gathered = rows.new_empty((group.size * most, rows.shape[1]))
    parts = [gathered[rank * most : (rank + 1) * most] for rank in range(group.size)]
    dist.all_gather(parts, filled.contiguous(), group=group.handle)
    return gathered if even else torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def gather_integers(caller: str, group: Group, values: tuple[int, ...], z: Any) -> list[tuple[int, ...]]:
    """Every rank's integers, in the order of the ranks; waits for them. z: a tensor of the call, if it is one."""
    local = torch.tensor(values, dtype=torch.int64, device=_device_of_small_things(group, z))
    gathered = local.new_empty((group.size, len(values)))
    work = dist.all_gather(list(gathered.unbind()), local, group=group.handle, async_op=True)
    if local.is_cpu:
        wait(work, caller, lambda: _peers(group))
    else:
        cast("Any", work).wait()
    return [tuple(row) for row in cast("list[list[int]]", gathered.tolist())]  # pyright: ignore[reportUnknownMemberType]


def _peers(group: Group) -> Peers:
    handle: Any = group.handle or dist.group.WORLD
    return Peers(handle.get_group_store, dist.get_process_group_ranks(handle), dist.get_rank())


def gather_texts(caller: str, group: Group, text: str, z: Any) -> list[str]:
    """Every rank's text, in the order of the ranks; on the path of errors only.

    all_gather_object would need numpy, which torch does without.
    """
    data = text.encode()
    longest = 1 + max(length for (length,) in gather_integers(caller, group, (len(data),), z))
    return [bytes(row).decode().rstrip() for row in gather_integers(caller, group, tuple(data.ljust(longest)), z)]


def _device_of_small_things(group: Group, z: Any) -> torch.device:
    """The CPU where the group has a backend for it: no accelerator has to synchronise. Else the device of z."""
    if "cpu:" in dist.get_backend_config(group.handle):
        return torch.device("cpu")
    if isinstance(z, Tensor) and not z.is_cpu:
        return z.device
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def assert_equal_on_all_ranks(group: Group, number: int, device: torch.device, message: str) -> Tensor:
    """The same verdict on every rank, W Σ n² = (Σ n)², reached on the device; where it fails, all of them raise."""
    local = torch.full((1,), number, dtype=torch.int64, device=device)  # no copy from the host, which a capture forbids
    sums = torch.cat([local, local * local])
    dist.all_reduce(sums, group=group.handle)
    _assert_even(sums, group.size, message)
    return sums


def _assert_even(sums: Tensor, size: int, message: str) -> None:
    torch._assert_async(size * sums[1] == sums[0].square(), message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


@library.custom_op("barlow_loss::once_even", mutates_args=())
def once_even(t: Tensor, sums: Tensor, size: int, message: str) -> Tensor:
    """A copy of t. A compiler may move an assertion behind a gather of uneven rows, which hangs, but not this."""
    _assert_even(sums, size, message)
    return t.clone()


@once_even.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(t: Tensor, sums: Tensor, size: int, message: str) -> Tensor:
    return torch.empty_like(t)
