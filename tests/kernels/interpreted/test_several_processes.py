"""The Triton backend on the shards of several processes, in the interpreter: the loss of the whole batch."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from repaired_interpreter import poisoned, repaired

from barlow_loss._collectives import Group, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan
from comparison import assert_near, truth

sys.path.append(str(Path(__file__).parents[2] / "distributed"))
from pool import Pool
from sharding import SHARES, global_batch, shard

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

F64, F32, F16 = torch.float64, torch.float32, torch.float16


@pytest.fixture(scope="module")
def pool():
    pool = Pool("repaired_interpreter", "barlow_loss._backends.triton")
    yield pool
    pool.close()


def _evaluate(counts, d, dtype, products, algorithm, needed):
    views = [
        shard(z, counts).requires_grad_(need)
        for z, need in zip(global_batch(counts, d, dtype, std=2.0), needed, strict=True)
    ]
    plan = Plan(algorithm, "triton", dtype, products)
    with repaired(), poisoned():
        loss, _, _ = loss_and_sums(views, 0.0051, 1e-5, plan, Shards(Group(dist.get_world_size(), None), counts))
        # Every rank weights the loss in its own way: the gradient is that of the sum over the ranks.
        (loss * (1 + dist.get_rank())).backward()
    return loss.detach(), [view.grad for view in views]


def _assert_true(results, counts, d, dtype, needed, value_tol, gradient_tol):
    expected = truth(*global_batch(counts, d, dtype, std=2.0))
    weights = sum(1 + rank for rank in range(len(counts)))
    for loss, _ in results:
        assert torch.equal(loss, results[0][0])
        assert_near(loss, expected.loss, value_tol * float(expected.loss))
    for view in (0, 1):
        gradients = [gradients[view] for _, gradients in results]
        if not needed[view]:
            assert gradients == [None] * len(counts)
            continue
        right = weights * expected.gradients[view]
        assert_near(torch.cat(gradients), right, gradient_tol * float(right.norm()), f"gradient of z{view + 1}")


@pytest.mark.parametrize("shares", ["even", "uneven", "first-empty", "one-each"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_is_the_loss_of_the_whole_batch(pool, algorithm, world_size, shares):
    counts, d = SHARES[world_size][shares], 37
    results = pool.run(_evaluate, world_size, counts, d, F64, F64, algorithm, (True, True))
    _assert_true(results, counts, d, F64, (True, True), 1e-12, 1e-10)


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_of_one_view(pool, algorithm, needed):
    counts = (3, 10)
    results = pool.run(_evaluate, 2, counts, 20, F64, F64, algorithm, needed)
    _assert_true(results, counts, 20, F64, needed, 1e-12, 1e-10)


@pytest.mark.parametrize(("products", "value_tol", "gradient_tol"), [(F32, 2e-6, 1e-5), (F16, 1e-3, 2e-3)], ids=str)
def test_in_lower_precision(pool, algorithm, products, value_tol, gradient_tol):
    counts, d = (20, 33), 20 if algorithm == "primal" else 200
    results = pool.run(_evaluate, 2, counts, d, F32, products, algorithm, (True, True))
    _assert_true(results, counts, d, F32, (True, True), value_tol, gradient_tol)
