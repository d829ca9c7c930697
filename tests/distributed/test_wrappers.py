"""Training under DDP and FSDP2: after the wrapper's reduction the parameters' gradients are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharding import global_batch, shard
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from barlow_loss import (
    BarlowTwinsLoss,
    DistributedBatchNorm,
    MixedBarlowTwinsLoss,
    Projector,
    VICRegLoss,
    barlow_twins_loss,
)
from comparison import assert_near

# TORCH_DISTRIBUTED_DEBUG=DETAIL, the pool's default, ends the second DistributedDataParallel of a process with a
# segmentation fault (torch 2.14.1; ten lines of plain torch do), so these jobs run with INFO.
INPUTS, D = 6, 48
COUNTS = {2: (9, 4), 3: (5, 0, 8)}
GRADIENT_TOL = {torch.float64: 1e-10, torch.float32: 2e-5}


class Model(nn.Module):
    """An encoder with batch normalisation, and the projector, with it too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.projector = Projector(16, 32, D, num_layers=2)
        self.recompute = None  # checkpoint's use_reentrant

    def forward(self, x):
        if self.recompute is None:
            return self.projector(self.encoder(x))
        return checkpoint(self._forward, x, use_reentrant=self.recompute)

    def _forward(self, x):
        return self.projector(self.encoder(x))


def build(dtype):
    torch.manual_seed(0)
    return Model().to(dtype)


def images(counts, dtype, seed_shift=0.0):
    x1, x2 = global_batch(counts, INPUTS, torch.float64)
    return (x1 + seed_shift).to(dtype), (x2 - seed_shift * x2.roll(1, 0)).to(dtype)


def gradients(model):
    return {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters()}


def alone(counts, dtype, algorithm="auto", batches=1):
    """One process, the whole batch, without any of torch.distributed; in float64."""
    model = build(torch.float64)
    for batch in range(batches):
        x1, x2 = (x.double() for x in images(counts, dtype, 0.3 * batch))
        barlow_twins_loss(model(x1), model(x2), algorithm=algorithm).backward()
    return gradients(model)


def assert_gradients(got, expected, tol):
    size = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # The bias before a normalisation has gradient 0 but for rounding, so sizes are those of all of them.
        assert_near(got[name], gradient, tol * size, name)


def _ddp(counts, dtype, algorithm, recompute, options):
    model = DistributedBatchNorm.convert(build(dtype))
    model.recompute = recompute
    model = DistributedDataParallel(model, **options)
    for _ in range(2):  # a static graph is learned in the first step
        model.zero_grad()
        views = [model(shard(x, counts).requires_grad_(recompute is True)) for x in images(counts, dtype)]
        BarlowTwinsLoss(algorithm=algorithm)(*views).backward()
    return gradients(model.module)


DDP = {
    "plain": (None, {}),
    "static graph": (None, {"static_graph": True}),
    "bucket views": (None, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    "checkpoint": (False, {"static_graph": True}),
    "reentrant checkpoint": (True, {"static_graph": True}),
}


@pytest.mark.parametrize("world_size", COUNTS)
@pytest.mark.parametrize(("recompute", "options"), DDP.values(), ids=DDP)
def test_ddp(pool, world_size, algorithm, dtype, recompute, options):
    counts = COUNTS[world_size]
    results = pool.run(_ddp, world_size, counts, dtype, algorithm, recompute, options, strict=False, debug="INFO")
    expected = alone(counts, dtype, algorithm)
    for result in results:
        assert_gradients(result, expected, GRADIENT_TOL[dtype])


def _no_sync(counts, dtype):
    """Two batches accumulated, the first without communication of the gradients."""
    model = DistributedDataParallel(DistributedBatchNorm.convert(build(dtype)))
    loss_fn = BarlowTwinsLoss()
    with model.no_sync():
        loss_fn(*(model(shard(x, counts)) for x in images(counts, dtype))).backward()
    loss_fn(*(model(shard(x, counts)) for x in images(counts, dtype, 0.3))).backward()
    return gradients(model.module)


def test_accumulation_under_no_sync(pool, dtype):
    counts = COUNTS[3]
    for result in pool.run(_no_sync, 3, counts, dtype, debug="INFO"):
        assert_gradients(result, alone(counts, dtype, batches=2), GRADIENT_TOL[dtype])


def _summed(counts):
    """A wrapper of one's own that adds the ranks' gradients up."""
    model = DistributedBatchNorm.convert(build(torch.float64))
    BarlowTwinsLoss(grad_reduction="sum")(*(model(shard(x, counts)) for x in images(counts, torch.float64))).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return gradients(model)


def test_a_sum_over_the_ranks(pool):
    counts = COUNTS[3]
    for result in pool.run(_summed, 3, counts, debug="INFO"):
        assert_gradients(result, alone(counts, torch.float64), 1e-10)


def _fsdp(counts, dtype, algorithm, recompute):
    model = DistributedBatchNorm.convert(build(dtype))
    model.recompute = recompute
    for part in (model.encoder, model.projector, model):
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    views = [model(shard(x, counts)) for x in images(counts, dtype)]
    BarlowTwinsLoss(algorithm=algorithm)(*views).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [None, False], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("world_size", COUNTS)
def test_fsdp2(pool, world_size, algorithm, dtype, recompute):
    counts = COUNTS[world_size]
    results = pool.run(_fsdp, world_size, counts, dtype, algorithm, recompute, strict=False, debug="INFO")
    expected = alone(counts, dtype, algorithm)
    for result in results:
        assert_gradients(result, expected, GRADIENT_TOL[dtype])


def _autocast(counts, algorithm):
    """bfloat16 forward; the loss and its gradient are what float32 makes of the bfloat16 embeddings."""
    torch.manual_seed(0)
    model = DistributedDataParallel(DistributedBatchNorm.convert(build(torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        views = [model(shard(x, counts)) for x in images(counts, torch.float32)]
        loss = BarlowTwinsLoss(algorithm=algorithm)(*views)
    for view in views:
        view.retain_grad()
    loss.backward()
    return loss.detach(), [view.detach() for view in views], [view.grad for view in views], gradients(model.module)


@pytest.mark.parametrize("world_size", COUNTS)
def test_bf16_autocast(pool, world_size, algorithm):
    results = pool.run(_autocast, world_size, COUNTS[world_size], algorithm, debug="INFO")
    views = [torch.cat([result[1][view] for result in results]).requires_grad_() for view in (0, 1)]
    assert views[0].dtype == torch.bfloat16
    loss = barlow_twins_loss(*views, algorithm=algorithm)
    loss.backward()
    for result in results:
        assert torch.equal(result[0], results[0][0])
        assert_near(result[0], loss.detach(), 2e-6 * loss.item())
        for name, gradient in result[3].items():
            assert torch.equal(gradient, results[0][3][name])
            assert gradient.isfinite().all()
    for view in (0, 1):
        got = torch.cat([result[2][view] for result in results]).double() / world_size
        assert_near(got, views[view].grad, 2**-7 * float(views[view].grad.double().norm()), f"gradient of z{view + 1}")


def _trained(counts, steps, distributed):
    """Losses and final weights of a short training in float64: SGD with momentum, new images in every step."""
    model = build(torch.float64)
    if distributed:
        model = DistributedDataParallel(DistributedBatchNorm.convert(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9, weight_decay=1e-4)
    loss_fn = BarlowTwinsLoss(synchronize=distributed)
    losses = []
    generator = torch.Generator().manual_seed(1)
    rank = dist.get_rank() if distributed else 0
    for _ in range(steps):
        x = torch.randn(sum(counts), INPUTS, generator=generator, dtype=torch.float64)
        noise = 0.3 * torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)
        views = [model(shard(x + e, counts, rank)) for e in noise]
        loss = loss_fn(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module = model.module if distributed else model
    return losses, copy.deepcopy(module.state_dict())


STEPS = 120


@pytest.mark.parametrize(
    ("world_size", "counts"), [(2, (13, 7)), pytest.param(4, (6, 3, 0, 11), marks=pytest.mark.slow)]
)
def test_p33_training_is_the_same_on_any_number_of_processes(pool, world_size, counts):
    expected, weights = _trained((20,), STEPS, False)
    assert sum(expected[-10:]) < 0.85 * sum(expected[:10])  # it does train
    for losses, state in pool.run(_trained, world_size, counts, STEPS, True, debug="INFO"):
        assert len(losses) == STEPS
        for step, (got, loss) in enumerate(zip(losses, expected, strict=True)):
            assert abs(got - loss) <= 1e-12 * loss, f"step {step}: {got} and {loss}"
        for name, value in weights.items():
            assert_near(state[name], value, 1e-12 * max(1.0, float(value.double().norm())), name)


WITH_GROUP = [
    lambda group: BarlowTwinsLoss(process_group=group),
    lambda group: VICRegLoss(process_group=group),
    lambda group: MixedBarlowTwinsLoss(process_group=group),
    lambda group: DistributedBatchNorm(6, process_group=group),
]


def _copies_of_a_group():
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    inner = dist.new_group([0]), dist.new_group([1])
    for make in WITH_GROUP:
        for own in (group, inner[rank]):
            module = make(own)
            assert copy.deepcopy(module).process_group is own
            model = AveragedModel(nn.Sequential(nn.Linear(6, 6), module))
            assert model.module[1].process_group is own
            assert model.module[1] is not module


def test_a_copy_has_the_same_group(pool):
    """As an average of the weights makes it; torch cannot copy a group (2.14.1)."""
    pool.run(_copies_of_a_group, 2)
