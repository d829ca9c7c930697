"""LARS and the schedule, against the published formulas written down again, step by step."""

import copy
import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from barlow_recipes.optimization import (
    LARS,
    PUBLISHED_LEARNING_RATES,
    build_optimizer,
    build_schedule,
    published_learning_rate,
    require_all,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def test_both_groups_follow_the_published_schedule_at_every_step() -> None:
    """base = batch/256; linear warm-up from 0 over ten epochs; cosine down to a thousandth; times 0.2 and 0.0048."""
    epochs, steps_per_epoch, warmup_epochs, batch_size = 25, 7, 10, 1024
    model = network()
    rates = {"lr_weights": 0.2, "lr_biases": 0.0048, "weight_decay": 1e-6}
    optimizer = build_optimizer("lars", model, batch_size=batch_size, **rates)
    schedule = build_schedule(optimizer, epochs * steps_per_epoch, warmup_epochs * steps_per_epoch)
    for step in range(epochs * steps_per_epoch):
        base, warmup = batch_size / 256, warmup_epochs * steps_per_epoch
        if step < warmup:
            published = base * step / warmup
        else:
            progress = (step - warmup) / (epochs * steps_per_epoch - warmup)
            q = 0.5 * (1 + math.cos(math.pi * progress))
            published = base * q + 0.001 * base * (1 - q)
        weights, biases = (group["lr"] for group in optimizer.param_groups)
        assert weights == pytest.approx(0.2 * published, rel=1e-12)
        assert biases == pytest.approx(0.0048 * published, rel=1e-12)
        optimizer.step()
        schedule.step()


class OfficialLars:
    """The published update, for one parameter, in float64."""

    def __init__(self, parameter: Tensor) -> None:
        self.p = parameter.detach().double().clone()
        self.mu = torch.zeros_like(self.p)

    def step(self, gradient: Tensor, lr: float, weight_decay: float) -> None:
        dp = gradient.double()
        if self.p.ndim > 1:
            dp = dp + weight_decay * self.p
            p_norm, dp_norm = self.p.norm(), dp.norm()
            if p_norm > 0 and dp_norm > 0:
                dp = dp * (0.001 * p_norm / dp_norm)
        self.mu = 0.9 * self.mu + dp
        self.p = self.p - lr * self.mu


def distance_after_50_steps(weight_decay_of_vectors: float) -> float:
    """The largest relative distance of a parameter from the official update, on the same random gradients."""
    model = network().double()
    model[3].weight.data[0] = 0  # type: ignore[index, union-attr]
    official = [OfficialLars(parameter) for parameter in model.parameters()]
    rates = {"lr_weights": 0.4, "lr_biases": 0.0048, "weight_decay": 1e-6}
    optimizer = build_optimizer("lars", model, batch_size=256, **rates)
    optimizer.param_groups[1]["weight_decay"] = weight_decay_of_vectors
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        for parameter, expected in zip(model.parameters(), official, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            expected.step(parameter.grad, 0.4 if parameter.ndim > 1 else 0.0048, 1e-6)
        optimizer.step()
    pairs = zip(model.parameters(), official, strict=True)
    return max(float((p.detach() - expected.p).norm() / expected.p.norm()) for p, expected in pairs)


def test_lars_is_the_official_update() -> None:
    assert distance_after_50_steps(weight_decay_of_vectors=0.0) < 1e-14
    assert distance_after_50_steps(weight_decay_of_vectors=1e-6) > 1e-8  # the comparison sees a wrong grouping


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_a_norm_of_zero_leaves_the_update_alone(zero: str) -> None:
    parameter = nn.Parameter(torch.full((2, 2), 0.0 if zero == "parameter" else 3.0))
    parameter.grad = torch.full((2, 2), 0.0 if zero == "gradient" else 2.0)
    before = parameter.detach().clone()
    LARS([parameter], lr=0.5).step()
    assert torch.equal(parameter, before - 0.5 * parameter.grad)


@pytest.mark.parametrize("lr", [0.1, 0.5, 0.0])
def test_a_clipped_step_is_at_most_a_plain_one(lr: float) -> None:
    """With η‖p‖/‖g‖ = 0.3 the change is lr · min(0.3/lr, 1)."""
    parameter = nn.Parameter(torch.full((2, 2), 3.0))
    parameter.grad = torch.full((2, 2), 1.0)
    LARS([parameter], lr=lr, trust_coefficient=0.1, clip=True).step()
    expected = 3.0 - lr * min(0.3 / lr, 1.0) if lr else 3.0
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), expected))


def test_the_state_of_lars_survives_saving() -> None:
    model, twin = network(), network()
    rates = {"batch_size": 256, "lr_weights": 0.4, "lr_biases": 0.0048, "weight_decay": 1e-6}
    first, second = build_optimizer("lars", model, **rates), build_optimizer("lars", twin, **rates)
    for number in range(4):
        if number == 2:
            twin.load_state_dict(model.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for net, optimizer in [(model, first)] + [(twin, second)] * (number > 1):
            generator = torch.Generator().manual_seed(number)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_vectors_are_one_group_and_everything_else_the_other() -> None:
    model = network()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    rates = {"lr_weights": 0.2, "lr_biases": 0.0048, "weight_decay": 1e-6}
    weights, vectors = build_optimizer("lars", model, batch_size=256, **rates).param_groups
    assert [p.ndim for p in weights["params"]] == [4, 2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert (weights["weight_decay"], vectors["weight_decay"]) == (1e-6, 0.0)


RATES = {"batch_size": 256, "lr_weights": 0.2, "lr_biases": 0.0048, "weight_decay": 1e-6}


def require_a_group_for_each(name: str) -> None:
    """Of timm's model: a matrix or kernel is a weight, and everything else is a bias; none is in both or in neither.

    Of the weights those do not decay of which the model says so.
    """
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    weights, vectors, *others = (group["params"] for group in build_optimizer("lars", model, **RATES).param_groups)
    standing = others[0] if others else []
    assert all(p.ndim > 1 for p in weights + standing), name
    assert all(p.ndim <= 1 for p in vectors), name
    assert {*map(id, weights + vectors + standing)} == {id(p) for p in model.parameters() if p.requires_grad}, name
    assert len(weights) + len(vectors) + len(standing) == len([*model.parameters()]), name
    said = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # and so may a layer, as XCA
    matrices = {key: p for key, p in model.named_parameters() if p.ndim > 1}
    assert {id(p) for key, p in matrices.items() if key in said} <= {*map(id, standing)}, name


@pytest.mark.parametrize("name", ["dm_nfnet_f0", "vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_every_parameter_learns(name: str) -> None:
    """The gains of dm_nfnet are single numbers."""
    require_a_group_for_each(name)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_what_a_model_says_does_not_decay(name: str) -> None:
    """A position's embedding and a class token, wherever the encoder lies in the network."""
    encoder = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, depth=1)
    net = nn.ModuleDict({"backbone": encoder, "projector": nn.Linear(192, 8)})
    groups = build_optimizer(name, net, **RATES).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {key for key, p in net.named_parameters() if p.ndim > 1 and decays[id(p)] == 0}
    assert names == {"backbone.pos_embed", "backbone.cls_token"}
    assert [group["lr"] for group in groups] == [0.2, 0.0048, 0.2]
    encoder.pos_embed.requires_grad_(False)
    encoder.cls_token.requires_grad_(False)
    assert len(build_optimizer(name, net, **RATES).param_groups) == 2


@pytest.mark.slow
def test_every_parameter_of_every_family_learns() -> None:
    """Of each of timm's modules a model for every beginning of a name: 185 of timm 1.0.31, in a quarter of a minute."""
    families = {
        (timm.model_entrypoint(name).__module__, name.partition("_")[0][:6]): name for name in timm.list_models()
    }
    assert len(families) > 100
    for name in families.values():
        require_a_group_for_each(name)


@pytest.mark.parametrize("groups", [1, 3], ids=["forgotten", "twice"])
def test_a_parameter_without_a_group_of_its_own_is_named(groups: int) -> None:
    model = network()
    model[3].weight.requires_grad_(False)  # type: ignore[union-attr]
    first, second = {"params": [*model[0].parameters(), model[1].weight]}, {"params": [model[1].bias, model[3].bias]}
    parts = [first, second, first]
    with pytest.raises(ValueError, match=r"groups: expected each .* of 5 parameters are not, the first is [01]\."):
        require_all(model, parts[:groups])
    require_all(model, parts[:2])


def test_the_learning_rate_is_the_authors_for_the_batch() -> None:
    assert {size: published_learning_rate(size) for size in PUBLISHED_LEARNING_RATES} == PUBLISHED_LEARNING_RATES
    assert published_learning_rate(8) == 0.7
    assert published_learning_rate(10**6) == 0.2
    assert published_learning_rate(362) == pytest.approx(0.35, abs=1e-3)  # half-way from 256 to 512, in the logarithm
    rates = [published_learning_rate(size) for size in range(100, 2100)]
    assert all(later <= rate + 1e-12 for rate, later in pairwise(rates))


def test_a_closure_computes_the_gradients_and_its_loss_is_returned() -> None:
    """As torch.optim's contract says: the same update as without one."""
    models = [network(), network()]
    optimizers = [LARS(model.parameters(), lr=0.1) for model in models]
    images = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def loss_of(model: nn.Module) -> Tensor:
        model.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return loss

    expected = loss_of(models[0])
    assert optimizers[0].step() is None
    assert optimizers[1].step(lambda: loss_of(models[1])) == expected
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
