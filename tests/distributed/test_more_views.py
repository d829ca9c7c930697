"""P30–P33 of more than two views: on any number of processes the loss and gradients of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from sharding import SHARES, global_batch, shard

from barlow_loss import barlow_twins_loss, vicreg_loss
from strategies import Batch
from test_laws_views import Mean, random_weights

D = {"primal": 9, "dual": 40}
CASES = [(2, "even"), (2, "uneven"), (3, "uneven"), (3, "empty"), (3, "one-each")]


def _evaluate(counts, dtype, d, views, by_rank=False, ranks=None, **settings):
    """Loss, terms and the gradients of this rank's rows; by_rank: each rank weights the loss differently."""
    group, rank = None, dist.get_rank()
    if ranks is not None:
        group = dist.new_group(ranks)
        if rank not in ranks:
            return None
        rank = ranks.index(rank)
    z = [shard(view, counts, rank).requires_grad_() for view in global_batch(counts, d, dtype, views=views)]
    terms = barlow_twins_loss(*z, return_terms=True, process_group=group, **settings)
    ((1 + by_rank * rank) * terms.loss).backward()
    return [term.detach() for term in terms], [view.grad for view in z]


def _assert_exact(results, counts, dtype, d, views, weights, scale, **definition):
    expected = Mean(global_batch(counts, d, dtype, views=views), weights, **definition)
    for terms, _ in results:
        assert all(map(torch.equal, terms, results[0][0]))
    gradients = [torch.cat([result[1][view] for result in results]).double() / scale for view in range(views)]
    expected.assert_holds(results[0][0], gradients, dtype)


@pytest.mark.parametrize(("world_size", "shares"), CASES, ids=[f"{w}-{name}" for w, name in CASES])
@pytest.mark.parametrize("views", [3, 4])
def test_p30_equals_the_concatenated_batch(pool, world_size, shares, algorithm, dtype, views):
    counts, d, weights = SHARES[world_size][shares], D[algorithm], random_weights(views, 1)
    settings = {"algorithm": algorithm, "pair_weights": weights}
    results = pool.run(_evaluate, world_size, counts, dtype, d, views, **settings)
    _assert_exact(results, counts, dtype, d, views, weights, world_size)


@pytest.mark.parametrize(("world_size", "shares"), [(2, "uneven"), (3, "empty")])
@pytest.mark.parametrize("views", [2, 3])
def test_p30_of_another_definition(pool, world_size, shares, algorithm, dtype, views):
    counts, d = SHARES[world_size][shares], D[algorithm]
    settings = {"algorithm": algorithm, "off_diagonal_target": -1.0, "correction": 1}
    results = pool.run(_evaluate, world_size, counts, dtype, d, views, **settings)
    _assert_exact(results, counts, dtype, d, views, None, world_size, target=-1.0, correction=1)


def test_p31_ranks_that_weight_the_loss_differently(pool, algorithm):
    counts, d = (2, 9, 4), D[algorithm]
    results = pool.run(_evaluate, 3, counts, torch.float64, d, 4, by_rank=True, algorithm=algorithm)
    _assert_exact(results, counts, torch.float64, d, 4, None, 6)


def test_p32_a_subgroup_of_two_in_a_world_of_three(pool, algorithm):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_evaluate, 3, counts, torch.float64, d, 3, ranks=(0, 2), algorithm=algorithm)
    _assert_exact([result for result in results if result], counts, torch.float64, d, 3, None, 2)


def _trained(counts, d, algorithm):
    """A linear encoder after 30 steps of SGD over three views of each step's batch."""
    encoder = torch.eye(d, dtype=torch.float64).requires_grad_()
    for step in range(30):
        views = Batch(sum(counts), d, step, "trained").more_views(3)
        loss = barlow_twins_loss(*(shard(view, counts) @ encoder for view in views), algorithm=algorithm)
        (gradient,) = torch.autograd.grad(loss, encoder)
        dist.all_reduce(gradient)
        with torch.no_grad():
            encoder -= 0.1 * gradient / dist.get_world_size()
    return encoder.detach()


def test_p33_training_is_the_same_on_any_number_of_processes(pool, algorithm):
    d = D[algorithm]
    (alone,) = pool.run(_trained, 1, (15,), d, algorithm)
    assert (alone - torch.eye(d)).norm() > 1e-3
    for counts in ((4, 11), (2, 9, 4)):
        for weights in pool.run(_trained, len(counts), counts, d, algorithm):
            torch.testing.assert_close(weights, alone, rtol=1e-12, atol=1e-12)


def test_another_number_of_views_on_one_rank_is_named(pool):
    """By all ranks, and none waits."""
    for error in pool.run(_one_view_more_on_rank_1, 3):
        assert "views = 3 on rank 1" in error
        assert "views = 2 on ranks 0, 2" in error
    for error in pool.run(_other_weights_on_rank_1, 2):
        assert "pair_weights" in error
        assert "off_diagonal_target = -1.0 on rank 1" in error


def _one_view_more_on_rank_1():
    z = torch.randn(4, 6)
    with pytest.raises(ValueError, match="the same arguments on every rank") as raised:
        barlow_twins_loss(*[z] * (3 if dist.get_rank() == 1 else 2))
    return str(raised.value)


def _other_weights_on_rank_1():
    z = torch.randn(4, 6)
    w = 1.0 + dist.get_rank()
    with pytest.raises(ValueError, match="the same arguments on every rank") as raised:
        barlow_twins_loss(z, z, z, pair_weights=[[0, w, 1], [w, 0, 1], [1, 1, 0]], off_diagonal_target=1 - w)
    return str(raised.value)


WRONG_CALLS = {
    "return_terms": ({"return_terms": 1}, "return_terms to be True or False, got 1"),
    "synchronize": ({"synchronize": "no"}, "synchronize to be True or False, got 'no'"),
    "z1": ({"z1": torch.zeros(4, 6)}, "z1 comes by position, too"),
}


def _wrong_on_rank_1(name, loss_fn):
    z, (wrong, words) = torch.randn(4, 6), WRONG_CALLS[name]
    with pytest.raises(TypeError, match=words) as raised:
        loss_fn(z, z, **wrong if dist.get_rank() == 1 else {})
    return str(raised.value)


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_call_that_is_wrong_on_one_rank_raises_on_all(pool, name):
    for loss_fn in [barlow_twins_loss, *([] if name == "z1" else [vicreg_loss])]:
        assert len(set(pool.run(_wrong_on_rank_1, 2, name, loss_fn))) == 1


def _elements_gathered(views, counts, d):
    sent = []
    original = dist.all_gather

    def counting(parts, own, **settings):
        if own.is_floating_point():
            sent.append(own.numel())
        return original(parts, own, **settings)

    dist.all_gather = counting
    try:
        z = [shard(view, counts).requires_grad_() for view in global_batch(counts, d, torch.float32, views=views)]
        barlow_twins_loss(*z, algorithm="dual").backward()
    finally:
        dist.all_gather = original
    return sum(sent)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_the_dual_sends_each_row_of_each_view_once(pool, views):
    counts, d = (7, 7), 40
    assert pool.run(_elements_gathered, 2, views, counts, d) == [views * 7 * d] * 2
