"""Several processes of torchrun, one run: which rows of a batch are ours, and what one process does or says for all."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow_loss import DistributedBatchNorm
from barlow_recipes.errors import UsageError, first_line

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; rank 0 alone prints and takes Ctrl-C.

    Of failures the first is raised, on the rank that has it. The others, which follow from it, exit in silence.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    store = _connect()
    if not is_rank_zero():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(sys.stdout if is_rank_zero() else nowhere),
        ):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if store.add("failures", 1) > 1:
            sys.exit(getattr(error, "exit_code", 1))
        raise
    finally:
        dist.destroy_process_group()


def _connect() -> "dist.Store":
    """Form the group. With a GPU it has a backend for the CPU's small messages as well: they make no GPU wait."""
    # DistributedDataParallel imports it. Imported after the group is formed, it keeps the group's threads past their
    # end (torch 2.14.1), and now and then one of them aborts the process at its exit.
    importlib.import_module("torch._dynamo")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        from torch.distributed.rendezvous import rendezvous

        store, own_rank, size = next(rendezvous("env://"))
        # torchrun --max-restarts keeps the store of an attempt for the next one, with the addresses of the dead in it.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
    except (ImportError, RuntimeError, ValueError) as error:
        lost = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not find each other"
        raise UsageError(f"{lost} ({first_line(error)}): start them with torchrun") from None
    return store


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several on a machine, each has the GPU of its number there."""
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UsageError(f"--device {device}: expected cpu or cuda for several processes; each has a GPU of its own")
    number, gpus = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if number >= gpus:
        raise UsageError(f"--device {device}: expected a GPU for each process, {gpus} found for {number + 1} or more")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def shard(n: int) -> slice:
    """This process's rows of a batch of n: contiguous, as many as every other's or one fewer or more."""
    size = world_size()
    return slice(n * rank() // size, n * (rank() + 1) // size)


def data_parallel(model: nn.Module) -> nn.Module:
    """What to train in place of the model, so that several processes take the step that one would take.

    The model itself gets the batch statistics of all processes, so from then on all must call it in train().
    """
    if world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_gpu else DistributedBatchNorm.convert
    network = DistributedDataParallel(convert(model))
    # They are the same bits on every rank. Not as an argument: torch 2.14 deprecates it for one that 2.13 lacks.
    network.broadcast_buffers = False
    return network


def all_reduce(numbers: Sequence[int]) -> list[int]:
    """The sums over the processes, which wait for each other: about half a millisecond for two."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers)
    dist.all_reduce(sums)
    return sums.tolist()


def require_agreement(facts: Mapping[str, object]) -> None:
    """Compare what must be the same on all processes, which wait for each other; all raise what differs first."""
    if world_size() == 1:
        return
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, dict(facts))
    for number, theirs in enumerate(everyones):
        for name in [name for name, value in everyones[0].items() if theirs[name] != value]:
            differs = f"{name}: {everyones[0][name]} on rank 0, {theirs[name]} on rank {number}"
            remedy = "Start all with the same command, on the same data and, to resume, with the same checkpoint"
            raise UsageError(f"the processes do not agree about {differs}. {remedy}")


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call the function on rank 0 alone; every rank waits, and gets what it returned or raises its UsageError."""
    answer: list[Any] = [None, None]
    if is_rank_zero():
        try:
            answer[0] = function()
        except UsageError as error:
            answer[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(answer)
    result, failure = answer
    if failure is not None:
        raise failure
    return result
