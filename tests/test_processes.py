"""One process of a group is served; more than one is refused by name, never served with a local loss in disguise."""

import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from barlow_loss import BarlowTwinsLoss, barlow_twins_loss
from strategies import Batch

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)


def test_a_group_of_one_process_changes_no_bit():
    z1, z2 = Batch(6, 20, 1, "trained").views(torch.float32)
    expected = barlow_twins_loss(z1, z2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(barlow_twins_loss(z1, z2), expected)
        assert torch.equal(barlow_twins_loss(z1, z2, process_group=dist.group.WORLD), expected)
    finally:
        dist.destroy_process_group()


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    z1, z2 = Batch(6, 20, rank, "trained").views(torch.float32)
    singleton = [dist.new_group([0]), dist.new_group([1])][rank]
    for loss in (barlow_twins_loss, BarlowTwinsLoss()):
        with pytest.raises(NotImplementedError, match=r"size 2.*synchronize=False"):
            loss(z1, z2)
    local = barlow_twins_loss(z1, z2, synchronize=False)
    assert torch.equal(BarlowTwinsLoss(synchronize=False)(z1, z2), local)
    assert torch.equal(barlow_twins_loss(z1, z2, process_group=singleton), local)
    dist.destroy_process_group()
    assert torch.equal(barlow_twins_loss(z1, z2), local)


@pytest.mark.timeout(120)
def test_two_processes_are_refused_unless_the_loss_is_local(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port,), nprocs=2)
