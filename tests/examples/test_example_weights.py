"""Encoders out of files of every layout, and what is said of a file that does not fit."""

import argparse
import collections
import enum
import functools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from official_files import official_model, write_official
from outcomes import SHORT_DIGITS
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from barlow_recipes import checkpoint
from barlow_recipes import weights as weights_module
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import UsageError
from barlow_recipes.models import build_model
from barlow_recipes.weights import find, load_encoder, read_weights

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    model = official_model()
    return model, *write_official(tmp_path_factory.mktemp("official"), model)


@pytest.mark.parametrize("which", [1, 2])
def test_the_official_files(which: int, official: tuple[nn.Module, Path, Path], images: Tensor) -> None:
    encoder = load_encoder(official[which])
    assert (encoder.arch, encoder.stem, encoder.features) == ("resnet18", "imagenet", 512)
    assert torch.equal(features_of(encoder.module, images), features_of(official[0].backbone, images))


def test_the_official_files_of_a_resnet50(tmp_path: Path, images: Tensor) -> None:
    model = official_model("resnet50", "16-16")
    for path in write_official(tmp_path, model, newer=True):
        encoder = load_encoder(path)
        assert (encoder.arch, encoder.features) == ("resnet50", 2048)
        assert torch.equal(features_of(encoder.module, images), features_of(model.backbone, images))


@pytest.fixture(scope="module")
def run_of_the_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from imagenet_pretrain import main

    folder = tmp_path_factory.mktemp("runs") / "out"
    assert main([*map(str, SHORT_DIGITS), "--limit-steps", "12", "--save-every", "5", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("given", ["", "checkpoint.pt", "backbone.pt"])
def test_a_run_of_the_program(given: str, run_of_the_program: Path) -> None:
    encoder = load_encoder(run_of_the_program / given)
    assert (encoder.arch, encoder.features) == ("digits-cnn", 96)
    saved = torch.load(run_of_the_program / "backbone.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in encoder.module.state_dict().items())


def test_a_run_that_has_lost_its_newest_checkpoint(run_of_the_program: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.previous.pt").write_bytes((run_of_the_program / "checkpoint.previous.pt").read_bytes())
    assert load_encoder(tmp_path).arch == "digits-cnn"


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_safetensors(stem: str, tmp_path: Path, images: Tensor) -> None:
    model = build_encoder("resnet18", stem).module
    for metadata in (None, {"arch": "resnet18", "stem": stem}):
        save_file(model.state_dict(), tmp_path / "backbone.safetensors", metadata)
        encoder = load_encoder(tmp_path / "backbone.safetensors")
        assert (encoder.arch, encoder.stem) == ("resnet18", stem)
        assert torch.equal(features_of(encoder.module, images), features_of(model, images))


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": state}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_state_dict_with_a_classifier(wrap: Callable, prefix: str, tmp_path: Path, images: Tensor) -> None:
    model = models.resnet18()
    path = tmp_path / "any.pth"
    torch.save(wrap({f"{prefix}{name}": value for name, value in model.state_dict().items()}), path)
    encoder = load_encoder(path)
    model.fc = nn.Identity()
    assert torch.equal(features_of(encoder.module, images), features_of(model, images))


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "convnext_tiny", "swin_t", "efficientnet_b0"])
def test_any_classifier_of_torchvision(arch: str, tmp_path: Path, images: Tensor) -> None:
    model = models.get_model(arch)
    torch.save(model.state_dict(), tmp_path / "any.pth")
    encoder = load_encoder(tmp_path / "any.pth", arch)
    features = features_of(encoder.module, images)
    assert features.shape == (2, encoder.features)
    *_, last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert torch.equal(features_of(last, features), features_of(model, images))


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "regnetx_002"])
def test_any_classifier_of_timm(arch: str, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 224, 224)
    model = timm.create_model(arch)
    torch.save(model.state_dict(), tmp_path / "any.pth")
    encoder = load_encoder(tmp_path / "any.pth", f"timm/{arch}")
    model.reset_classifier(0)
    assert torch.equal(features_of(encoder.module, images), features_of(model, images))


def test_a_resnet_of_timm_is_recognized(tmp_path: Path, images: Tensor) -> None:
    model = timm.create_model("resnet50")
    torch.save(model.state_dict(), tmp_path / "any.pth")
    encoder = load_encoder(tmp_path / "any.pth")
    assert encoder.arch == "resnet50"
    model.reset_classifier(0)
    assert torch.equal(features_of(encoder.module, images), features_of(model, images))


@pytest.mark.parametrize("arch", ["small-cnn", "resnet34", "resnext50_32x4d"])
def test_a_bare_encoder_is_recognized(arch: str, tmp_path: Path) -> None:
    torch.save(build_encoder(arch).module.state_dict(), tmp_path / "any.pth")
    assert load_encoder(tmp_path / "any.pth").arch == arch


def test_a_file_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "any.pth"
    torch.save(build_encoder("resnet18").module.state_dict(), path)
    with pytest.raises(UsageError) as failure:
        load_encoder(path, "resnet50")
    assert str(failure.value) == (
        f"weights {path}: expected those of resnet50 with the imagenet stem, but 165 names are missing and 0 "
        "unexpected: the first missing is layer1.0.conv3.weight; they fit --arch resnet18 --stem imagenet"
    )
    with pytest.raises(UsageError, match=r"conv1\.weight is \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        load_encoder(path, "resnet18", "cifar")


def test_an_unknown_architecture_has_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "any.pth"
    torch.save(models.vit_b_16().state_dict(), path)
    with pytest.raises(
        UsageError, match=r"--arch.* first missing is conv1\.weight, the first unexpected is class_token"
    ):
        load_encoder(path)


def behind(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def sequential(resnet: nn.Module) -> nn.Module:
    """As in lightly's tutorials."""
    return nn.Sequential(*list(resnet.children())[:-1])


def without_pooling(resnet: nn.Module) -> nn.Module:
    return nn.Sequential(*(child for child in resnet.children() if not isinstance(child, (nn.Linear, nn.MaxPool2d))))


Layout = Callable[[nn.Module, nn.Module], dict]
LAYOUTS: dict[str, tuple[Layout, str]] = {
    "solo-learn": (
        lambda first, second: {
            "state_dict": behind("momentum_backbone.", second)
            | behind("backbone.", first)
            | behind("projector.", nn.Linear(2, 3)),
            "pytorch-lightning_version": "1.6",
        },
        "120 tensors of state_dict.backbone.*; rather than state_dict.momentum_backbone.*; left fc, projector",
    ),
    "lightly": (
        lambda first, _: behind("backbone.", sequential(first)) | behind("projection_head.layers.", nn.Linear(2, 3)),
        "120 tensors of backbone.* in order; left projection_head",
    ),
    "lightly, in Lightning": (
        lambda first, second: {
            "state_dict": behind("backbone_momentum.", sequential(second)) | behind("backbone.", sequential(first)),
            "loops": {},
        },
        "of state_dict.backbone.* in order; rather than state_dict.backbone_momentum.*",
    ),
    "SimCLR": (lambda first, _: behind("f.", without_pooling(first)), "120 tensors of f.* in order"),
    "VISSL": (
        lambda first, _: {
            "phase": 3,
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": behind("_feature_blocks.", first), "heads": behind("0.clf.", nn.Linear(2, 3))}
                }
            },
        },
        "of classy_state_dict.base_model.model.trunk._feature_blocks.*; left classy_state_dict, fc",
    ),
    "VISSL, model_state_dict": (
        lambda first, _: {"model_state_dict": behind("_feature_blocks.", first)},
        "of model_state_dict._feature_blocks.*",
    ),
    "mmselfsup": (
        lambda first, second: {
            "meta": {"epoch": 3},
            "state_dict": behind("backbone.", first) | behind("neck.fc0.", nn.Linear(2, 3)),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        },
        "of state_dict.backbone.*; left fc, neck, optimizer",
    ),
    "MoCo": (
        lambda first, second: {
            "arch": "resnet18",
            "state_dict": behind("module.encoder_k.", second)
            | behind("module.encoder_q.", first)
            | {"module.encoder_q.fc.0.weight": torch.ones(2, 2), "module.queue": torch.ones(2)},
        },
        "of state_dict.module.encoder_q.*; rather than state_dict.module.encoder_k.*; left fc, queue",
    ),
    "DINO": (
        lambda first, second: {
            "student": behind("module.backbone.", second) | behind("module.head.mlp.0.", nn.Linear(2, 3)),
            "teacher": behind("backbone.", first) | behind("head.mlp.0.", nn.Linear(2, 3)),
            "epoch": 3,
        },
        "of teacher.backbone.*; rather than student.module.backbone.*; left fc, head, student",
    ),
    "BYOL": (
        lambda first, second: behind("target_encoder.net.", second) | behind("online_encoder.net.", first),
        "of online_encoder.net.*; rather than target_encoder.net.*",
    ),
    "encoder": (lambda first, _: behind("encoder.", first), "of encoder.*; left fc"),
    "model": (lambda first, _: {"model": behind("model.", first)}, "of model.model.*; left fc"),
    "an average beside it": (
        lambda first, second: {"model_ema": second.state_dict(), "model": first.state_dict()},
        "of model.*; rather than model_ema.*",
    ),
    "compiled": (lambda first, _: behind("module.backbone._orig_mod.", first), "of module.backbone.*; left fc"),
    "wrapped inside": (lambda first, _: behind("backbone.module.", first), "of backbone.module.*; left fc"),
    "of before torch 0.4": (
        lambda first, _: {name: value for name, value in first.state_dict().items() if "num_batches" not in name},
        "100 tensors; left fc; missing 20 num_batches_tracked",
    ),
}


@pytest.mark.parametrize("named", [None, "resnet18"])
@pytest.mark.parametrize(("layout", "said"), LAYOUTS.values(), ids=LAYOUTS)
def test_files_of_other_programs(layout: Layout, said: str, named: str | None, tmp_path: Path, images: Tensor) -> None:
    first, second = models.resnet18(), models.resnet18()
    for module in (first, second):
        module.bn1.running_mean.uniform_()
    torch.save(layout(first, second), tmp_path / "any.ckpt")
    encoder = load_encoder(tmp_path / "any.ckpt", named)
    first.fc = nn.Identity()
    assert torch.equal(features_of(encoder.module, images), features_of(first, images))
    assert said in encoder.source


def test_longer_encoders_of_numbered_layers_are_not_taken_for_shorter_ones(tmp_path: Path) -> None:
    longer = build_encoder("small-cnn").module
    torch.save((longer + nn.Sequential(nn.Linear(128, 128))).state_dict(), tmp_path / "any.pth")
    with pytest.raises(UsageError, match=r"the first unexpected is 15\.weight"):
        load_encoder(tmp_path / "any.pth", "small-cnn")


def test_an_unused_part_of_a_file_costs_no_search(tmp_path: Path) -> None:
    """Of a named architecture that is no ResNet only its own names are compared."""
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "any.pth")
    weights_module._without_memory.cache_clear()
    load_encoder(tmp_path / "any.pth", "timm/convnext_atto")
    assert weights_module._without_memory.cache_info().currsize == 1


def test_deeper_encoders_are_not_taken_for_others(tmp_path: Path) -> None:
    """ResNet-101 has all names of ResNet-50 with the same shapes, and more."""
    with torch.device("meta"):
        state = models.resnet101().state_dict()
    torch.save(
        {"state_dict": {f"backbone.{name}": torch.zeros(value.shape) for name, value in state.items()}},
        tmp_path / "any.ckpt",
    )
    with pytest.raises(UsageError, match=r"first unexpected is layer3\.6\.conv1\.weight; they fit --arch resnet101"):
        load_encoder(tmp_path / "any.ckpt", "resnet50")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("arch", ["resnet18", "small-cnn", "timm/resnet10t", "mobilenet_v3_small"])
def test_the_channels_are_seen_from_the_file(arch: str, channels: int, tmp_path: Path) -> None:
    encoder = build_encoder(arch, channels=channels)
    torch.save(encoder.module.state_dict(), tmp_path / "any.pth")
    found = load_encoder(tmp_path / "any.pth", None if arch in ("resnet18", "small-cnn") else arch)
    assert found.shape[0] == channels
    x = torch.rand(2, *found.shape)
    assert torch.equal(features_of(found.module, x), features_of(encoder.module, x))


class Settings(dict):
    """A mapping of a program's own."""


class Kind(enum.Enum):
    LARGE = 1


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (argparse.Namespace(lr=0.1, out=Path("x")), "argparse.Namespace"),
        (np.float64(0.5), "numpy"),
        (np.zeros(3), "numpy.ndarray"),
        (collections.defaultdict(list, {"a": [1]}), "collections.defaultdict"),
        (Settings(lr=0.1), "Settings"),
        ([Kind.LARGE, slice(3)], "Kind"),
        (functools.partial(print, "it runs"), "functools.partial"),
        ({np.int64(3): "a"}, "numpy"),
    ],
)
def test_what_is_not_tensors_is_not_read(beside: object, named: str, new: bool, tmp_path: Path, images: Tensor) -> None:
    model = build_encoder("resnet18").module
    content = {"args": beside, "state_dict": behind("encoder.", model), "more": [beside]}
    torch.save(content, tmp_path / "any.pth", _use_new_zipfile_serialization=new)
    encoder = load_encoder(tmp_path / "any.pth")
    assert torch.equal(features_of(encoder.module, images), features_of(model, images))
    _, not_read = encoder.source.split("not read, since that runs code:")
    assert named in not_read


class Hostile:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


@pytest.mark.parametrize("inside", ["checkpoint", "official checkpoint", "legacy", "plain pickle"])
@pytest.mark.parametrize("function", [Path.touch, shutil.copy], ids=["method", "function"])
def test_code_in_a_file_is_not_run(function: Callable, inside: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "hostile.pth", tmp_path / "was run"
    model = build_encoder("small-cnn").module
    hostile = Hostile(function, *([Path(__file__)] if function is shutil.copy else []), marker)
    content: dict = {"epoch": hostile, "model": behind("module.backbone.", model), "optimizer": {}}
    content["model"] |= {"module.projector.0.weight": torch.ones(1)} if inside == "official checkpoint" else {}
    if inside == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=inside != "legacy")
    if inside == "plain pickle" or function is Path.touch:
        with pytest.raises(UsageError, match="not a file of tensors and plain values"):
            load_encoder(path)
    else:
        assert "not read, since that runs code: " in load_encoder(path).source
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists()  # so it could have been


def test_a_module_of_the_system_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.ones(1)}, "call": os.getcwd}, tmp_path / "any.pth")
    with pytest.raises(UsageError, match="cannot be read"):
        load_encoder(tmp_path / "any.pth")


def test_a_file_does_not_decide_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_of_a_file.py").write_text("import pathlib\npathlib.Path('was run').touch()\n")
    save_file({"weight": torch.ones(2, 2)}, "any.safetensors", {"arch": "own_of_a_file:build", "stem": "imagenet"})
    with pytest.raises(UsageError, match="Name it with --arch own_of_a_file:build"):
        load_encoder(Path("any.safetensors"))
    assert not Path("was run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state_dict or a checkpoint, got list"),
        ({}, "expected tensors by their names, got nothing"),
        ({"epoch": 3, "lr": 0.1}, "expected tensors by their names, got epoch, lr"),
    ],
)
def test_a_file_without_weights(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "any.pth")
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path / "any.pth")


def save_plainly(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, path)


def save_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, path)


OURS, PLAIN, SAFETENSORS = checkpoint.save, save_plainly, save_safetensors


@pytest.mark.parametrize("damage", ["cut off", "empty", "another file", "a bit"])
@pytest.mark.parametrize("save", [OURS, PLAIN, SAFETENSORS])
def test_a_damaged_file(save: Callable, damage: str, tmp_path: Path) -> None:
    path = tmp_path / ("any.safetensors" if save is SAFETENSORS else "any.pth")
    save(path, build_encoder("small-cnn").module.state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= damage == "a bit"
    path.write_bytes({"cut off": data[: len(data) // 2], "empty": b"", "another file": b"GIF89a"}.get(damage, data))
    if damage == "a bit" and save is not OURS:  # only this program's own files have a checksum
        assert load_encoder(path).arch == "small-cnn"
        return
    with pytest.raises(UsageError, match="cannot be read"):
        load_encoder(path)


@pytest.mark.parametrize(("name", "message"), [("absent.pth", "no such file"), (".", "a run's folder with")])
def test_no_file(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path / name)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vit_b_61", "expected digits-cnn, small-cnn, a classifier of torchvision"),
        ("timm/resnet5", "timm has no model resnet5; it has"),
        ("squeezenet1_0", "ends with a linear layer"),
    ],
)
def test_unknown_architectures(arch: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_encoder(arch)


@pytest.mark.parametrize("arch", ["mobilenetv3_small_050", "vgg11", "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_the_width_of_the_features_is_that_of_the_output(arch: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(f"timm/{arch}")
        assert encoder.module.eval()(torch.rand(2, 3, 224, 224)).shape == (2, encoder.features)


def test_nobody_is_told_to_run_what_is_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "any.pth").write_text('{"kind": 1}')
    with pytest.raises(UsageError, match="plain values: Unsupported operand") as caught:
        load_encoder(tmp_path / "any.pth")
    assert "Re-running" not in str(caught.value)


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    model = build_model("resnet18", "32-16", stem="cifar")
    content = dict.fromkeys(checkpoint.PARTS, 0) | {
        "model": model.state_dict(),
        "settings": {"arch": "resnet18", "stem": "cifar"},
    }
    checkpoint.save(tmp_path / "checkpoint.pt", content)
    weights = read_weights(tmp_path)
    assert weights.settings == content["settings"]
    for part in (model.backbone, model.projector):
        assert find(weights, part).state.keys() == part.state_dict().keys()
