"""The rank, LiDAR and α-ReQ of uneven shards are those of the whole batch, on every process."""

import pytest
import torch
import torch.distributed as dist
from sharding import SHARES, global_batch, shard

from barlow_loss.diagnostics import alpha_req, effective_rank, lidar


def _measures(z1, z2, **settings):
    return (
        effective_rank(z1, **settings),
        effective_rank(z1, center=True, **settings),
        lidar(z1, z2, **settings),
        alpha_req(z1, first=1, **settings),
    )


def _of_this_process(counts):
    z1, z2 = (shard(z, counts) for z in global_batch(counts, 12, torch.float32))
    alone = _measures(z1, z2, synchronize=False) if dist.get_rank() == 0 else None  # the others need not call
    return _measures(z1, z2), alone


@pytest.mark.parametrize(("world_size", "shares"), [(2, "uneven"), (3, "empty"), (4, "even")])
def test_measures_are_about_the_whole_batch(pool, world_size, shares):
    counts = SHARES[world_size][shares]
    results = pool.run(_of_this_process, world_size, counts)
    z1, z2 = global_batch(counts, 12, torch.float32)
    assert [whole for whole, _ in results] == [_measures(z1, z2)] * world_size
    assert results[0][1] == _measures(shard(z1, counts, 0), shard(z2, counts, 0))


def _in_a_subgroup(counts):
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    z1, z2 = (shard(z, counts, dist.get_rank() // 2) for z in global_batch(counts, 12, torch.float64))
    return _measures(z1, z2, process_group=group)


def test_measures_in_a_subgroup(pool):
    first, nothing, third = pool.run(_in_a_subgroup, 3, (3, 10))
    assert nothing is None
    assert first == third == _measures(*global_batch((3, 10), 12, torch.float64))


def _wrong_on_rank_1(name, settings):
    z = torch.ones(0 if settings == "empty" else 4, 6)
    own = settings if isinstance(settings, dict) and dist.get_rank() == 1 else {}
    call = {
        "effective_rank": lambda: effective_rank(z, **own),
        "lidar": lambda: lidar(z, z, **own),
        "alpha_req": lambda: alpha_req(z, **own),
    }[name]
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("name", "settings", "kind", "named"),
    [
        ("effective_rank", {"center": True}, "ValueError", "center = True on rank 1"),
        ("effective_rank", {"center": 1}, "TypeError", "From rank 1 of 2"),
        ("effective_rank", "empty", "ValueError", "N ≥ 1 samples"),
        ("lidar", {"delta": 1e-3}, "ValueError", "delta = 0.001 on rank 1"),
        ("lidar", {"delta": -1.0}, "ValueError", "From rank 1 of 2"),
        ("lidar", "empty", "ValueError", "N = 0 on rank 0; N = 0 on rank 1"),
        ("alpha_req", {"first": 2}, "ValueError", "first = 2 on rank 1"),
        ("alpha_req", {"last": 5}, "ValueError", "From rank 1 of 2"),
        ("alpha_req", {}, "ValueError", "N = 8, D = 6 and first=11"),
    ],
)
def test_what_is_wrong_on_one_process_raises_on_all(pool, name, settings, kind, named):
    first, second = pool.run(_wrong_on_rank_1, 2, name, settings)
    assert first == second
    assert first[0] == kind
    assert named in first[1]
