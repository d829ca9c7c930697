"""A peer that dies or stays away: an error within seconds on the others, never a result."""

import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from pool import Died
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm, _collectives, _waiting, collapse_report
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
        if where == "before the loss":
            assert message.startswith("barlow_twins_loss: expected all 3 ranks of the group to call it")


def _one_stays_away(told):
    """Rank 1 calls nothing until the other has got the group's timeout, and no loss."""
    if dist.get_rank() == 1:
        until(told.exists, "the error of rank 0")
        return
    with pytest.raises(RuntimeError, match=r"^barlow_twins_loss: expected all 2 ranks.*rank 0 waited.*Timed out"):
        BarlowTwinsLoss()(torch.randn(4, 10), torch.randn(4, 10))
    told.touch()


def test_a_peer_that_never_comes(pool, tmp_path):
    pool.run(_one_stays_away, 2, tmp_path / "told", group_timeout=1.5, debug="OFF")


# A busy machine may keep a rank that is not late from being seen for a second.
TOLD_AFTER = 4.0


class _Told(logging.Handler):
    """What the library logged, by every rank, in files that the others wait for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def emit(self, record):
        (self.folder / f"rank {dist.get_rank()} {len(self.read())}").write_text(record.getMessage())

    def read(self):
        return [path.read_text() for path in sorted(self.folder.iterdir())]


def _the_last_ones_are_late(folder, early, rounds):
    """The later ranks wait until one of the early ones has told, and call then. Every rank's loss."""
    told, rank = _Told(folder), dist.get_rank()
    logger = logging.getLogger("barlow_loss")
    logger.addHandler(told)
    logger.propagate = False
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(rank))
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_waiting, "VISIBLE_AFTER", 0.05)
            patched.setattr(_waiting, "TOLD_AFTER", TOLD_AFTER)
            for done in range(rounds):
                if rank >= early:
                    until(lambda done=done: len(told.read()) > done, "what an early rank tells")
                report = collapse_report(z, z)
        assert not dist.group.WORLD.get_group_store().check([_waiting._key(rank)])
    finally:
        logger.removeHandler(told)
    return report.loss, told.read()


@pytest.mark.parametrize(("early", "missing"), [(1, "ranks 1, 2"), (2, "rank 2")])
def test_who_keeps_the_others_waiting_is_told_by_one_of_them_once(pool, tmp_path, early, missing):
    """TORCH_DISTRIBUTED_DEBUG=DETAIL has a barrier of its own before every collective, which names them."""
    results = pool.run(_the_last_ones_are_late, 3, tmp_path, early, 2, debug="OFF")
    assert len({loss for loss, _ in results}) == 1
    assert len(results[0][1]) == 2
    first, second = results[0][1]
    assert first == second
    assert first.startswith(f"collapse_report: rank 0 has waited for 4 s for {missing}, and goes on")
    assert "synchronize=False" in first


class _Unusable(dist.Store):
    """A store that can nothing but fail."""


def _no_store():
    raise RuntimeError("this backend has no store")


def _late_with_a_store_that(fails, folder):
    """Rank 1 comes late, while the store fails, or blocks until the test is over, or takes its time."""
    told, released = _Told(folder), threading.Event()
    blocking = SimpleNamespace(set=lambda *_: released.wait(), delete_key=lambda _: None)
    slow = SimpleNamespace(set=lambda *_: None, check=lambda _: True, delete_key=lambda _: time.sleep(0.3))
    stores = {"fails": _Unusable, "blocks": lambda: blocking, "is missing": _no_store, "is slow": lambda: slow}
    peers = _collectives._peers
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_waiting, "VISIBLE_AFTER", 0.05)
        patched.setattr(_waiting, "TOLD_AFTER", 0.2)
        patched.setattr(_collectives, "_peers", lambda group: peers(group)._replace(store=stores[fails]))
        if dist.get_rank() == 1:
            time.sleep(1.0)
        z = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        loss = collapse_report(z, z).loss
    watching = _waiting.THREAD in [thread.name for thread in threading.enumerate()]
    released.set()
    return loss, told.read(), watching


@pytest.mark.parametrize("fails", ["fails", "blocks", "is missing", "is slow"])
def test_a_store_that_cannot_be_used_changes_nothing(pool, tmp_path, fails):
    """Nor does a thread stay behind, which would abort an interpreter that ends, but where its store blocks."""
    (loss, told, watching), other = pool.run(_late_with_a_store_that, 2, fails, tmp_path, debug="OFF")
    assert (loss, told, False) == other
    assert told == []
    assert watching == (fails == "blocks")


def _late_in_a_part_of_the_world(folder):
    """Of ranks 1 and 2, in a group of their own, 2 comes late."""
    part, told, rank = dist.new_group([1, 2]), _Told(folder), dist.get_rank()
    logging.getLogger("barlow_loss").addHandler(told)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_waiting, "VISIBLE_AFTER", 0.05)
            patched.setattr(_waiting, "TOLD_AFTER", TOLD_AFTER)
            if rank == 2:
                until(told.read, "what rank 1 tells")
            if rank > 0:
                collapse_report(torch.ones(4, 10), torch.ones(4, 10), process_group=part)
    finally:
        logging.getLogger("barlow_loss").removeHandler(told)


def test_ranks_are_numbered_as_in_the_world(pool, tmp_path):
    pool.run(_late_in_a_part_of_the_world, 3, tmp_path, debug="OFF")
    (said,) = (path.read_text() for path in tmp_path.iterdir())
    assert said.startswith("collapse_report: rank 1 has waited for 4 s for rank 2, and goes on")
    assert "2 ranks are in the group" in said


def test_nothing_is_told_where_nobody_waits(pool, tmp_path):
    for _, told in pool.run(_the_last_ones_are_late, 3, tmp_path, 3, 3):
        assert told == []
