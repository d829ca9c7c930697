"""The projector: the official layout, any depth, slices and errors."""

import copy
import itertools

import pytest
import torch
from torch import nn

from barlow_loss.normalization import DistributedBatchNorm
from barlow_loss.projector import Projector


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def official_projector(sizes: list[int]) -> nn.Sequential:
    """The construction of the paper's own program: Linear, BatchNorm1d, ReLU per hidden layer, then a Linear."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))


def test_official_checkpoint_loads_strictly_and_computes_the_same():
    official = official_projector([6, 10, 10, 12])
    for _ in range(3):  # running statistics that differ from their start
        official(torch.randn(16, 6))
    projector = Projector(6, hidden_features=10, out_features=12)
    assert list(projector.state_dict()) == [
        "0.weight",
        *(f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "3.weight",
        *(f"4.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "6.weight",
    ]
    assert str(list(projector)) == str(list(official))
    projector.load_state_dict(official.state_dict(), strict=True)
    x = torch.randn(16, 6)
    for training in (True, False):
        assert torch.equal(projector.train(training)(x), official.train(training)(x))


def test_default_widths_are_the_papers():
    with torch.device("meta"):
        projector = Projector(2048)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert all(linear.bias is None for linear in linears)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
def test_depth(num_layers: int):
    projector = Projector(7, hidden_features=9, out_features=11, num_layers=num_layers)
    assert sum(isinstance(layer, nn.Linear) for layer in projector) == num_layers
    assert len(projector) == 3 * (num_layers - 1) + 1
    assert projector(torch.randn(4, 7)).shape == (4, 11)


@pytest.mark.parametrize("norm_layer", [DistributedBatchNorm, nn.LayerNorm, lambda width: nn.BatchNorm1d(width, eps=1)])
def test_norm_layer(norm_layer):
    projector = Projector(7, hidden_features=9, out_features=11, norm_layer=norm_layer)
    assert type(projector[1]) is type(norm_layer(9))
    projector(torch.randn(4, 7)).sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


def test_slices_are_sequential_and_share_the_layers():
    projector = Projector(7, hidden_features=9, out_features=11)
    hidden = projector[:-1]
    assert type(hidden) is nn.Sequential
    assert [hidden[k] is projector[k] for k in range(len(hidden))] == [True] * 6
    assert next(iter(projector[3:].state_dict())) == "3.weight"  # names survive, as in nn.Sequential
    assert projector[-1] is projector[6]


def test_copies():
    projector = Projector(7, hidden_features=9, out_features=11)
    clone = copy.deepcopy(projector)
    assert isinstance(clone, Projector)
    x = torch.randn(4, 7)
    assert torch.equal(clone(x), projector(x))


@pytest.mark.parametrize("name", ["in_features", "hidden_features", "out_features", "num_layers"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_sizes_are_checked(name: str, value, error):
    with pytest.raises(error, match=f"{name}.*got {value}"):
        Projector(**{"in_features": 4, name: value})


def test_norm_layer_is_checked():
    with pytest.raises(TypeError, match=r"norm_layer.*'batch'.*nn\.BatchNorm1d"):
        Projector(4, norm_layer="batch")
