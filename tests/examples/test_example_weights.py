"""Encoders out of files of every layout, and what is said of a file that does not fit."""

import argparse
import collections
import enum
import functools
import os
import pickle
import re
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
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.errors import UsageError
from barlow_recipes.models import build_model
from barlow_recipes.weights import find, load_encoder, read_weights

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def same_features(encoder: Encoder, model: nn.Module, images: Tensor) -> None:
    features = features_of(encoder.module, images)
    assert torch.equal(features, features_of(model, images))
    assert features.shape == (len(images), encoder.features)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("arch", "newer"), [("resnet18", False), ("resnet50", True)])
def test_the_official_files(arch: str, newer: bool, tmp_path: Path, images: Tensor) -> None:
    model = official_model(arch, "16-16")
    for path in write_official(tmp_path, model, newer=newer):
        encoder = load_encoder(path)
        assert (encoder.arch, encoder.stem) == (arch, "imagenet")
        same_features(encoder, model.backbone, images)


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
@pytest.mark.parametrize("says", [True, False])
def test_safetensors(says: bool, stem: str, tmp_path: Path, images: Tensor) -> None:
    model = build_encoder("resnet18", stem).module
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"arch": "resnet18", "stem": stem} if says else None)
    encoder = load_encoder(tmp_path / "a.safetensors")
    assert (encoder.arch, encoder.stem) == ("resnet18", stem)
    same_features(encoder, model, images)


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "convnext_tiny", "swin_t", "efficientnet_b0"])
def test_any_classifier_of_torchvision(arch: str, tmp_path: Path, images: Tensor) -> None:
    model = models.get_model(arch)
    torch.save(model.state_dict(), tmp_path / "any.pth")
    encoder = load_encoder(tmp_path / "any.pth", arch)
    *_, last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert torch.equal(features_of(last, features_of(encoder.module, images)), features_of(model, images))


@pytest.mark.parametrize("arch", ["resnet50", "convnext_atto", "vit_tiny_patch16_224", "regnetx_002"])
@pytest.mark.parametrize("named", [True, False])
def test_any_classifier_of_timm(named: bool, arch: str, tmp_path: Path) -> None:
    """A ResNet is recognised."""
    model = timm.create_model(arch)
    torch.save(model.state_dict(), tmp_path / "any.pth")
    if arch != "resnet50" and not named:
        with pytest.raises(UsageError, match=r"--arch.* first missing is .*, the first unexpected is "):
            load_encoder(tmp_path / "any.pth")
        return
    encoder = load_encoder(tmp_path / "any.pth", f"timm/{arch}" if named else None)
    model.reset_classifier(0)
    same_features(encoder, model, torch.rand(2, 3, 224, 224))


@pytest.mark.parametrize("arch", ["small-cnn", "resnet34", "resnext50_32x4d"])
def test_a_bare_encoder_is_recognized(arch: str, tmp_path: Path) -> None:
    torch.save(build_encoder(arch).module.state_dict(), tmp_path / "any.pth")
    assert load_encoder(tmp_path / "any.pth").arch == arch


def test_a_file_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "any.pth"
    torch.save(build_encoder("resnet18").module.state_dict(), path)
    said = (
        f"weights {path}: expected those of resnet50 with the imagenet stem, but 165 names are missing and 0 "
        "unexpected: the first missing is layer1.0.conv3.weight; they fit --arch resnet18 --stem imagenet"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        load_encoder(path, "resnet50")
    with pytest.raises(UsageError, match=r"conv1\.weight is \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        load_encoder(path, "resnet18", "cifar")


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


# Where in the file lie which modules, and what is said of it.
LAYOUTS: dict[str, tuple[dict[str, str], str]] = {
    "bare": ({"": "classifier"}, "120 tensors; left fc"),
    "of DistributedDataParallel": ({"module.": "classifier"}, "120 tensors of module.*; left fc"),
    "of DistributedDataParallel, compiled": ({"module._orig_mod.": "classifier"}, "120 tensors of module.*; left fc"),
    "model": ({"model/": "classifier"}, "120 tensors of model.*; left fc"),
    "state_dict": ({"state_dict/module.": "classifier"}, "120 tensors of state_dict.module.*; left fc"),
    "solo-learn": (
        {"state_dict/momentum_backbone.": "second", "state_dict/backbone.": "classifier", "state_dict/proj.": "head"},
        "120 tensors of state_dict.backbone.*; rather than state_dict.momentum_backbone.*; left fc, proj",
    ),
    "lightly": (
        {"backbone.": "children", "projection_head.layers.": "head"},
        "120 tensors of backbone.* in order; left projection_head",
    ),
    "lightly, in Lightning": (
        {"state_dict/backbone_momentum.": "second's children", "state_dict/backbone.": "children"},
        "of state_dict.backbone.* in order; rather than state_dict.backbone_momentum.*",
    ),
    "SimCLR": ({"f.": "children without pooling"}, "120 tensors of f.* in order"),
    "VISSL": (
        {
            "classy_state_dict/base_model/model/trunk/_feature_blocks.": "classifier",
            "classy_state_dict/base_model/model/heads/0.clf.": "head",
        },
        "of classy_state_dict.base_model.model.trunk._feature_blocks.*; left classy_state_dict, fc",
    ),
    "VISSL, another": ({"model_state_dict/_feature_blocks.": "classifier"}, "of model_state_dict._feature_blocks.*"),
    "mmselfsup": (
        {"state_dict/backbone.": "classifier", "state_dict/neck.fc0.": "head", "optimizer/state/momentum.": "head"},
        "of state_dict.backbone.*; left fc, neck, optimizer",
    ),
    "MoCo": (
        {"state_dict/module.encoder_k.": "second", "state_dict/module.encoder_q.": "classifier"},
        "of state_dict.module.encoder_q.*; rather than state_dict.module.encoder_k.*; left fc",
    ),
    "DINO": (
        {"student/module.backbone.": "second", "student/module.head.mlp.": "head", "teacher/backbone.": "classifier"},
        "of teacher.backbone.*; rather than student.module.backbone.*; left fc, student",
    ),
    "BYOL": (
        {"target_encoder.net.": "second", "online_encoder.net.": "classifier"},
        "of online_encoder.net.*; rather than target_encoder.net.*",
    ),
    "encoder": ({"encoder.": "classifier"}, "of encoder.*; left fc"),
    "model twice": ({"model/model.": "classifier"}, "of model.model.*; left fc"),
    "an average beside it": ({"model_ema/": "second", "model/": "classifier"}, "of model.*; rather than model_ema.*"),
    "wrapped inside": ({"backbone.module.": "classifier"}, "of backbone.module.*; left fc"),
    "of before torch 0.4": ({"": "without counters"}, "100 tensors; left fc; missing 20 num_batches_tracked"),
}  # fmt: skip


def in_layout(layout: dict[str, str], first: nn.Module, second: nn.Module) -> dict:
    """The content of a file, with a plain value beside its tensors."""
    children, pooling = [*first.children()], (nn.Linear, nn.MaxPool2d)
    uncounted = {name: value for name, value in first.state_dict().items() if "num_batches" not in name}
    states = {
        "classifier": first.state_dict(),
        "second": second.state_dict(),
        "children": nn.Sequential(*children[:-1]).state_dict(),  # as in lightly's tutorials
        "second's children": nn.Sequential(*[*second.children()][:-1]).state_dict(),
        "children without pooling": nn.Sequential(*(c for c in children if not isinstance(c, pooling))).state_dict(),
        "without counters": uncounted,
        "head": nn.Linear(2, 3).state_dict(),
    }
    content: dict = {"epoch": 3}
    for place, name in layout.items():
        *keys, prefix = place.split("/")
        inside = content
        for key in keys:
            inside = inside.setdefault(key, {})
        inside |= behind(prefix, states[name])
    return content


@pytest.mark.parametrize("named", [None, "resnet18"])
@pytest.mark.parametrize(("layout", "said"), LAYOUTS.values(), ids=LAYOUTS)
def test_files_of_other_programs(layout: dict, said: str, named: str | None, tmp_path: Path, images: Tensor) -> None:
    first, second = models.resnet18(), models.resnet18()
    for module in (first, second):
        module.bn1.running_mean.uniform_()
    torch.save(in_layout(layout, first, second), tmp_path / "any.ckpt")
    encoder = load_encoder(tmp_path / "any.ckpt", named)
    first.fc = nn.Identity()
    same_features(encoder, first, images)
    assert said in encoder.source


def test_longer_encoders_are_not_taken_for_shorter_ones(tmp_path: Path) -> None:
    """Nor deeper for others: ResNet-101 has all names of ResNet-50 with the same shapes, and more."""
    longer = nn.Sequential(*build_encoder("small-cnn").module, nn.Linear(128, 128)).state_dict()
    torch.save(longer, tmp_path / "longer.pth")
    with pytest.raises(UsageError, match=r"the first unexpected is 15\.weight"):
        load_encoder(tmp_path / "longer.pth", "small-cnn")
    with torch.device("meta"):
        state = models.resnet101().state_dict()
    deeper = behind("backbone.", {name: torch.zeros(value.shape) for name, value in state.items()})
    torch.save({"state_dict": deeper}, tmp_path / "deeper.pth")
    with pytest.raises(UsageError, match=r"first unexpected is layer3\.6\.conv1\.weight; they fit --arch resnet101"):
        load_encoder(tmp_path / "deeper.pth", "resnet50")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("arch", ["resnet18", "small-cnn", "timm/resnet10t", "timm/pit_ti_224", "mobilenet_v3_small"])
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
    content = {"args": beside, "state_dict": behind("encoder.", model.state_dict()), "more": [beside]}
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
@pytest.mark.parametrize("function", [Path.touch, shutil.copy, os.getcwd], ids=["method", "function", "of the system"])
def test_code_in_a_file_is_not_run(function: Callable, inside: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "hostile.pth", tmp_path / "was run"
    hostile = Hostile(function, *{Path.touch: [marker], shutil.copy: [__file__, marker]}.get(function, []))
    model = behind("module.backbone.", build_encoder("small-cnn").module.state_dict())
    model |= {"module.projector.0.weight": torch.ones(1)} if inside == "official checkpoint" else {}
    content = {"epoch": hostile, "model": model, "optimizer": {}}
    if inside == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=inside != "legacy")
    if inside == "plain pickle" or function is not shutil.copy:
        with pytest.raises(UsageError, match="not a file of tensors and plain values"):
            load_encoder(path)
    else:
        assert "not read, since that runs code: " in load_encoder(path).source
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists() == (function is not os.getcwd)  # so it could have been


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


SAVED: dict[str, Callable[[Path, dict], None]] = {
    "any.pt": checkpoint.save,  # alone with a checksum
    "any.pth": lambda path, state: torch.save(state, path),
    "any.safetensors": lambda path, state: save_file(state, path),
}


@pytest.mark.parametrize("damage", ["cut off", "empty", "another file", "a bit"])
@pytest.mark.parametrize("name", SAVED)
def test_a_damaged_file(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    SAVED[name](path, build_encoder("small-cnn").module.state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= damage == "a bit"
    text = b'{"kind": 1}'
    path.write_bytes({"cut off": data[: len(data) // 2], "empty": b"", "another file": text}.get(damage, data))
    if damage == "a bit" and name != "any.pt":
        assert load_encoder(path).arch == "small-cnn"
        return
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load_encoder(path)
    assert "Re-running" not in str(caught.value)  # nobody is told to run what is in it
    assert ("plain values: Unsupported operand" in str(caught.value)) == (damage == "another file" and "pt" in name)


@pytest.mark.parametrize(("name", "message"), [("absent.pth", "no such file"), (".", "a run's folder with")])
def test_no_file(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path / name)


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
