"""What is sent, counted: every collective of a step, its elements and its bytes."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from sharding import global_batch, shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from barlow_loss import barlow_twins_loss
from barlow_loss._collectives import Group, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan


class Sent(NamedTuple):
    """A collective on one rank: what it was given, and what a ring algorithm sends of it."""

    operation: str
    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> float:
        w = dist.get_world_size()
        return (
            self.elements * self.dtype.itemsize * {"allgather_": w - 1, "allreduce_": 2 * (w - 1) / w}[self.operation]
        )


class Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            operation = func._schema.name.removeprefix("c10d::")
            given = args[1] if operation == "allgather_" else args[0]
            for tensor in tree_leaves(given):
                self.sent.append(Sent(operation, tensor.numel(), tensor.dtype))
        return func(*args, **(kwargs or {}))


def _step(counts, d, algorithm, matmul_dtype, gradients=True):
    """The collectives of the header and forward, then those of the backward; bytes by the ring model of the gather."""
    views = [shard(z, counts).requires_grad_(gradients) for z in global_batch(counts, d, torch.float32)]
    with Traffic() as traffic:
        if matmul_dtype == torch.float32:
            loss = barlow_twins_loss(*views, algorithm=algorithm)
        else:  # what CUDA tensors get under autocast, here without the header
            shards = Shards(Group(dist.get_world_size(), None), counts)
            plan = Plan(algorithm, "eager", torch.float32, matmul_dtype)
            loss, _, _ = loss_and_sums(views, 0.0051, 1e-5, plan, shards)
    forward, traffic.sent = traffic.sent, []
    if gradients:
        with traffic:
            loss.backward()
    return forward, traffic.sent, sum(sent.bytes for sent in forward + traffic.sent)


def _official(counts, d):
    z1, z2 = (shard(z, counts) for z in global_batch(counts, d, torch.float32))
    with Traffic() as traffic:
        dist.all_reduce(z1.T @ z2)
    return sum(sent.bytes for sent in traffic.sent)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.float16], ids=str)
def test_the_dual_sends_2nd_elements_and_a_few_vectors(pool, world_size, matmul_dtype):
    """Both views' rows once, 9 D + 2 numbers of float64, and in backward two numbers."""
    n, d = 32, 512
    counts = (n // world_size,) * world_size
    f64 = torch.float64
    for forward, backward, total in pool.run(_step, world_size, counts, d, "dual", matmul_dtype, debug="OFF"):
        header = [Sent("allgather_", 3, torch.int64)] if matmul_dtype == torch.float32 else []
        assert forward == [
            *header,
            Sent("allreduce_", 2 * d, f64),  # the largest pivot
            Sent("allreduce_", 1 + 4 * d, f64),  # Chan's rule
            *[Sent("allgather_", n // world_size * d, matmul_dtype)] * 2,
            Sent("allreduce_", 3 * d + 1, f64),  # C_ii, ‖C‖², q of either view
        ]
        assert backward == [Sent("allreduce_", 2, torch.float32)]
        vectors = 2 * 8 * (9 * d + 2) + 200
        assert total <= 2 * n * d * matmul_dtype.itemsize + vectors


@pytest.mark.parametrize(("matmul_dtype", "share"), [(torch.float32, 4), (torch.float16, 8)], ids=["fp32", "fp16"])
def test_a_quarter_and_an_eighth_of_the_official_all_reduce(pool, matmul_dtype, share):
    """At N = D/4, as with 2048 × 8192."""
    counts, d = (32, 32), 256
    official = pool.run(_official, 2, counts, d, debug="OFF")[0]
    for forward, _, _ in pool.run(_step, 2, counts, d, "dual", matmul_dtype, debug="OFF"):
        gathered = [sent for sent in forward if sent.operation == "allgather_" and sent.dtype == matmul_dtype]
        received = sum(sent.elements * sent.dtype.itemsize for sent in gathered)  # by each of the W − 1 = 1 others
        assert received == official / share


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_primal_sends_c_and_a_few_vectors(pool, world_size):
    n, d = 64, 48
    counts = (n // world_size,) * world_size
    f64 = torch.float64
    for forward, backward, _ in pool.run(_step, world_size, counts, d, "primal", torch.float32, debug="OFF"):
        assert [sent for sent in forward if sent.elements > 4 * d + 1] == [Sent("allreduce_", d * d, torch.float32)]
        assert [sent for sent in forward if sent.dtype == f64] == [
            Sent("allreduce_", 2 * d, f64),
            Sent("allreduce_", 1 + 4 * d, f64),
            Sent("allreduce_", d, f64),
        ]
        assert backward == [Sent("allreduce_", 2, torch.float32)]


def test_without_gradients_nothing_is_sent_for_them(pool):
    d = 512
    for forward, backward, _ in pool.run(_step, 2, (9, 3), d, "dual", torch.float32, False, debug="OFF"):
        assert forward[-1] == Sent("allreduce_", d + 1, torch.float64)
        assert backward == []


def test_auto_takes_what_sends_less(pool):
    """The plan is made of the global shape: 2 × 12 rows of 48 features are N = D/2, though no rank has so many."""
    (dual, *_), (primal, *_) = (
        pool.run(_step, 2, counts, 48, "auto", torch.float32, debug="OFF")[0] for counts in ((12, 12), (13, 12))
    )
    assert "allgather_" in [sent.operation for sent in dual[1:]]
    assert "allgather_" not in [sent.operation for sent in primal[1:]]
