"""The transfer program: presets and their numbers, val/ or test/, mean per class, resume, one line for mistakes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from labelled_tree import SMALL, make_tree
from outcomes import rows

import transfer_classification as program
from barlow_recipes import protocols as training
from barlow_recipes.errors import UsageError
from barlow_recipes.published import INATURALIST18, LINEAR, PLACES205, Recipe

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "flowers", train=6, held_out="test")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(*flags: object) -> tuple[int, str, str]:
        status = program.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return call


def recipe(*flags: str) -> Recipe:
    return program._recipe(vars(program._parser().parse_args(["--data", "x", "--weights", "y", *flags])))


def test_a_preset_gives_the_published_numbers_and_flags_change_them() -> None:
    assert recipe() == LINEAR
    assert recipe("--preset", "places205") == PLACES205
    assert recipe("--preset", "inaturalist18") == INATURALIST18
    changed = recipe("--preset", "places205", "--lr", "0.02", "--epochs", "20", "--milestones", "12", "4", "8")
    assert (changed.lr_classifier, changed.epochs, changed.milestones) == (0.02, 20, (4, 8, 12))
    assert (changed.weight_decay, changed.momentum, changed.batch_size) == (5e-4, 0.9, 256)
    assert recipe("--preset", "places205", "--milestones").factor(7) == pytest.approx(0.5)  # a cosine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "places"), "--preset places: expected one of linear, places205, inaturalist18"),
        (("--preset", "places205", "--epochs", "9"), "--milestones 5 9: expected less than --epochs 9"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(*flags)


def test_a_transfer_to_any_folder_of_classes(call: Call, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--data", tree, *SMALL, "--preset", "places205", "--epochs", 3, "--milestones", 1, 2)
    measure = training.accuracy
    monkeypatch.setattr(training, "accuracy", lambda *args: measure(*args)._replace(top1=50.0, mean_per_class=40.0))
    status, output, errors = call(*flags)
    assert (status, errors) == (0, "")
    out = Path("runs/flowers-transfer")
    assert output.splitlines()[-1].endswith(f"Results: {out}")
    assert re.search(r"^places205 +50.00 % +40.00 % +54.1 % +50.00 % \(1\)$", output, re.MULTILINE)
    found = json.loads((out / "results.json").read_text())["protocols"]
    assert list(found) == ["places205"]
    assert (found["places205"]["top1"], found["places205"]["mean_per_class"]) == (50, 40)
    assert [row["lr_classifier"] for row in rows(out, "epoch")] == pytest.approx([0.01, 0.001, 0.0001])
    assert "lr_backbone" not in rows(out, "epoch")[0]


def test_a_transfer_resumes_with_the_same_results(call: Call, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--data", tree, *SMALL, "--epochs", 3)
    assert call(*flags, "--out", "whole")[0] == 0
    measure, measured = training.accuracy, []

    def interrupted(*args: object) -> object:
        measured.append(args)
        if len(measured) > 1:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "accuracy", interrupted)
        assert call(*flags, "--out", "parts")[0] == 130
    assert call(*flags, "--out", "parts", "--resume")[0] == 0
    whole, parts = (json.loads(Path(out, "results.json").read_text()) for out in ("whole", "parts"))
    assert whole == parts
    status, _, errors = call(*flags, "--out", "parts", "--resume", "--lr", 0.1)
    assert (status, "linear lr_classifier was 0.3 and is now 0.1" in errors) == (2, True)


def test_a_tree_without_a_part_to_measure_on_gets_one_line(call: Call, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "flowers", train=1, validation=1, held_out="validation")
    status, output, errors = call("--data", root, *SMALL)
    assert (status, output) == (2, "")
    assert errors == f"error: --data {root}: expected a folder val/ or test/ of class folders\n"
