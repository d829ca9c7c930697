"""P30–P32: on any number of processes the loss and the gradients are those of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from sharding import CASES, SHARES, global_batch, shard

from barlow_loss import BarlowTwinsLoss, barlow_twins_loss
from barlow_loss._collectives import ALONE, Group, Shards, all_reduce_matrix
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan
from comparison import assert_near, evaluate, tolerance, truth

D = {"primal": 9, "dual": 40}
KINDS = ("trained", "gaussian", "heavy_tailed", "dead_features", "near_collapsed", "low_rank")


def _views(counts, dtype, d, **batch):
    return [shard(z, counts).requires_grad_() for z in global_batch(counts, d, dtype, **batch)]


def _evaluate(counts, dtype, d, batch=None, **settings):
    """Loss, terms and the gradients of this rank's rows."""
    views = _views(counts, dtype, d, **(batch or {}))
    terms = barlow_twins_loss(*views, return_terms=True, **settings)
    terms.loss.backward()
    return *(term.detach() for term in terms), [view.grad for view in views]


def _assert_exact(results, counts, dtype, d, scale, batch=None, tol=1.0):
    """Within the tolerances of P30 of float64 on the whole batch; the loss in the same bits on every rank."""
    z1, z2 = global_batch(counts, d, dtype, **(batch or {}))
    expected = truth(z1, z2)
    value_tol, gradient_tol = tol * tolerance(dtype, 1e-12, 2e-6), tol * tolerance(dtype, 1e-10, 1e-5)
    for result in results:
        for term, first in zip(result[:3], results[0][:3], strict=True):
            assert torch.equal(term, first)
    assert results[0][0].dtype == dtype
    assert_near(results[0][0], expected.loss, expected.value_budget(value_tol, dtype))
    for view in (0, 1):
        gradient = torch.cat([result[3][view] for result in results]).double() / scale
        budget = expected.gradient_budget(view, gradient_tol, dtype)
        assert_near(gradient, expected.gradients[view], budget, f"gradient of z{view + 1}")


@pytest.mark.parametrize(("world_size", "shares"), CASES, ids=[f"{w}-{name}" for w, name in CASES])
def test_p30_equals_the_concatenated_batch(pool, world_size, shares, algorithm, dtype):
    """Even, uneven and empty shards, one sample each; DDP's mean needs W times the gradient of one process."""
    counts, d = SHARES[world_size][shares], D[algorithm]
    results = pool.run(_evaluate, world_size, counts, dtype, d, algorithm=algorithm)
    _assert_exact(results, counts, dtype, d, world_size)


@pytest.mark.parametrize("kind", KINDS)
def test_p30_for_every_kind_of_embeddings(pool, algorithm, dtype, kind):
    counts, d, batch = (2, 9, 4), D[algorithm], {"kind": kind}
    results = pool.run(_evaluate, 3, counts, dtype, d, batch=batch, algorithm=algorithm)
    _assert_exact(results, counts, dtype, d, 3, batch)


@pytest.mark.parametrize("mean", [1e4, -1e4])
@pytest.mark.parametrize("counts", [(2, 9, 4), (6, 0, 5)], ids=["uneven", "empty"])
def test_p29_large_means(pool, algorithm, dtype, counts, mean):
    """Of the standard deviation 1e-2, different on every rank; a rank without rows has no say in the pivot."""
    d, batch = D[algorithm], {"mean": mean, "std": 1e-2}
    results = pool.run(_evaluate, 3, counts, dtype, d, batch=batch, algorithm=algorithm)
    _assert_exact(results, counts, dtype, d, 3, batch)


def _against_one_process(counts, d, dtype, algorithm):
    results = _evaluate(counts, dtype, d, algorithm=algorithm)
    alone = evaluate(*global_batch(counts, d, dtype), algorithm=algorithm, synchronize=False)
    rows = [shard(gradient, counts) for gradient in alone.gradients]
    errors = [
        float((got.double() / dist.get_world_size() - row.double()).norm() / alone.gradients[view].norm())
        for view, (got, row) in enumerate(zip(results[3], rows, strict=True))
    ]
    return float(abs(results[0].double() - alone.loss.double()) / alone.loss), max(errors)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_distance_to_one_process_at_a_usual_size(pool, algorithm, dtype, world_size):
    """N = 200 and more rows than features, or fewer; plain relative errors, without a rounding band."""
    counts = (90, 110, 0, 50)[:world_size] if world_size != 3 else (90, 60, 50)
    d = 64 if algorithm == "primal" else 600
    for value, gradient in pool.run(_against_one_process, world_size, counts, d, dtype, algorithm):
        assert value <= tolerance(dtype, 1e-12, 2e-6)
        assert gradient <= tolerance(dtype, 1e-10, 1e-5)


@pytest.mark.parametrize(("world_size", "shares"), [(2, "uneven"), (3, "empty")])
def test_sum_reduction_divides_by_the_world_size(pool, world_size, shares, algorithm, dtype):
    """For a wrapper that adds the ranks' gradients up, they are the parts of one process's gradient."""
    counts, d = SHARES[world_size][shares], D[algorithm]
    settings = {"algorithm": algorithm, "grad_reduction": "sum"}
    _assert_exact(pool.run(_evaluate, world_size, counts, dtype, d, **settings), counts, dtype, d, 1)


def _weighted(counts, d, algorithm, grad_reduction):
    views = _views(counts, torch.float64, d)
    loss = barlow_twins_loss(*views, algorithm=algorithm, grad_reduction=grad_reduction)
    ((dist.get_rank() + 1) * loss).backward()
    return [view.grad for view in views]


@pytest.mark.parametrize("grad_reduction", ["mean", "sum"])
def test_p31_ranks_that_weight_the_loss_differently(pool, algorithm, grad_reduction):
    """What is differentiated is Σ_r (r + 1)·L, or with "sum" its mean over the ranks."""
    counts, d = (2, 9, 4), D[algorithm]
    results = pool.run(_weighted, 3, counts, d, algorithm, grad_reduction)
    expected = truth(*global_batch(counts, d, torch.float64))
    scale = {"mean": 6, "sum": 2}[grad_reduction]
    for view in (0, 1):
        gradient = torch.cat([result[view] for result in results])
        assert_near(gradient, scale * expected.gradients[view], 1e-10 * scale * float(expected.gradients[view].norm()))


def _terms_weighted(counts, d, algorithm):
    """Each term by itself, with another weight on every rank; a term that is not used stays without a gradient."""
    gradients = []
    for term in ("on_diagonal", "off_diagonal"):
        views = _views(counts, torch.float64, d)
        terms = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)
        gradients.append(torch.autograd.grad((dist.get_rank() + 1) * getattr(terms, term), views))
    return gradients


def test_each_term_by_itself(pool, algorithm):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_terms_weighted, 2, counts, d, algorithm)
    z1, z2 = global_batch(counts, d, torch.float64)
    on, total = truth(z1, z2, lambd=0.0), truth(z1, z2, lambd=1.0)
    for view in (0, 1):
        got_on, got_off = (torch.cat([result[term][view] for result in results]) for term in (0, 1))
        off = total.gradients[view] - on.gradients[view]
        assert_near(got_on, 3 * on.gradients[view], 3e-10 * float(on.gradients[view].norm()))
        assert_near(got_off, 3 * off, 3e-10 * float(total.gradients[view].norm()))


def _mixed_terms(counts, dtype, d, algorithm):
    """Rank 0 differentiates one term, the others the loss: what arrives in backward is not even of the same terms."""
    views = _views(counts, dtype, d)
    terms = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)
    (terms.on_diagonal if dist.get_rank() == 0 else terms.loss).backward()
    return [view.grad for view in views]


def test_a_term_on_one_rank_and_the_loss_on_the_other(pool, algorithm, dtype):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_mixed_terms, 2, counts, dtype, d, algorithm)
    z1, z2 = global_batch(counts, d, dtype)
    on, loss = truth(z1, z2, lambd=0.0), truth(z1, z2)
    for view in (0, 1):
        expected = on.gradients[view] + loss.gradients[view]
        got = torch.cat([result[view] for result in results])
        assert_near(got, expected, tolerance(dtype, 1e-10, 1e-5) * float(expected.norm()))


def _one_feature(counts):
    views = _views(counts, torch.float64, 1)
    loss = barlow_twins_loss(*views)
    loss.backward()
    with torch.inference_mode():
        again = barlow_twins_loss(*[view.detach() for view in views])
    return loss.detach(), again.clone(), [view.grad for view in views]


def test_a_single_feature_and_inference_mode(pool):
    counts = (3, 10)
    results = pool.run(_one_feature, 2, counts)
    expected = truth(*global_batch(counts, 1, torch.float64))
    for loss, again, _ in results:
        assert torch.equal(loss, again)
        assert_near(loss, expected.loss, expected.value_budget(1e-12, torch.float64))
    for view in (0, 1):
        gradient = torch.cat([result[2][view] for result in results]) / 2
        assert_near(gradient, expected.gradients[view], expected.gradient_budget(view, 1e-10, torch.float64))


def _in_subgroup(ranks, counts, d, algorithm, through_mesh):
    """The loss of a sub-group; the process outside it computes one of its own rows alone meanwhile."""
    if through_mesh:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, len(ranks)), mesh_dim_names=("dp", "shard"))
        group = mesh["shard"].get_group()
    else:
        group = dist.new_group(ranks)
    rank = dist.get_rank()
    if rank not in ranks:
        with pytest.raises(ValueError, match="process_group that this process belongs to"):
            barlow_twins_loss(torch.randn(4, d), torch.randn(4, d), process_group=group)
        return None
    views = [shard(z, counts, ranks.index(rank)).requires_grad_() for z in global_batch(counts, d, torch.float64)]
    loss = BarlowTwinsLoss(algorithm=algorithm, process_group=group)(*views)
    loss.backward()
    return loss.detach(), loss.detach(), loss.detach(), [view.grad for view in views]


@pytest.mark.parametrize("ranks", [(0, 2), (1, 2)])
def test_p32_a_subgroup_of_two_in_a_world_of_three(pool, algorithm, ranks):
    counts, d = (3, 10), D[algorithm]
    results = [result for result in pool.run(_in_subgroup, 3, ranks, counts, d, algorithm, False) if result]
    assert len(results) == 2
    _assert_exact(results, counts, torch.float64, d, 2)


def test_the_group_of_a_device_mesh(pool, algorithm):
    counts, d = (3, 10), D[algorithm]
    _assert_exact(pool.run(_in_subgroup, 2, (0, 1), counts, d, algorithm, True), counts, torch.float64, d, 2)


def _local(counts, d):
    z1, z2 = _views(counts, torch.float32, d)
    singleton = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    local = barlow_twins_loss(z1, z2, synchronize=False)
    assert torch.equal(BarlowTwinsLoss(synchronize=False)(z1, z2), local)
    assert torch.equal(barlow_twins_loss(z1, z2, process_group=singleton), local)
    return local.detach(), barlow_twins_loss(z1, z2).detach()


def test_a_local_loss_is_that_of_this_process(pool):
    counts, d = (3, 10), 40
    results = pool.run(_local, 2, counts, d)
    z1, z2 = global_batch(counts, d, torch.float32)
    for rank, (local, everywhere) in enumerate(results):
        assert torch.equal(local, barlow_twins_loss(shard(z1, counts, rank), shard(z2, counts, rank)))
        assert not torch.equal(local, everywhere)


def test_a_group_of_one_process_changes_no_bit():
    z1, z2 = global_batch((13,), 40, torch.float32)
    expected = barlow_twins_loss(z1, z2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(barlow_twins_loss(z1, z2), expected)
        assert torch.equal(barlow_twins_loss(z1, z2, process_group=dist.group.WORLD), expected)
    finally:
        dist.destroy_process_group()
    assert torch.equal(barlow_twins_loss(z1, z2), expected)


def _one_view(counts, d, algorithm, view):
    views = [shard(z, counts) for z in global_batch(counts, d, torch.float64)]
    views[view].requires_grad_()
    barlow_twins_loss(*views, algorithm=algorithm).backward()
    return views[view].grad, barlow_twins_loss(*[v.detach() for v in views], algorithm=algorithm)


@pytest.mark.parametrize("view", [0, 1])
def test_one_view_without_gradient_and_a_loss_without_any(pool, algorithm, view):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_one_view, 2, counts, d, algorithm, view)
    expected = truth(*global_batch(counts, d, torch.float64))
    gradient = torch.cat([gradient for gradient, _ in results]) / 2
    assert_near(gradient, expected.gradients[view], 1e-10 * float(expected.gradients[view].norm()))
    for _, loss in results:
        assert_near(loss, expected.loss, 1e-12 * float(expected.loss))


def _constant_and_poisoned(counts, d, algorithm, poison):
    """A feature that is one constant on all ranks adds exactly 1; a value that is not finite reaches every rank."""
    z1, z2 = (shard(z, counts) for z in global_batch(counts, d, torch.float32))
    z1[:, 0] = z2[:, 0] = 12345.678
    z1.requires_grad_(), z2.requires_grad_()
    without = barlow_twins_loss(z1[:, 1:], z2[:, 1:], algorithm=algorithm, return_terms=True)
    terms = barlow_twins_loss(z1, z2, algorithm=algorithm, return_terms=True)
    terms.loss.backward()
    grads = z1.grad[:, 0].abs().sum() + z2.grad[:, 0].abs().sum()
    poisoned = z1.detach().clone()
    if dist.get_rank() == 1:
        poisoned[2, 3] = poison
    loss = barlow_twins_loss(poisoned, z2.detach(), algorithm=algorithm)
    return float(terms.on_diagonal - without.on_diagonal), float(grads), float(loss)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_constant_features_and_poison(pool, algorithm, poison):
    for added, gradient, loss in pool.run(_constant_and_poisoned, 3, (2, 9, 4), D[algorithm], algorithm, poison):
        assert added == pytest.approx(1, abs=1e-6)
        assert gradient == 0
        assert loss != loss


def _sixteen_bit(counts, d, dtype, algorithm, autocast):
    views = [shard(z, counts).requires_grad_() for z in global_batch(counts, d, dtype, mean=1.0)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = barlow_twins_loss(*views, algorithm=algorithm)
    loss.backward()
    assert all(view.grad.dtype == dtype for view in views)
    return loss.detach(), [view.grad for view in views]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_low_precision(pool, algorithm, dtype, autocast):
    counts, d = (2, 9, 4), D[algorithm]
    results = pool.run(_sixteen_bit, 3, counts, d, dtype, algorithm, autocast)
    expected = truth(*global_batch(counts, d, dtype, mean=1.0))
    for loss, _ in results:
        assert loss.dtype == torch.float32
        assert torch.equal(loss, results[0][0])
        assert_near(loss, expected.loss, expected.value_budget(2e-6, torch.float32))
    for view in (0, 1):
        gradient = torch.cat([gradients[view] for _, gradients in results]).double() / 3
        rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
        budget = expected.gradient_budget(view, 1e-5 + rounding, torch.float32)
        assert_near(gradient, expected.gradients[view], budget, f"gradient of z{view + 1}")


def _float16_products(counts, d, algorithm):
    """What CUDA tensors get under autocast, run on the CPU: 16-bit operands, gathered as such."""
    views = _views(counts, torch.float32, d)
    shards = Shards(Group(dist.get_world_size(), None), counts)
    plan = Plan(algorithm, "eager", torch.float32, torch.float16)
    loss, _, _ = loss_and_sums(views, 0.0051, 1e-5, plan, shards)
    loss.backward()
    return loss.detach(), [view.grad for view in views]


def test_float16_products(pool, algorithm):
    """No worse than one process with the same operands by more than half of float16's rounding."""
    counts, d = (40, 64, 0, 24), 32 if algorithm == "primal" else 400
    results = pool.run(_float16_products, 4, counts, d, algorithm)
    z1, z2 = global_batch(counts, d, torch.float32)
    expected = truth(z1, z2)
    leaves = [z1.clone().requires_grad_(), z2.clone().requires_grad_()]
    plan = Plan(algorithm, "eager", torch.float32, torch.float16)
    loss, _, _ = loss_and_sums(leaves, 0.0051, 1e-5, plan, Shards(ALONE, (sum(counts),)))
    loss.backward()
    for view in (0, 1):
        size = float(expected.gradients[view].norm())
        alone = float((leaves[view].grad.double() - expected.gradients[view]).norm())
        gradient = torch.cat([gradients[view] for _, gradients in results]) / 4
        assert_near(gradient, expected.gradients[view], 1.5 * alone + 2**-12 * size)
    assert_near(results[0][0], expected.loss, 1e-3 * float(expected.loss))


def test_a_sum_over_ranks_of_float16_is_added_in_float32(pool):
    """In float16 2048 + 1 is 2048. Each rank holds the large number once, so that no order of adding hides it."""
    for totals in pool.run(_half_sum, 4):
        assert totals == [2052] * 4  # 2048 + 3, rounded once


def _half_sum():
    numbers = torch.ones(4, dtype=torch.float16)
    numbers[dist.get_rank()] = 2048
    return all_reduce_matrix(Group(dist.get_world_size(), None), numbers).tolist()


def _twice(counts, dtype, d, algorithm):
    """Backward twice over one graph, and a second derivative, which raises on every rank."""
    views = _views(counts, dtype, d)
    loss = barlow_twins_loss(*views, algorithm=algorithm)
    first = torch.autograd.grad(loss, views, retain_graph=True)
    second = torch.autograd.grad(loss, views, retain_graph=True)
    gradients = torch.autograd.grad(loss, views, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are taken in one process only, and this call has 2"):
        sum(gradient.square().sum() for gradient in gradients).backward()
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_backward_twice_is_the_same_and_a_second_derivative_raises(pool, algorithm, dtype):
    assert pool.run(_twice, 2, (3, 10), dtype, D[algorithm], algorithm) == [True, True]


def _same_tensor(counts, d, algorithm):
    view = shard(global_batch(counts, d, torch.float64)[0], counts).requires_grad_()
    wide = torch.stack([view.detach()] * 2, dim=2)[..., 0].requires_grad_()  # strided
    barlow_twins_loss(view, view, algorithm=algorithm).backward()
    barlow_twins_loss(wide, wide, algorithm=algorithm).backward()
    return view.grad, torch.equal(view.grad, wide.grad)


def test_the_same_tensor_as_both_views(pool, algorithm):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_same_tensor, 2, counts, d, algorithm)
    z = global_batch(counts, d, torch.float64)[0]
    expected = sum(truth(z, z).gradients)
    assert all(strided for _, strided in results)
    assert_near(torch.cat([gradient for gradient, _ in results]) / 2, expected, 1e-9 * float(expected.norm()))
