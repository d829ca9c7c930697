"""VICReg and mixed samples on several processes: those of one process with the whole batch, value and gradients."""

import pytest
import torch
import torch.distributed as dist
from sharding import CASES, SHARES, global_batch, shard

from barlow_loss import MixedBarlowTwinsLoss, VICRegLoss, mixed_barlow_twins_loss, reference, vicreg_loss
from barlow_loss._collectives import Group, Shards
from barlow_loss._gram_norm import batch_for, cross_norm
from comparison import assert_near, centered, tolerance
from related import Answer, mixed_conditions, vicreg_conditions

D = {"primal": 9, "dual": 40}
FEW = [(world_size, shares) for world_size, shares in CASES if world_size in (2, 3)]
NAMES = {"vicreg": 2, "vicreg of 3 views": 3, "mixed": 3}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def _whole(name, counts, d, dtype, **batch):
    """All rows of all views."""
    z1, z2 = global_batch(counts, d, torch.float64, **batch)
    noise = torch.randn(len(z1), d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    third = 0.3 * z1 + 0.7 * z2.roll(1, 0) + 0.1 * z1.std() * noise
    return [z.to(dtype) for z in (z1, z2, third)[: NAMES[name]]]


def _alpha(rank):
    """Every rank has drawn its own."""
    return 0.2 + 0.15 * rank


def _permutation(count, rank):
    return torch.randperm(count, generator=torch.Generator().manual_seed(rank))


def _loss(name, views, rank=None, **settings):
    if name != "mixed":
        return vicreg_loss(*views, **settings)
    rank = dist.get_rank() if rank is None else rank
    return mixed_barlow_twins_loss(*views, _alpha(rank), _permutation(len(views[0]), rank), **settings)


def _right(name, counts, d, dtype, **batch):
    """The oracle in float64 on the concatenated batch."""
    leaves = [z.double().requires_grad_() for z in _whole(name, counts, d, dtype, **batch)]
    if name == "mixed":
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        permutation = torch.cat([_permutation(n, rank) + starts[rank] for rank, n in enumerate(counts)])
        alpha = torch.cat([torch.full((n, 1), _alpha(rank), dtype=torch.float64) for rank, n in enumerate(counts)])
        terms = reference.mixed_barlow_twins_loss(*[centered(z) for z in leaves], alpha, permutation)
        conditions = mixed_conditions
    else:
        terms, conditions = reference.vicreg_loss(*leaves), vicreg_conditions
    gradients = torch.autograd.grad(terms.loss, leaves)
    value, bands = conditions(*(leaf.detach() for leaf in leaves))
    return Answer(
        tuple(term.detach() for term in terms), gradients, float(value), tuple(float(band.norm()) for band in bands)
    )


def _evaluate(name, counts, dtype, d, batch=None, weighted=False, **settings):
    """The terms and the gradients of this rank's rows."""
    views = [shard(z, counts).requires_grad_() for z in _whole(name, counts, d, dtype, **(batch or {}))]
    terms = _loss(name, views, return_terms=True, **settings)
    ((dist.get_rank() + 1 if weighted else 1) * terms.loss).backward()
    return [term.detach() for term in terms], [view.grad for view in views]


def _assert_exact(results, expected, dtype, scale):
    """The loss in the same bits on every rank, and within the tolerances of P30 of float64 on the whole batch."""
    for terms, _ in results:
        assert all(torch.equal(term, first) for term, first in zip(terms, results[0][0], strict=True))
    budget = expected.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype)
    assert_near(results[0][0][0], expected.loss, budget, "loss")
    for view in range(len(expected.gradients)):
        gradient = torch.cat([gradients[view] for _, gradients in results]).double() / scale
        allowed = expected.gradient_budget(view, tolerance(dtype, 1e-10, 1e-5), dtype)
        assert_near(gradient, expected.gradients[view], allowed, f"gradient of view {view + 1}")


@pytest.mark.parametrize(("world_size", "shares"), FEW, ids=[f"{w}-{shares}" for w, shares in FEW])
def test_equals_the_concatenated_batch(pool, name, world_size, shares, algorithm, dtype):
    """Even, uneven and empty shards, one sample each; DDP's mean needs W times the gradient of one process."""
    counts, d = SHARES[world_size][shares], D[algorithm]
    results = pool.run(_evaluate, world_size, name, counts, dtype, d, algorithm=algorithm)
    _assert_exact(results, _right(name, counts, d, dtype), dtype, world_size)


@pytest.mark.parametrize("kind", ["heavy_tailed", "dead_features", "near_collapsed"])
def test_for_other_kinds_of_embeddings(pool, name, algorithm, dtype, kind):
    counts, d, batch = (2, 9, 4), D[algorithm], {"kind": kind}
    results = pool.run(_evaluate, 3, name, counts, dtype, d, batch, algorithm=algorithm)
    _assert_exact(results, _right(name, counts, d, dtype, **batch), dtype, 3)


@pytest.mark.parametrize("counts", [(2, 9, 4), (6, 0, 5)], ids=["uneven", "empty"])
def test_large_means(pool, name, algorithm, dtype, counts):
    d, batch = D[algorithm], {"mean": 1e4, "std": 1e-2}
    results = pool.run(_evaluate, 3, name, counts, dtype, d, batch, algorithm=algorithm)
    _assert_exact(results, _right(name, counts, d, dtype, **batch), dtype, 3)


@pytest.mark.parametrize("grad_reduction", ["mean", "sum"])
def test_ranks_that_weight_the_loss_differently(pool, name, algorithm, grad_reduction):
    """What is differentiated is Σ_r (r + 1)·L, or with "sum" its mean over the ranks; alike, once and W times L."""
    counts, d = (2, 9, 4), D[algorithm]
    settings = {"algorithm": algorithm, "grad_reduction": grad_reduction}
    expected = _right(name, counts, d, torch.float64)
    for weighted, scale in ((True, {"mean": 6, "sum": 2}), (False, {"mean": 3, "sum": 1})):
        results = pool.run(_evaluate, 3, name, counts, torch.float64, d, weighted=weighted, **settings)
        _assert_exact(results, expected, torch.float64, scale[grad_reduction])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(pool, name, algorithm, dtype):
    counts, d = (2, 9, 4), D[algorithm]
    results = pool.run(_evaluate, 3, name, counts, dtype, d, {"mean": 1.0}, algorithm=algorithm)
    expected = _right(name, counts, d, dtype, mean=1.0)
    assert_near(results[0][0][0], expected.loss, expected.value_budget(2e-6, torch.float32))
    for view in range(NAMES[name]):
        gradient = torch.cat([gradients[view] for _, gradients in results])
        assert gradient.dtype == dtype
        budget = expected.gradient_budget(view, 1e-5 + torch.finfo(dtype).eps / 2, torch.float32)
        assert_near(gradient.double() / 3, expected.gradients[view], budget)


def _in_subgroup(name, counts, d, algorithm):
    """Ranks 0 and 2 of three; and the loss of the rank's own rows alone."""
    group, rank = dist.new_group([0, 2]), dist.get_rank()
    if rank == 1:
        return None
    own = rank // 2
    views = [shard(z, counts, own).requires_grad_() for z in _whole(name, counts, d, torch.float64)]
    module, call = VICRegLoss(algorithm=algorithm, process_group=group), tuple(views)
    if name == "mixed":
        module = MixedBarlowTwinsLoss(algorithm=algorithm, process_group=group)
        call = (*views, _alpha(own), _permutation(len(views[0]), own))
    terms = module(*call, return_terms=True)
    terms.loss.backward()
    alone = _loss(name, [view.detach() for view in views], own, algorithm=algorithm, synchronize=False)
    return [term.detach() for term in terms], [view.grad for view in views], alone


def test_a_subgroup_and_a_rank_alone(pool, name, algorithm):
    counts, d = (3, 10), D[algorithm]
    results = [result for result in pool.run(_in_subgroup, 3, name, counts, d, algorithm) if result]
    _assert_exact([result[:2] for result in results], _right(name, counts, d, torch.float64), torch.float64, 2)
    for rank, (*_, alone) in enumerate(results):
        views = [shard(z, counts, rank) for z in _whole(name, counts, d, torch.float64)]
        assert torch.equal(alone, _loss(name, views, rank, algorithm=algorithm))


def _some_views(name, counts, d, algorithm):
    """Gradients of the last view alone; a loss without any; a second derivative."""
    views = [shard(z, counts) for z in _whole(name, counts, d, torch.float64)]
    without = _loss(name, views, algorithm=algorithm)
    views[-1].requires_grad_()
    loss = _loss(name, views, algorithm=algorithm)
    (gradient,) = torch.autograd.grad(loss, views[-1], retain_graph=True)
    (again,) = torch.autograd.grad(loss, views[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        again.square().sum().backward()
    return [without], [gradient], torch.allclose(gradient, again, rtol=1e-10, atol=1e-14)


def test_one_view_with_a_gradient(pool, name, algorithm):
    counts, d = (3, 10), D[algorithm]
    results = pool.run(_some_views, 2, name, counts, d, algorithm)
    assert all(same for *_, same in results)
    expected = _right(name, counts, d, torch.float64)
    last = Answer(expected.terms, expected.gradients[-1:], expected.value_condition, expected.gradient_conditions[-1:])
    _assert_exact([result[:2] for result in results], last, torch.float64, 2)


def _poisoned(name, counts, d, algorithm):
    views = [shard(z, counts) for z in _whole(name, counts, d, torch.float32)]
    if dist.get_rank() == 1:
        views[-1][2, 3] = torch.nan
    return float(_loss(name, views, algorithm=algorithm))


def test_nan_reaches_every_rank(pool, name, algorithm):
    assert all(loss != loss for loss in pool.run(_poisoned, 3, name, (2, 9, 4), D[algorithm], algorithm))


def _official(counts, d):
    """The official program's loss and gradients, its rules written down again: s of the rank's rows, rows gathered."""
    views = [shard(z, counts).requires_grad_() for z in _whole("vicreg", counts, d, torch.float64)]
    s = (views[0] - views[1]).square().mean()
    gathered = [_gathered(z) for z in views]
    v = c = 0
    for z in gathered:
        x = z - z.mean(0)
        v = v + torch.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() / 2
        cov = x.T @ x / (len(x) - 1)
        c = c + (cov.square().sum() - cov.diagonal().square().sum()) / d
    (25 * s + 25 * v + c).backward()
    return [view.grad for view in views]


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of the own rows is summed over the ranks."""

    @staticmethod
    def forward(ctx, z):
        every = [torch.zeros_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(every, z)
        return torch.stack(every)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def _gathered(z):
    return _Gather.apply(z).flatten(0, 1)


def test_the_official_program_has_the_same_gradients(pool, algorithm):
    """For shards of one size, after DDP's mean; so nothing that was tuned with it changes."""
    counts, d = (7, 7), D[algorithm]
    official = pool.run(_official, 2, counts, d)
    ours = pool.run(_evaluate, 2, "vicreg", counts, torch.float64, d, algorithm=algorithm)
    for theirs, (_, gradients) in zip(official, ours, strict=True):
        torch.testing.assert_close(gradients, theirs, rtol=1e-9, atol=1e-12)


def _norm(counts, algorithm, grad_reduction):
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(sum(counts), d, generator=generator, dtype=torch.float64) for d in (5, 9, 3)]
    own = [shard(t, counts).requires_grad_() for t in whole]
    shards = Shards(Group(dist.get_world_size(), None), counts)
    norm = cross_norm(batch_for("norm", shards, algorithm, grad_reduction, own[0]), *own)
    norm.backward()
    return norm.detach(), [t.grad for t in own], whole


@pytest.mark.parametrize(("grad_reduction", "scale"), [("mean", 3), ("sum", 1)])
def test_the_norm_by_itself(pool, algorithm, grad_reduction, scale):
    """‖XᵀY_1‖² + ‖XᵀY_2‖² of widths that differ, with an empty rank."""
    results = pool.run(_norm, 3, (4, 0, 6), algorithm, grad_reduction)
    x, y1, y2 = leaves = [t.requires_grad_() for t in results[0][2]]
    expected = (x.T @ y1).square().sum() + (x.T @ y2).square().sum()
    gradients = torch.autograd.grad(expected, leaves)
    for norm, _, _ in results:
        torch.testing.assert_close(norm, expected.detach(), rtol=1e-12, atol=0)
    for k in range(3):
        gradient = torch.cat([grads[k] for _, grads, _ in results]) / scale
        torch.testing.assert_close(gradient, gradients[k], rtol=1e-10, atol=1e-10)


def _raised(name, per_rank):
    """What was raised on this rank, and the loss after it: the group still works."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    good = [torch.randn(4, 6, generator=generator) for _ in range(NAMES[name])]
    settings = dict(per_rank.get(rank, {}))
    views = [change(z) for change, z in zip(settings.pop("change", [lambda z: z] * 3), good, strict=False)]
    views = views[: settings.pop("count", 3)]
    permutation = settings.pop("permutation", torch.arange(4))
    try:
        if name == "mixed":
            mixed_barlow_twins_loss(*views, settings.pop("alpha", 0.3), permutation, **settings)
        else:
            vicreg_loss(*views, **settings)
        raised = None
    except Exception as error:
        raised = type(error).__name__, str(error).partition(": ")[2]
    return raised, float(_loss(name, good))


def _narrow(z):
    return z[:, :5]


def _double(z):
    return z.double()


def _same(z):
    return z


def _needing(z):
    return z.clone().requires_grad_()


ONE_WRONG = [
    # which loss, what one of three ranks does differently, the error's type, what its text names
    ("vicreg", {"change": [_narrow, _narrow]}, "ValueError", ["D = 6 on ranks 0, 2", "D = 5 on rank 1"]),
    ("vicreg", {"change": [_double, _double]}, "ValueError", ["torch.float64 on rank 1"]),
    ("vicreg", {"change": [_same, _narrow]}, "ValueError", ["z1 (4, 6) and z2 (4, 5)", "From rank 1 of 3"]),
    ("vicreg", {"change": [_needing, _same]}, "ValueError", ["[True, False] on rank 1"]),
    ("vicreg", {"count": 1}, "ValueError", ["at least two views, got 1", "From rank 1 of 3"]),
    ("vicreg of 3 views", {"count": 2}, "ValueError", ["[False, False] on rank 1"]),
    ("vicreg", {"covariance": 2.0}, "ValueError", ["covariance = 2.0 on rank 1", "covariance = 1.0 on ranks 0, 2"]),
    ("vicreg", {"variance": -1.0}, "ValueError", ["variance", "got -1.0", "From rank 1 of 3"]),
    ("vicreg", {"eps": 1e-3}, "ValueError", ["eps = 0.001 on rank 1"]),
    ("vicreg", {"algorithm": "primal"}, "ValueError", ["algorithm = primal on rank 1"]),
    ("vicreg", {"grad_reduction": "sum"}, "ValueError", ["grad_reduction = sum on rank 1"]),
    ("mixed", {"permutation": torch.arange(3)}, "ValueError", ["permutation of shape (4,)", "From rank 1 of 3"]),
    ("mixed", {"permutation": [0]}, "TypeError", ["permutation", "list", "From rank 1 of 3"]),
    ("mixed", {"alpha": 2.0}, "ValueError", ["alpha in [0, 1]", "From rank 1 of 3"]),
    ("mixed", {"mix_scale": 4.0}, "ValueError", ["mix_scale = 4.0 on rank 1", "mix_scale = 5.0 on ranks 0, 2"]),
    ("mixed", {"lambd": 1.0}, "ValueError", ["lambd = 1.0 on rank 1"]),
    ("mixed", {"change": [_same, _same, _narrow]}, "ValueError", ["z_mixed (4, 5)", "From rank 1 of 3"]),
    ("mixed", {"backend": "triton"}, "ValueError", ["cpu tensors", "From rank 1 of 3"]),
]


@pytest.mark.parametrize(("name", "wrong", "kind", "named"), ONE_WRONG, ids=range(len(ONE_WRONG)))
def test_what_is_wrong_on_one_rank_raises_on_all(pool, name, wrong, kind, named):
    results = pool.run(_raised, 3, name, {1: wrong})
    assert len({raised for raised, _ in results}) == 1
    assert len({loss for _, loss in results}) == 1
    raised = results[0][0]
    assert raised is not None
    assert raised[0] == kind
    for text in named:
        assert text in raised[1]


def _compiled(name, counts, d, algorithm):
    """Forward and backward in one graph; a second, different batch through the same graph."""
    torch.compiler.reset()
    alpha, permutation = _alpha(dist.get_rank()), _permutation(counts[0], dist.get_rank())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_fn(*views):
        if name == "mixed":
            return mixed_barlow_twins_loss(*views, alpha, permutation, algorithm=algorithm)
        return vicreg_loss(*views, algorithm=algorithm)

    results = []
    for mean in (3.0, 1e4):
        views = [shard(z, counts).requires_grad_() for z in _whole(name, counts, d, torch.float64, mean=mean)]
        with torch.compiler.set_stance("fail_on_recompile" if results else "default"):
            loss = loss_fn(*views)
            loss.backward()
        results.append(([loss.detach()], [view.grad for view in views]))
    return results


@pytest.mark.parametrize("of", ["vicreg", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [pytest.param("primal", marks=pytest.mark.slow), "dual"])
def test_compiled(pool, of, algorithm):
    counts, d = (6, 6), D[algorithm]
    slow = {"job_timeout": 240.0, "group_timeout": 120.0, "strict": False, "debug": "INFO"}
    results = pool.run(_compiled, 2, of, counts, d, algorithm, **slow)
    for k, mean in enumerate((3.0, 1e4)):
        expected = _right(of, counts, d, torch.float64, mean=mean)
        _assert_exact([result[k] for result in results], expected, torch.float64, 2)
