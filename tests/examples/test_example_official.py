"""Pretraining that begins with somebody's weights, or goes on where the official program has stopped."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from official_files import official_model, write_official
from outcomes import SMALL_RESNET, rows
from torch import nn
from torchvision import models

from barlow_recipes.errors import UsageError
from barlow_recipes.models import build_model
from barlow_recipes.official import initialize
from barlow_recipes.weights import load_encoder

Run = Callable[..., tuple[int, str, str]]
STANDING = ("--learning-rate-weights", 0, "--learning-rate-biases", 0)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    model = official_model("resnet18", "64-64-64")
    return model, *write_official(tmp_path_factory.mktemp("official"), model)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def matching(saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """Before the dot, the parts of the model all of whose parameters are as expected."""
    equal = {name: torch.equal(saved[name], value) for name, value in expected.items()}
    parts = {name.partition(".")[0] for name in expected}
    return {part for part in parts if all(same for name, same in equal.items() if name.startswith(f"{part}."))}


@pytest.mark.parametrize(("which", "parts"), [(1, {"backbone", "projector"}), (2, {"backbone"})])
@pytest.mark.usefixtures("few_looks")
def test_init(which: int, parts: set[str], official: tuple, run: Run, jpegs: Path, tmp_path: Path) -> None:
    flags = (*SMALL_RESNET, *STANDING, "--data", jpegs, "--out", "out", "--init", official[which])
    status, output, errors = run(*flags, "--limit-steps", 1)
    assert (status, errors) == (0, "")
    what = {1: "encoder and projector", 2: "the encoder (the projector has random weights: the file has none)"}
    assert f"note: begins with {what[which]} of {official[which]}" in output
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert matching(saved["model"], parameters(official[0])) == parts
    assert "untrained encoder" in {row["representation"] for row in rows(tmp_path / "out", "baseline")}


@pytest.mark.usefixtures("few_looks")
def test_a_resumed_run_does_not_begin_again(official: tuple, run: Run, jpegs: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.pth"
    first.write_bytes(official[1].read_bytes())
    flags = (*SMALL_RESNET, "--data", jpegs, "--out", "out", "--init", first, "--no-probe", "--resume")
    assert run(*flags, "--limit-steps", 3)[0] == 0
    first.unlink()
    status, output, _ = run(*flags, "--limit-steps", 5)
    assert status == 0
    assert "continuing from out/checkpoint.pt, after step 3" in output
    assert "begins with" not in output


@pytest.mark.usefixtures("few_looks")
def test_the_official_run_is_resumed(official: tuple, run: Run, jpegs: Path, tmp_path: Path) -> None:
    """Epoch 2 of 2, by its momenta: with learning rates that stand still the weights are the file's."""
    flags = (*SMALL_RESNET, *STANDING, "--data", jpegs, "--no-probe", "--log-every", 1)
    status, output, errors = run(*flags, "--resume", official[1])
    assert (status, errors) == (0, "")
    assert f"note: continues {official[1]}, a checkpoint of facebookresearch/barlowtwins, after its epoch 1" in output
    out = tmp_path / "runs" / "flowers-resnet18"
    assert [row["step"] for row in rows(out, "step")] == [6, 7, 8, 9, 10]
    assert [row["epoch"] for row in rows(out, "epoch")] == [2]
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert matching(saved["model"], parameters(official[0])) == {"backbone", "projector"}
    assert not [path for path in official[1].parent.iterdir() if path not in official[1:]]
    assert run(*flags, "--resume", official[1], "--limit-steps", 7, "--out", "moved", *STANDING[:1], 0.2)[0] == 0
    moved = torch.load(tmp_path / "moved" / "checkpoint.pt", weights_only=True)
    assert not matching(moved["model"], parameters(official[0]))
    assert run(*flags, "--resume", "auto", "--limit-steps", 9, "--out", "moved", *STANDING[:1], 0.2)[0] == 0
    assert [row["step"] for row in rows(tmp_path / "moved", "step")] == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resume", 1, "--projector", "64-64"), "of this --projector, but 0 names are missing and 6 unexpected"),
        (("--resume", 1, "--projector", "64-64-32"), r"6\.weight is \(64, 64\) instead of \(32, 64\)"),
        (("--init", 1, "--arch", "resnet34"), "this encoder .* the first missing is layer1.2.conv1.weight"),
        (("--init", 2, "--stem", "cifar"), r"conv1\.weight is \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"),
        (("--resume", 1, "--optimizer", "adamw"), "optimised by LARS, expected --optimizer lars"),
        (("--resume", 1, "--arch", "resnet34"), "this encoder"),
        (("--resume", 2), "does not end with a checksum"),
        (("--init", "absent.pth"), "weights absent.pth: no such file"),
    ],
)
def test_what_does_not_fit(flags: tuple, message: str, official: tuple, run: Run, jpegs: Path, tmp_path: Path) -> None:
    flags = tuple(official[flag] if isinstance(flag, int) else flag for flag in flags)
    status, _, errors = run(*SMALL_RESNET, "--data", jpegs, *flags)
    assert status == 2
    assert re.search(message, errors), errors
    assert not (tmp_path / "runs").exists()


def test_momenta_of_another_model(official: tuple, run: Run, jpegs: Path, tmp_path: Path) -> None:
    content = torch.load(write_official(tmp_path / "newer", official[0], newer=True)[0], weights_only=True)
    del content["optimizer"]["state"][3]
    torch.save(content, tmp_path / "checkpoint.pth")
    status, _, errors = run(*SMALL_RESNET, "--data", jpegs, "--resume", "checkpoint.pth")
    assert status == 2
    assert "its optimizer is not of this model: of the momenta by number, 1 names are missing" in errors


@pytest.mark.parametrize("part", ["backbone.conv1.weight", "projector.0.weight"])
def test_weights_that_are_not_finite_are_refused(part: str, tmp_path: Path) -> None:
    """A run that has diverged left them; in an encoder they spoil whatever is trained on it."""
    model = build_model("resnet18", "16-16")
    theirs = model.state_dict()
    theirs[part] = torch.full_like(theirs[part], torch.nan)
    torch.save(theirs, tmp_path / "diverged.pt")
    with pytest.raises(UsageError, match=r"diverged\.pt: .*weight has values that are not finite"):
        initialize(model, tmp_path / "diverged.pt")
    if part.startswith("backbone"):
        with pytest.raises(UsageError, match=r"diverged\.pt: conv1\.weight has values that are not finite"):
            load_encoder(tmp_path / "diverged.pt")


@pytest.mark.parametrize(
    ("projector", "problem"),
    [
        (nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)), "unexpected is 0.bias"),
        (nn.Sequential(nn.Linear(512, 8, bias=False)), "0.weight is (8, 512) instead of (16, 512)"),
    ],
)
def test_a_projector_that_does_not_fit_is_left(projector: nn.Module, problem: str, tmp_path: Path) -> None:
    """As of solo-learn and VICReg; those who want both say so."""
    theirs = nn.ModuleDict({"backbone": models.resnet18(), "projector": projector})
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "any.ckpt")
    model = build_model("resnet18", "16" if len(projector) == 1 else "16-16")
    before = copy.deepcopy(model.projector.state_dict())
    said = initialize(model, tmp_path / "any.ckpt")
    assert "begins with the encoder (the projector has random weights: " in said
    assert problem in said
    assert torch.equal(model.backbone.conv1.weight, theirs["backbone"].conv1.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.projector.state_dict().items())
    with pytest.raises(UsageError, match=r"expected those of this --projector, but .*" + re.escape(problem)):
        initialize(model, tmp_path / "any.ckpt", strict=True)


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [
        ("timm/convnext_atto", partial(timm.create_model, "convnext_atto")),
        ("timm/vit_tiny_patch16_224", partial(timm.create_model, "vit_tiny_patch16_224")),
        ("timm/resnet18", models.resnet18),
        ("resnet18", models.resnet18),
        ("mobilenet_v3_small", models.mobilenet_v3_small),
    ],
)
def test_beginning_with_the_weights_of_a_library(arch: str, theirs: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Files of classifiers, for images of another size."""
    classifier, model = theirs(), build_model(arch, "16-16", image_size=64)
    torch.save(classifier.state_dict(), tmp_path / "any.pth")
    said = initialize(model, tmp_path / "any.pth")
    assert "the encoder (the projector has random weights: the file has none)" in said
    assert re.search(r"a state_dict: \d+ tensors; left (fc|head|classifier)$", said)
    found, saved = model.backbone.state_dict(), classifier.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())
