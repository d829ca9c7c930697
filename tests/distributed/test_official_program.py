"""The preset that reproduces the official program's updates, against that program's own rules on two processes."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm

pytest.importorskip("tyro", reason="pip install --group examples")

from barlow_recipes import settings as presets
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.models import BarlowTwins
from barlow_recipes.official import read_official, resume_official
from barlow_recipes.optimization import build_optimizer, build_schedule
from barlow_recipes.settings import official

WORLD_SIZE, BATCH_SIZE, STEPS, WARMUP_STEPS = 2, 32, 12, 4
# Large enough to see: with the published weight decay of 1e-6 the comparison could not tell W from 1.
WEIGHT_DECAY = 0.05


def network() -> BarlowTwins:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    return BarlowTwins(backbone, nn.Sequential(nn.Linear(16, 12, bias=False))).double()


def views(step: int) -> Tensor:
    return torch.randn(2, BATCH_SIZE, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


class Outcome(NamedTuple):
    parameters: dict[str, Tensor]
    checkpoint: dict[str, Any]  # of the official layout, after the first of two epochs


def official_steps() -> Outcome:
    """A rank of the official program, its rules written down again.

    Global batch statistics; C summed in place, outside the graph; the mean of the ranks' gradients; its LARS and its
    learning rates.
    """
    rank, n = dist.get_rank(), BATCH_SIZE // WORLD_SIZE
    model, bn = network(), nn.BatchNorm1d(12, affine=False).double()
    momenta = {p: torch.zeros_like(p) for p in model.parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.bn = model, bn

        def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
            c = self.bn(self.model(view1)).T @ self.bn(self.model(view2))
            c = c / BATCH_SIZE
            total = c.detach().clone()
            dist.all_reduce(total)
            c = c + (total - c.detach())  # the value of the sum, the gradient of this rank's part
            off_diagonal = c - torch.diag(c.diagonal())
            return (c.diagonal() - 1).pow(2).sum() + 0.0051 * off_diagonal.pow(2).sum()

    loss = DistributedDataParallel(DistributedBatchNorm.convert(Loss()))
    loss.broadcast_buffers = False
    for step in range(STEPS):
        if step == STEPS // 2:
            checkpoint = copy.deepcopy(official_checkpoint(model, momenta))
        own = views(step)[:, rank * n : (rank + 1) * n]
        loss.zero_grad()
        loss(own[0], own[1]).backward()
        base = BATCH_SIZE / 256
        if step < WARMUP_STEPS:
            rate = base * step / WARMUP_STEPS
        else:
            q = 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))
            rate = base * q + base * 0.001 * (1 - q)
        with torch.no_grad():
            for p, momentum in momenta.items():
                dp = p.grad
                if p.ndim > 1:
                    dp = dp + WEIGHT_DECAY * p
                    dp = dp * (0.001 * p.norm() / dp.norm())
                momentum.mul_(0.9).add_(dp)
                p.sub_(rate * (0.2 if p.ndim > 1 else 0.0048) * momentum)
    return Outcome({name: p.detach() for name, p in model.named_parameters()}, checkpoint)


def official_checkpoint(model: nn.Module, momenta: dict[nn.Parameter, Tensor]) -> dict[str, Any]:
    matrices, vectors = ([mu for p, mu in momenta.items() if (p.ndim == 1) == vector] for vector in (False, True))
    return {
        "epoch": 1,
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": {"state": {number: {"mu": mu} for number, mu in enumerate([*matrices, *vectors])}},
    }


def our_steps(settings: dict[str, float], checkpoint: Path | None = None) -> dict[str, Tensor]:
    """One process, exact gradients, the example's own optimiser and schedule; from the beginning, or a checkpoint."""
    model = network()
    optimizer = build_optimizer(
        "lars",
        model,
        batch_size=BATCH_SIZE,
        lr_weights=0.2,
        lr_biases=settings["learning_rate_biases"],
        weight_decay=settings["weight_decay"],
    )
    schedule = build_schedule(optimizer, STEPS, WARMUP_STEPS)
    loss_fn = BarlowTwinsLoss(0.0051)
    state = TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    if checkpoint:
        theirs = read_official(checkpoint)
        assert theirs is not None
        assert "after its epoch 1" in resume_official(theirs, state, settings["learning_rate_biases"], STEPS // 2)
        assert state.step == STEPS // 2
    for step in range(state.step, STEPS):
        view1, view2 = views(step)
        optimizer.zero_grad()
        loss_fn(model(view1), model(view2)).backward()
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture
def heavy_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "WEIGHT_DECAY", WEIGHT_DECAY)


@pytest.mark.usefixtures("heavy_decay")
def test_the_official_updates_come_out_of_exact_gradients(pool: Pool) -> None:
    (expected, _), (other_rank, _) = pool.run(official_steps, WORLD_SIZE, debug="OFF")
    found = our_steps(official(WORLD_SIZE))
    initial = dict(network().named_parameters())
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(expected[name], other_rank[name])
        assert (parameter - initial[name]).abs().max() > 1e-6, f"{name} has not moved"


@pytest.mark.usefixtures("heavy_decay")
@pytest.mark.parametrize(
    ("setting", "seen_in"), [("learning_rate_biases", "backbone.1.bias"), ("weight_decay", "backbone.0.weight")]
)
def test_both_corrections_are_needed(setting: str, seen_in: str, pool: Pool) -> None:
    expected = pool.run(official_steps, WORLD_SIZE, debug="OFF")[0].parameters
    found = our_steps(official(WORLD_SIZE) | {setting: getattr(presets, setting.upper())})
    assert not torch.allclose(found[seen_in], expected[seen_in], rtol=1e-7)


@pytest.mark.usefixtures("heavy_decay")
def test_an_official_run_is_continued_as_if_it_had_not_stopped(pool: Pool, tmp_path: Path) -> None:
    expected, checkpoint = pool.run(official_steps, WORLD_SIZE, debug="OFF")[0]
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    found = our_steps(official(WORLD_SIZE), tmp_path / "checkpoint.pth")
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-10, atol=1e-12)
    without_momenta = checkpoint | {"optimizer": {"state": {
        number: {"mu": torch.zeros_like(state["mu"])} for number, state in checkpoint["optimizer"]["state"].items()
    }}}  # fmt: skip
    torch.save(without_momenta, tmp_path / "checkpoint.pth")
    found = our_steps(official(WORLD_SIZE), tmp_path / "checkpoint.pth")
    assert all((found[name] - expected[name]).abs().max() > 1e-7 for name in found)
