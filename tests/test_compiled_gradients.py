"""torch.compile changes no gradient of anything public: torch 2.11 makes that of some autograd Functions 0."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import barlow_loss
from barlow_loss import (
    BarlowTwinsLoss,
    DistributedBatchNorm,
    MixedBarlowTwinsLoss,
    Projector,
    VICRegLoss,
    barlow_twins_loss,
    mixed_barlow_twins_loss,
    standardize,
    vicreg_loss,
)
from strategies import Batch

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ORDER = torch.tensor([3, 0, 2, 1, 5, 4, 7, 6, 9, 8, 11, 10])
PAIR_WEIGHTS = [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
CALLS: dict[str, Callable[..., Tensor]] = {
    "two views": lambda a, b, c: barlow_twins_loss(a, b),
    "three views": barlow_twins_loss,
    "weights of pairs": lambda a, b, c: barlow_twins_loss(a, b, c, pair_weights=PAIR_WEIGHTS),
    "a target": lambda a, b, c: barlow_twins_loss(a, b, off_diagonal_target=-1.0),
    "deviation with N - 1": lambda a, b, c: barlow_twins_loss(a, b, correction=1),
    "first term": lambda a, b, c: barlow_twins_loss(a, b, return_terms=True)[1],
    "second term": lambda a, b, c: barlow_twins_loss(a, b, return_terms=True)[2],
    "a module": BarlowTwinsLoss(lambd=0.01),
    "VICReg": lambda a, b, c: vicreg_loss(a, b),
    "VICReg of three": vicreg_loss,
    "a module of VICReg": VICRegLoss(),
    "mixed": lambda a, b, c: mixed_barlow_twins_loss(a, b, c, 0.3, ORDER),
    "a module of mixed": lambda a, b, c: MixedBarlowTwinsLoss()(a, b, c, torch.tensor(0.3), ORDER),
    "standardized": lambda a, b, c: (standardize(a) * c).tanh(),
    "an exponential": lambda a, b, c: (standardize(a) * b).exp(),
}
DTYPES = (
    torch.float32,
    pytest.param(torch.float64, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, marks=pytest.mark.slow),
)


def views(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return Batch(12, 30, 1, "trained").more_views(3, dtype)


def gradients(function: Callable[..., Tensor], given: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of the inputs, which are no leaves, as embeddings are none, and of the parameters; 0 of what is not used."""
    leaves = [view.clone().requires_grad_() for view in given]
    value = function(*(1.5 * leaf for leaf in leaves)).double().sum()
    asked = [*leaves, *parameters]
    return list(torch.autograd.grad(value, asked, allow_unused=True, materialize_grads=True))


def require_the_same(
    function: Callable[..., Tensor], given: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> None:
    """In one graph, with operations before and behind the function."""
    expected = gradients(function, given, parameters)
    assert any(gradient.any() for gradient in expected)
    around = torch.compile(lambda *views: 2 * function(*(v * 1.0 for v in views)), backend="aot_eager", fullgraph=True)
    for got, right in zip(gradients(around, given, parameters), expected, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(right.dtype, 2e-2)
        distance = (got.double() - 2 * right.double()).norm()
        assert distance <= 2 * tolerance * right.double().norm(), (got, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_of_losses(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    require_the_same(call, views(dtype))


ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "the loss": lambda a, b, c, algorithm: barlow_twins_loss(a, b, lambd=torch.tensor(0.02), algorithm=algorithm),
    "VICReg": lambda a, b, c, algorithm: vicreg_loss(a, b, algorithm=algorithm),
    "mixed": lambda a, b, c, algorithm: mixed_barlow_twins_loss(a, b, c, 0.3, ORDER, algorithm=algorithm),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["primal", "dual"])
@pytest.mark.parametrize("call", ALGORITHMS.values(), ids=ALGORITHMS)
def test_of_either_algorithm(call: Callable[..., Tensor], algorithm: str, dtype: torch.dtype) -> None:
    require_the_same(lambda a, b, c: call(a, b, c, algorithm), views(dtype))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: DistributedBatchNorm(30),
    "without bias": lambda: DistributedBatchNorm(30, bias=False),
    "without weights": lambda: DistributedBatchNorm(30, affine=False),
    "in evaluation": lambda: DistributedBatchNorm(30).eval(),
    "projector": lambda: Projector(30, hidden_features=16, out_features=24),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_of_layers(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Of their inputs and of their parameters."""
    torch.manual_seed(0)
    layer = build().to(dtype)
    require_the_same(lambda a, b, c: layer(a).tanh() * layer(b), views(dtype), [*layer.parameters()])


def test_nothing_public_is_left_out() -> None:
    """Of what has a gradient."""
    without = {name for name in barlow_loss.__all__ if name.endswith(("Terms", "Report", "Reports", "Gate", "Monitor"))}
    without |= {"TrainingCollapsed", "collapse_report", "cross_correlation"}
    tested = {
        *(BarlowTwinsLoss, DistributedBatchNorm, MixedBarlowTwinsLoss, Projector, VICRegLoss),
        *(barlow_twins_loss, mixed_barlow_twins_loss, standardize, vicreg_loss),
    }
    assert {function.__name__ for function in tested} == {*barlow_loss.__all__} - without
