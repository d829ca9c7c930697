"""torch.compile of the loss and of a training step on several processes: the collectives inside the graph."""

import pytest
import torch
import torch.distributed as dist
from sharding import global_batch, shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm, barlow_twins_loss
from comparison import assert_near, tolerance, truth
from inductor import needs_compiler

INDUCTOR = [pytest.mark.slow, needs_compiler]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=INDUCTOR)]
BOTH = [pytest.param("primal", marks=pytest.mark.slow), "dual"]  # compiling takes seconds
D = {"primal": 9, "dual": 40}
SLOW = {"job_timeout": 240.0, "group_timeout": 120.0, "strict": False, "debug": "INFO"}  # one rank compiles longer


def _loss(counts, dtype, algorithm, backend, subgroup):
    """Forward and backward in one graph each; with a second, different batch through the same graphs."""
    torch.compiler.reset()
    group = dist.new_group(list(range(dist.get_world_size()))) if subgroup else None

    @torch.compile(fullgraph=True, backend=backend)
    def loss_fn(z1, z2):
        return tuple(barlow_twins_loss(z1, z2, return_terms=True, algorithm=algorithm, process_group=group))

    results = []
    for mean in (3.0, 1e4):
        views = [shard(z, counts).requires_grad_() for z in global_batch(counts, D[algorithm], dtype, mean=mean)]
        with torch.compiler.set_stance("fail_on_recompile" if results else "default"):
            terms = loss_fn(*views)
            terms[0].backward()
        results.append((*(term.detach() for term in terms), [view.grad for view in views]))
    return results


@pytest.mark.parametrize(
    ("backend", "subgroup"),
    [
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=INDUCTOR),
    ],
)
def test_the_compiled_loss_is_that_of_the_concatenated_batch(pool, algorithm, dtype, backend, subgroup):
    counts = (6, 6)
    results = pool.run(_loss, 2, counts, dtype, algorithm, backend, subgroup, **SLOW)
    value_tol, gradient_tol = tolerance(dtype, 1e-12, 2e-6), tolerance(dtype, 1e-10, 1e-5)
    for k, mean in enumerate((3.0, 1e4)):
        expected = truth(*global_batch(counts, D[algorithm], dtype, mean=mean))
        for result in results:
            assert torch.equal(result[k][0], results[0][k][0])
            assert_near(result[k][0], expected.loss, expected.value_budget(value_tol, dtype))
        for view in (0, 1):
            gradient = torch.cat([result[k][3][view] for result in results]) / 2
            budget = expected.gradient_budget(view, gradient_tol, dtype)
            assert_near(gradient, expected.gradients[view], budget, f"gradient of z{view + 1}")


def _sizes(algorithm, dynamic):
    """Batches of several sizes through one graph, or two where the first is compiled for its own size."""
    torch.compiler.reset()
    loss_fn = torch.compile(BarlowTwinsLoss(algorithm=algorithm), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    distances = []
    for k, n in enumerate((6, 8, 9, 11)):
        views = [shard(z, (n, n)).requires_grad_() for z in global_batch((n, n), 64, torch.float64)]
        with torch.compiler.set_stance("fail_on_recompile" if k > (dynamic is None) else "default"):
            loss = loss_fn(*views)
            loss.backward()
        distances.append(
            float((loss.detach() - barlow_twins_loss(*[v.detach() for v in views], algorithm=algorithm)).abs())
        )
    return max(distances)


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("algorithm", BOTH)
def test_other_batch_sizes_do_not_recompile(pool, algorithm, dynamic):
    assert max(pool.run(_sizes, 2, algorithm, dynamic, **SLOW)) < 1e-10


def _uneven(algorithm, sizes, backend):
    torch.compiler.reset()
    loss_fn = torch.compile(BarlowTwinsLoss(algorithm=algorithm), fullgraph=True, backend=backend)
    n = sizes[dist.get_rank()]
    try:
        loss_fn(torch.randn(n, D[algorithm]), torch.randn(n, D[algorithm]))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [
        ((3, 6, 9), "aot_eager"),  # the middle one has the mean of all
        pytest.param((6, 0, 6), "aot_eager", marks=pytest.mark.slow),
        pytest.param((3, 6, 9), "inductor", marks=INDUCTOR),  # the assertion survives the lowering
    ],
)
@pytest.mark.parametrize("algorithm", BOTH)
def test_uneven_shards_raise_on_every_rank(pool, algorithm, sizes, backend):
    for message in pool.run(_uneven, 3, algorithm, sizes, backend, **SLOW):
        assert message is not None
        assert "expected as many rows on every rank under torch.compile" in message
        assert "drop_last=True" in message


def _step(compiled):
    """A network with synchronised normalisation under DDP, the loss with it in the compiled region."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 40)]
    model = DistributedDataParallel(DistributedBatchNorm.convert(nn.Sequential(*layers)))
    loss_fn = BarlowTwinsLoss()

    def step(x1, x2):
        return loss_fn(model(x1), model(x2))

    run = torch.compile(step, backend=compiled) if compiled else step
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for k in range(3):
        x1, x2 = (shard(x, (5, 5)) for x in global_batch((5, 5), 6, torch.float32, mean=k))
        loss = run(x1, x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    buffers = {name: value.clone() for name, value in model.module.named_buffers()}
    return losses, {name: p.grad.clone() for name, p in model.module.named_parameters()}, buffers


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step_under_ddp(pool, backend):
    expected = pool.run(_step, 2, None, debug="INFO")
    for (losses, gradients, buffers), (e_losses, e_gradients, e_buffers) in zip(
        pool.run(_step, 2, backend, **SLOW), expected, strict=True
    ):
        assert losses == pytest.approx(e_losses, rel=1e-5)
        size = max(float(gradient.norm()) for gradient in e_gradients.values())
        for name, gradient in e_gradients.items():
            assert_near(gradients[name], gradient, 1e-4 * size, name)
        for name, value in e_buffers.items():
            torch.testing.assert_close(buffers[name], value, rtol=1e-5, atol=1e-6)
