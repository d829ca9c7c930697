"""DistributedBatchNorm, standardize and the diagnostics over processes: what one process has with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharding import CASES, SHARES, global_batch, shard
from torch import nn
from torch.nn import functional as F

from barlow_loss import DistributedBatchNorm, collapse_report, cross_correlation, standardize
from barlow_loss._collectives import Group
from barlow_loss._statistics import Moments, combine
from comparison import EPS, assert_near, tolerance

C = 6
SHAPES = {"(N, C)": (), "(N, C, L)": (5,), "(N, C, H, W)": (3, 4)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def _input(counts, dtype, shape, mean=3.0, std=0.5):
    """The whole batch, in float64 but representable in ``dtype``; every shard has its own mean and spread."""
    positions = torch.Size(shape).numel()
    rows = global_batch(tuple(n * positions for n in counts), C, dtype, mean=mean, std=std)[0]
    return rows.view(sum(counts), *shape, C).movedim(-1, 1).contiguous().double()


def _layer(dtype, double=False):
    torch.manual_seed(3)
    layer = DistributedBatchNorm(C, momentum=0.3, dtype=dtype)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer.double() if double else layer


def _train(counts, dtype, shape, batch):
    """One step of the layer on this rank's shard: output, gradients, running statistics, and an output in eval()."""
    layer = _layer(dtype)
    z = shard(_input(counts, dtype, shape, **batch), counts).to(dtype).requires_grad_()
    weights = torch.randn(sum(counts), C, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = layer(z)
    (y * shard(weights, counts).to(dtype)).sum().backward()
    grads = [z.grad, layer.weight.grad, layer.bias.grad]
    return y.detach(), grads, {name: b.clone() for name, b in layer.named_buffers()}, layer.eval()(z.detach()).detach()


def _truth(counts, dtype, shape, batch):
    """F.batch_norm in float64 on the whole batch, centred first, so that it is one."""
    layer = _layer(dtype, double=True)
    z = _input(counts, dtype, shape, **batch).requires_grad_()
    weights = torch.randn(sum(counts), C, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dims = [0, *range(2, z.ndim)]
    x = z - z.detach().mean(dims, keepdim=True)
    mean, var = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    y = F.batch_norm(x, mean, var, layer.weight, layer.bias, training=True, momentum=1.0, eps=layer.eps)
    (y * weights).sum().backward()
    running_mean = 0.3 * z.detach().mean(dims)
    running_var = 0.7 + 0.3 * var
    return y.detach(), [z.grad, layer.weight.grad, layer.bias.grad], running_mean, running_var


def _assert_layer_exact(results, counts, dtype, shape, batch, tol):
    y, grads, running_mean, running_var = _truth(counts, dtype, shape, batch)
    assert_near(torch.cat([result[0] for result in results]), y, tol * float(y.norm()), "output")
    z_grad = torch.cat([result[1][0] for result in results])
    assert_near(z_grad, grads[0], 5 * tol * float(grads[0].norm()), "gradient of z")
    for k, name in ((1, "weight"), (2, "bias")):
        # Each rank's part; DDP adds them up. Their terms cancel, so the budget is of the sum of their sizes.
        total = sum(result[1][k].double() for result in results)
        assert_near(total, grads[k], 10 * tol * float(y.norm()) * len(y) ** 0.5, f"gradient of {name}")
    for result in results:
        assert torch.equal(result[2]["running_mean"], results[0][2]["running_mean"])
        assert torch.equal(result[2]["running_var"], results[0][2]["running_var"])
        assert result[2]["num_batches_tracked"] == 1
    assert_near(results[0][2]["running_mean"], running_mean, tol * float(running_mean.norm()), "running mean")
    assert_near(results[0][2]["running_var"], running_var, tol * float(running_var.norm()), "running variance")


@DTYPES
@pytest.mark.parametrize(("world_size", "shares"), CASES, ids=[f"{w}-{name}" for w, name in CASES])
def test_batch_norm_is_that_of_the_whole_batch(pool, world_size, shares, dtype):
    counts, tol = SHARES[world_size][shares], tolerance(dtype, 1e-12, 2e-6)
    if sum(counts) <= 2:  # two values per channel: their spread is all there is, and the gradient is rounding
        tol *= 100
    results = pool.run(_train, world_size, counts, dtype, (), {})
    _assert_layer_exact(results, counts, dtype, (), {}, tol)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_of_feature_maps(pool, shape, dtype):
    counts = (2, 0, 4)
    results = pool.run(_train, 3, counts, dtype, shape, {})
    _assert_layer_exact(results, counts, dtype, shape, {}, tolerance(dtype, 1e-12, 2e-6))


@DTYPES
def test_batch_norm_at_a_large_mean(pool, dtype):
    counts, batch = (2, 9, 4), {"mean": 1e4, "std": 1e-2}
    results = pool.run(_train, 3, counts, dtype, (), batch)
    _assert_layer_exact(results, counts, dtype, (), batch, tolerance(dtype, 1e-10, 1e-5))


def _second_derivative(counts):
    """∂/∂z of |∂L/∂z|², L the sum over the ranks of something not linear, through two backward passes."""
    z = shard(_input(counts, torch.float64, ()), counts).requires_grad_()
    (gradient,) = torch.autograd.grad(standardize(z).sin().sum(), z, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), z)[0]


def test_second_derivatives_cross_the_ranks(pool):
    counts = (2, 9, 4)
    z = _input(counts, torch.float64, ()).requires_grad_()
    (gradient,) = torch.autograd.grad(standardize(z).sin().sum(), z, create_graph=True)
    expected = torch.autograd.grad(gradient.square().sum(), z)[0]
    got = torch.cat(pool.run(_second_derivative, 3, counts))
    assert_near(got, expected, 1e-10 * float(expected.norm()))


def _standardize(counts, dtype, synchronize):
    z = shard(_input(counts, dtype, ()), counts).to(dtype).requires_grad_()
    y = standardize(z, synchronize=synchronize)
    y.sin().sum().backward()
    return y.detach(), z.grad


@DTYPES
@pytest.mark.parametrize(("world_size", "shares"), CASES, ids=[f"{w}-{name}" for w, name in CASES])
def test_standardize_is_that_of_the_whole_batch(pool, world_size, shares, dtype):
    counts = SHARES[world_size][shares]
    results = pool.run(_standardize, world_size, counts, dtype, True)
    z = _input(counts, dtype, ()).requires_grad_()
    y = standardize(z)
    y.sin().sum().backward()
    tol = tolerance(dtype, 1e-12, 2e-6)
    assert_near(torch.cat([result[0] for result in results]), y.detach(), tol * float(y.detach().norm()))
    scale = float(((z.detach().var(0, correction=0) + EPS).rsqrt() * torch.ones_like(z)).norm())
    assert_near(torch.cat([result[1] for result in results]), z.grad, 10 * tol * scale, "gradient")


def test_standardize_of_one_process(pool):
    counts = (3, 10)
    for rank, (y, _) in enumerate(pool.run(_standardize, 2, counts, torch.float64, False)):
        z = shard(_input(counts, torch.float64, ()), counts, rank)
        assert torch.equal(y, standardize(z))


def _evaluation(counts):
    """eval() asks nobody: one rank may do it alone. Without running statistics it uses this process's batch."""
    layer = _layer(torch.float32)
    z = shard(_input(counts, torch.float32, ()), counts).float()
    layer(z)
    untracked = DistributedBatchNorm(C, affine=False, track_running_stats=False).eval()
    if dist.get_rank() == 0:
        assert torch.equal(untracked(z), standardize(z, synchronize=False))
        return layer.eval()(z)
    return None


def test_eval_does_not_communicate(pool):
    pool.run(_evaluation, 2, (3, 10))


def _nothing_anywhere():
    """A batch that is empty on every rank passes and teaches nothing, as with nn.BatchNorm."""
    layer = _layer(torch.float32)
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(0, C, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, C)
    before["num_batches_tracked"] += 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_empty_everywhere(pool):
    pool.run(_nothing_anywhere, 2)


def _moments_of_nothing():
    nothing = Moments(0, *torch.zeros(3, C, dtype=torch.float64))
    return combine(nothing, Group(dist.get_world_size(), None))


def test_moments_of_nothing_are_zero(pool):
    """Where no header tells that every shard is empty: on accelerators and in compiled graphs."""
    for moments in pool.run(_moments_of_nothing, 2):
        assert all((part == 0).all() for part in moments)


def _one_value_in_all():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        _layer(torch.float32)(torch.randn(1 if dist.get_rank() else 0, C))


def test_one_value_in_all_raises_everywhere(pool):
    pool.run(_one_value_in_all, 2)


def _without_header(rows):
    """As on accelerators: a compiled layer does not wait to know how many values there are."""
    torch.compiler.reset()
    layer = DistributedBatchNorm(C)
    z = torch.randn(rows[dist.get_rank()], C, requires_grad=True)
    torch.compile(layer, backend="aot_eager")(z).sum().backward()
    return layer.state_dict(), layer.weight.grad


@pytest.mark.parametrize("rows", [(0, 0), (1, 0)], ids=["none", "one"])
def test_too_few_values_teach_nothing_where_nobody_may_wait(pool, rows):
    expected = DistributedBatchNorm(C).state_dict()
    expected["num_batches_tracked"] += 1
    for state, gradient in pool.run(_without_header, 2, rows, strict=False, debug="INFO", group_timeout=60.0):
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert gradient.isfinite().all()


def _functions_in_a_subgroup(counts):
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    z1, z2 = (shard(z, counts, dist.get_rank() // 2) for z in global_batch(counts, 12, torch.float64))
    settings = {"process_group": group}
    return standardize(z1, **settings), cross_correlation(z1, z2, **settings), collapse_report(z1, z2, **settings)


def test_functions_in_a_subgroup(pool):
    counts = (3, 10)
    results = [result for result in pool.run(_functions_in_a_subgroup, 3, counts) if result]
    z1, z2 = global_batch(counts, 12, torch.float64)
    expected = standardize(z1)
    assert_near(torch.cat([result[0] for result in results]), expected, 1e-12 * float(expected.norm()))
    for _, correlation, report in results:
        torch.testing.assert_close(correlation, cross_correlation(z1, z2), rtol=0, atol=1e-14)
        assert report == collapse_report(z1, z2)


def _converted(counts):
    """A small network after convert(), in a sub-group, against itself in one process: the norm is where they meet."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    model = DistributedBatchNorm.convert(_network(), process_group=group)
    z = shard(_input(counts, torch.float64, (8,)), counts, dist.get_rank() // 2).requires_grad_()
    model(z).square().sum().backward()
    return z.grad, [parameter.grad for parameter in model.parameters()], model.state_dict()


def _network():
    torch.manual_seed(0)
    layers = [nn.Conv1d(C, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*layers).double()


def test_convert_in_a_subgroup(pool):
    counts = (2, 5)
    results = [result for result in pool.run(_converted, 3, counts) if result]
    model = _network()
    z = _input(counts, torch.float64, (8,)).requires_grad_()
    model(z).square().sum().backward()
    assert_near(torch.cat([result[0] for result in results]), z.grad, 1e-9 * float(z.grad.norm()))
    for k, parameter in enumerate(model.parameters()):
        got = sum(result[1][k] for result in results)
        assert_near(got, parameter.grad, 1e-9 * max(1.0, float(parameter.grad.norm())))
    for name, value in model.state_dict().items():
        for result in results:
            torch.testing.assert_close(result[2][name], value, rtol=1e-10, atol=1e-12)


def _diagnostics(counts, dtype):
    z1, z2 = (shard(z, counts) for z in global_batch(counts, 12, dtype))
    local = cross_correlation(z1, z2, synchronize=False) if len(z1) > 1 else None
    alone = collapse_report(z1, z2, synchronize=False) if dist.get_rank() == 0 else None  # the others need not call
    return cross_correlation(z1, z2), collapse_report(z1, z2), local, alone


@DTYPES
@pytest.mark.parametrize(("world_size", "shares"), [(2, "uneven"), (3, "empty"), (4, "even")])
def test_diagnostics_are_about_the_whole_batch(pool, world_size, shares, dtype):
    counts = SHARES[world_size][shares]
    results = pool.run(_diagnostics, world_size, counts, dtype)
    z1, z2 = global_batch(counts, 12, dtype)
    expected = cross_correlation(z1.double(), z2.double())
    report = collapse_report(z1, z2)
    for rank, (correlation, got, local, alone) in enumerate(results):
        assert correlation.dtype == dtype
        assert torch.equal(correlation, results[0][0])
        assert_near(correlation, expected, tolerance(dtype, 1e-12, 2e-6) * float(expected.norm()))
        assert got == report
        own = [shard(z, counts, rank) for z in (z1, z2)]
        assert local is None or torch.equal(local, cross_correlation(*own))
        assert alone is None or alone == collapse_report(*own)
