"""The monitor on several processes: one report about the whole batch, told once, and an end for all."""

import pytest
import torch
import torch.distributed as dist
from sharding import SHARES, global_batch, shard

from barlow_loss import BarlowTwinsLoss, CollapseGate, CollapseMonitor, TrainingCollapsed, collapse_report


def _steps(counts, watched):
    logged, reports = [], []
    settings = {"every": 2, "log": lambda step, values: logged.append((step, values))}
    z1, z2 = (shard(z, counts) for z in global_batch(counts, 12, torch.float64))
    monitor, loss_fn = CollapseMonitor(**settings), BarlowTwinsLoss()
    if watched:
        monitor.watch(loss_fn)
    for step in range(4):
        loss_fn(z1, z2)
        reports += [] if watched else [monitor(step, z1, z2)]
    return logged, reports


@pytest.mark.parametrize("watched", [False, True], ids=["called", "watching"])
@pytest.mark.parametrize(("world_size", "shares"), [(2, "uneven"), (3, "empty")])
def test_the_report_is_about_the_whole_batch_and_told_once(pool, world_size, shares, watched):
    counts = SHARES[world_size][shares]
    expected = collapse_report(*global_batch(counts, 12, torch.float64))
    results = pool.run(_steps, world_size, counts, watched)
    assert [logged for logged, _ in results] == [[(0, expected.as_dict()), (2, expected.as_dict())]] + [[]] * (
        world_size - 1
    )
    for _, reports in results:
        assert reports == ([] if watched else [expected, None, expected, None])


def _collapse(per_rank, watched, synchronize=True):
    """In step 2 the embeddings of all are one; ``per_rank``: only rank 1's gate finds it bad."""
    rank = dist.get_rank()
    gate = (
        (lambda report, step: "enough" if rank == 1 and step == 2 else None) if per_rank else CollapseGate(patience=1)
    )
    monitor = CollapseMonitor(every=1, log=lambda step, values: None, gate=gate, synchronize=synchronize)
    loss_fn = BarlowTwinsLoss(synchronize=synchronize)
    if watched:
        monitor.watch(loss_fn)
    for step in range(4):
        z1, z2 = torch.ones(2, 4, 6) if step == 2 and not per_rank else _noise(rank)
        try:
            loss_fn(z1, z2)
            if not watched:
                monitor(step, z1, z2)
        except TrainingCollapsed as error:
            return str(error)
    return None


def _noise(rank):
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("watched", [False, True], ids=["called", "watching"])
def test_the_run_ends_on_all_in_the_same_step(pool, watched):
    first, second = pool.run(_collapse, 2, False, watched)
    assert first == second
    assert first.startswith("step 2: the effective rank is 0")


def test_a_gate_of_one_process_speaks_for_all(pool):
    assert pool.run(_collapse, 3, True, False) == ["step 2: enough"] * 3


def test_without_synchronisation_every_process_is_on_its_own(pool):
    assert pool.run(_collapse, 2, True, False, synchronize=False) == [None, "step 2: enough"]


def _in_a_subgroup():
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    logged = []
    z1, z2 = _noise(dist.get_rank())
    report = CollapseMonitor(log=lambda step, values: logged.append(step), process_group=group)(0, z1, z2)
    return report.n, logged


def test_in_a_subgroup_its_first_process_tells(pool):
    assert pool.run(_in_a_subgroup, 3) == [None, (8, [0]), (8, [])]


def _disagreeing(what):
    """What goes wrong on rank 1 alone, and whether the group still works after it."""
    other = dist.get_rank() == 1

    def gate(report, step):
        if other and what == "the gate fails":
            raise KeyError("no such limit")

    def log(step, values):
        if what == "the log fails":
            raise OSError("no space left")

    gates = {"no gate": None if other else gate, "the gate fails": gate}
    monitor = CollapseMonitor(every=3 if other and what == "every" else 2, log=log, gate=gates.get(what))
    z = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    try:
        monitor(0, *z)
        raised = None
    except Exception as error:
        raised = type(error).__name__, str(error)
    return raised, float(BarlowTwinsLoss()(*z))


@pytest.mark.parametrize(
    ("what", "kind", "named"),
    [
        ("every", "ValueError", "every = 2 on rank 0, every = 3 on rank 1"),
        ("no gate", "ValueError", "gate = one on rank 0, gate = none on rank 1"),
        ("the gate fails", "RuntimeError", "CollapseMonitor: 'no such limit' (From rank 1 of 2, raised on all"),
    ],
)
def test_what_is_wrong_on_one_process_is_told_on_all(pool, what, kind, named):
    results = pool.run(_disagreeing, 2, what)
    assert len({loss for _, loss in results}) == 1
    for (found, message), _ in results:
        assert found == kind
        assert named in message


def test_a_log_that_fails_leaves_no_process_waiting(pool):
    (first, loss), (second, same) = pool.run(_disagreeing, 2, "the log fails")
    assert first == ("OSError", "no space left")
    assert second is None
    assert loss == same
