"""A peer that dies or stays away: an error within seconds on the others, never a result."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Died
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm
from programs import until


def _train_and_lose_rank_1(where):
    """Three steps, then rank 1 is killed in the middle of one."""
    torch.manual_seed(0)
    model = DistributedBatchNorm.convert(nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, 40)))
    model = DistributedDataParallel(model)
    loss_fn = BarlowTwinsLoss()

    def die(*_):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(4):
        z1, z2 = (model(torch.randn(3 + dist.get_rank(), 5)) for _ in range(2))
        if step == 3:
            started = time.perf_counter()
            if where == "before the loss":
                die()
            elif where == "in the network's backward":
                z1.register_hook(die)
        try:
            loss = loss_fn(z1, z2)
            if step == 3 and where == "before the backward's sum":
                loss.register_hook(die)
            loss.backward()
        except RuntimeError as error:
            assert step == 3
            return time.perf_counter() - started, str(error)
    return None


@pytest.mark.parametrize("where", ["before the loss", "before the backward's sum", "in the network's backward"])
def test_a_peer_killed_in_the_middle_of_a_step(pool, where):
    results = pool.run(_train_and_lose_rank_1, 3, where, deaths=True, debug="OFF")
    assert isinstance(results[1], Died)
    for rank in (0, 2):
        seconds, message = results[rank]
        assert seconds < 20  # far below the group's timeout
        assert message


def _one_stays_away(told):
    """Rank 1 calls nothing until the other has got the group's timeout, and no loss."""
    if dist.get_rank() == 1:
        until(told.exists, "the error of rank 0")
        return
    with pytest.raises(RuntimeError):
        BarlowTwinsLoss()(torch.randn(4, 10), torch.randn(4, 10))
    told.touch()


def test_a_peer_that_never_comes(pool, tmp_path):
    pool.run(_one_stays_away, 2, tmp_path / "told", group_timeout=1.5, debug="OFF")
