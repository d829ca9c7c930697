"""The projector: the official layout, any depth, slices and errors."""

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def exclude_bias_and_norm(p: Tensor) -> bool:
    return p.ndim == 1


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the official program saves, its optimiser's function included, which pickles as one of __main__."""
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    state = official_projector([6, 10, 10, 12]).state_dict()
    model = {"module.backbone.conv1.weight": torch.randn(2, 3, 1, 1), "module.bn.running_mean": torch.zeros(12)}
    group = {"lr": 0.2, "weight_decay_filter": exclude_bias_and_norm, "params": [0]}
    return {
        "epoch": 1000,
        "model": model | {f"module.projector.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"mu": torch.zeros(1)}}, "param_groups": [group]},
    }


@pytest.mark.parametrize("given", ["path", "string", "checkpoint", "model", "unwrapped model", "projector"])
def test_from_checkpoint(given: str, checkpoint: dict[str, Any], tmp_path: Path):
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    model = checkpoint["model"]
    expected = {name[17:]: value for name, value in model.items() if name.startswith("module.projector.")}
    source = {
        "path": tmp_path / "checkpoint.pth",
        "string": str(tmp_path / "checkpoint.pth"),
        "checkpoint": checkpoint,
        "model": model,
        "unwrapped model": {name[7:]: value for name, value in model.items()},
        "projector": expected,
    }[given]
    projector = Projector.from_checkpoint(source)
    found = projector.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    x = torch.randn(16, 6)
    official = official_projector([6, 10, 10, 12])
    official.load_state_dict(expected)
    assert torch.equal(projector(x), official(x))


def test_from_checkpoint_with_another_norm(checkpoint: dict[str, Any]):
    assert isinstance(Projector.from_checkpoint(checkpoint, DistributedBatchNorm)[1], DistributedBatchNorm)


class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_from_checkpoint_runs_nothing_in_the_file(tmp_path: Path):
    torch.save({"model": Hostile(tmp_path / "was run")}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="to hold tensors and plain values alone"):
        Projector.from_checkpoint(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3.weight": None}, r"1 keys are missing, first 3\.weight|keys are unexpected"),
        ({"6.bias": torch.zeros(12)}, r"1 keys are unexpected, first 6\.bias"),
        ({"1.bias": None}, r"1 keys are missing, first 1\.bias"),
        ({"1.running_mean": torch.zeros(11)}, r"1\.running_mean is \(11,\) instead of \(10,\)"),
        ({"3.weight": torch.zeros(10, 9)}, r"3\.weight is \(10, 9\) instead of \(10, 10\)"),
    ],
)
def test_from_checkpoint_of_another_form(change: dict[str, Tensor | None], message: str):
    state = official_projector([6, 10, 10, 12]).state_dict() | change
    with pytest.raises(ValueError, match=message):
        Projector.from_checkpoint({name: value for name, value in state.items() if value is not None})


def test_from_checkpoint_advises_nobody_to_run_what_is_in_a_file(tmp_path: Path):
    (tmp_path / "any.pth").write_text('{"kind": 1}')
    with pytest.raises(ValueError, match="Unsupported operand") as caught:
        Projector.from_checkpoint(tmp_path / "any.pth")
    assert "Re-running" not in str(caught.value)


def test_from_checkpoint_without_a_projector(tmp_path: Path):
    backbone = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"conv1\.weight.*pass checkpoint\.pth"):
        Projector.from_checkpoint(backbone)
    for empty in ({}, {"model": {}}):
        with pytest.raises(ValueError, match=r"expected names such as module\.projector\.0\.weight"):
            Projector.from_checkpoint(empty)
    with pytest.raises(ValueError, match="weights of linear layers"):
        Projector.from_checkpoint({"0.weight": torch.zeros(3)})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TypeError, match="got list"):
        Projector.from_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        Projector.from_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="Is it a checkpoint, and whole"):
        Projector.from_checkpoint(tmp_path / "cut.pth")


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


def test_another_width_is_told_with_both():
    projector = Projector(512, 64, 32)
    for shape in ((4, 100), (4, 512, 7, 7), ()):
        with pytest.raises(ValueError, match=r"shape \(N, 512\), got") as raised:
            projector(torch.randn(shape))
        assert str(shape) in str(raised.value)
    assert projector(torch.randn(4, 512, 7, 7).flatten(2).mean(2)).shape == (4, 32)  # as it advises


def test_it_can_be_traced_scripted_and_changed():
    """What other libraries do with a Sequential."""
    projector, z = Projector(6, 7, 8).eval(), torch.randn(4, 6)
    expected = projector(z)
    assert torch.equal(torch.fx.symbolic_trace(projector)(z), expected)
    assert torch.equal(torch.jit.script(projector)(z), expected)
    torch.testing.assert_close(torch.compile(projector, backend="aot_eager", fullgraph=True)(z), expected)
    projector[0] = torch.nn.Identity()
    with pytest.raises(RuntimeError):
        projector(z)


def test_widths_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert Projector(*numpy.array([8, 6, 4]))[6].out_features == 4


def test_norm_layer_is_checked():
    with pytest.raises(TypeError, match=r"norm_layer.*'batch'.*nn\.BatchNorm1d"):
        Projector(4, norm_layer="batch")
