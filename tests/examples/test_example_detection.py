"""The program of transfer to detection from end to end: results, a resumed run, two processes, what it refuses."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from outcomes import EXAMPLES, differences, rows, states
from together import launch

pytest.importorskip("pycocotools")

import shapes

import transfer_detection as training
from barlow_recipes import checkpoint
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.encoders import build_encoder
from barlow_recipes.weights import digest
from programs import Nursery

SMALL = (
    *("--short-side", 64, "--anchor-sizes", 16, 32, "--anchors-per-image", 16, "--rois-per-image", 8),
    *("--candidates", 40, 40, "--proposals", 20, 10, "--precise-batches", 1, "--workers", 0, "--device", "cpu"),
    *("--batch-size", 2, "--out", "out"),
)
RANDOM = ("--weights", "random", "--arch", "timm/test_resnet")  # of 0.4 M parameters
Detect = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    makers = {"voc": shapes.voc_tree, "coco": shapes.coco_tree}
    return {layout: make(root / layout, train=6, test=3, side=64) for layout, make in makers.items()}


@pytest.fixture
def detect(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Detect:
    """Call the program with flags, in an empty folder; get its exit status, its output and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda *flags: (training.main([str(flag) for flag in flags]), *capsys.readouterr())


def results(folder: str | Path = "out") -> Any:
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.mark.parametrize(
    ("layout", "kinds", "points", "rate"), [("voc", {"box"}, 11, 0.1), ("coco", {"box", "mask"}, 101, 0.03)]
)
def test_a_run_leaves_results_a_model_and_a_table(
    layout: str, kinds: set[str], points: int, rate: float, trees: dict[str, Path], detect: Detect
) -> None:
    encoder = build_encoder("resnet18").module
    torch.save(encoder.state_dict(), "encoder.pt")
    flags = ("--data", trees[layout], *SMALL, "--weights", "encoder.pt", "--iterations", 3)
    status, output, errors = detect(*flags)
    assert status == 0, errors
    found, model = results(), checkpoint.read(Path("out/model.pt"))
    assert found["scores"].keys() == kinds
    assert all(0 <= found["scores"][kind][figure] <= 100 for kind in kinds for figure in ("AP", "AP50", "AP75"))
    assert f"at {points} points of recall" in found["unit"]
    assert found["settings"]["--weights"] == digest(encoder)  # so that a model card can tell whose they are
    assert found["settings"]["learning_rate"] == rate / 8
    assert "resnet18-C4, 3 iterations  " in output
    assert yaml.safe_load(Path("out/settings.yaml").read_text())["milestones"] == [2, 2]
    assert model["classes"] == found["classes"] == [*shapes.CLASSES]
    assert model["arch"] == "resnet18"
    assert rows(Path("out"), "step")[-1]["loss_objectness"] >= 0
    status, _, errors = detect(*flags)
    assert (status, "holds another run" in errors) == (2, True)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(trees: dict[str, Path], detect: Detect) -> None:
    """To the bit: the state has no place for a random state that would have to be restored into a loader."""
    flags = ("--data", trees["coco"], *RANDOM, *SMALL, "--iterations", 5, "--milestones", 4)
    assert detect(*flags, "--out", "whole", "--save-every", 2)[0] == 0
    shutil.copytree("whole", "broken")
    Path("broken/checkpoint.pt").write_bytes(b"damaged")  # the one before it is of iteration 4
    for name in ("results.json", "model.pt"):
        (Path("broken") / name).unlink()
    status, output, errors = detect(*flags, "--out", "broken", "--resume")
    assert status == 0, errors
    assert "after iteration 4" in output
    assert "damaged or missing" in errors
    assert differences(*states("whole", "broken")) == []
    assert results("whole") == results("broken")
    for other in (("--warmup-factor", 0.8), ("--seed", 1)):  # another seed, other random weights
        status, _, errors = detect(*flags, "--out", "broken", "--resume", *other)
        assert status == 2
        assert ("--weights was" if "--seed" in other else "warmup_factor was 0.001 and is now 0.8") in errors


def test_a_signal_ends_the_run_after_its_step_saved(
    trees: dict[str, Path], detect: Detect, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = training.take_step

    def signalled(network: Any, state: TrainingState, *rest: Any) -> dict[str, float]:
        if state.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return take_step(network, state, *rest)

    monkeypatch.setattr(training, "take_step", signalled)
    status, _, errors = detect("--data", trees["voc"], *RANDOM, *SMALL, "--iterations", 5)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after iteration 2, saved in out/checkpoint.pt: continue with --resume" in errors
    assert states("out")[0]["step"] == 2


@pytest.mark.slow
def test_two_processes_share_the_images_unevenly_and_end(
    trees: dict[str, Path], tmp_path: Path, nursery: Nursery
) -> None:
    """Three images a step, three in the test: each process has one or two, with a batch norm over all of them."""
    flags = [*("--data", trees["coco"]), *RANDOM, *SMALL, *("--batch-size", 3, "--iterations", 2)]
    done = launch(nursery, tmp_path, 2, EXAMPLES / "transfer_detection.py", *flags)
    assert done.status == 0, done.errors
    assert "cpu in 2 processes" in done.output
    assert done.output.count("average precision in percent") == 1
    assert results(tmp_path / "out")["test"]["images"] == 3
    assert results(tmp_path / "out")["scores"]["mask"]["AP"] is not None


def test_what_is_left_out_is_told_and_kept(trees: dict[str, Path], tmp_path: Path, detect: Detect) -> None:
    root = Path(shutil.copytree(trees["coco"], tmp_path / "data"))
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    path.write_text(json.dumps(content))
    for name in ("train2017/10000001.jpg", "val2017/11000000.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:100])
    status, output, errors = detect("--data", root, *RANDOM, *SMALL, "--iterations", 3)
    assert status == 0, errors
    assert "1 images left out, 1 objects left out" in output  # the image has no other object
    assert "1 left out of the test" in output
    assert results()["train"]["objects_left_out"] == 1
    assert results()["train"]["unreadable"] >= 1
    assert results()["test"]["unreadable"] == 1


def test_a_slow_precision_is_told_first(
    trees: dict[str, Path], detect: Detect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    status, output, _ = detect("--data", trees["voc"], *RANDOM, *SMALL, "--iterations", 1, "--precision", "bf16")
    assert status == 0
    assert output.index("note: --precision bf16 can be several times slower than fp32 here") < output.index("average")


def test_a_test_without_a_readable_image_ends_the_run(trees: dict[str, Path], tmp_path: Path, detect: Detect) -> None:
    root = Path(shutil.copytree(trees["coco"], tmp_path / "data"))
    for path in (root / "val2017").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    status, _, errors = detect("--data", root, *RANDOM, *SMALL, "--iterations", 1)
    assert status == 1
    assert errors.splitlines()[-1].endswith(
        "no image of the test can be read: is --data damaged? After a repair, continue with --resume"
    )
    assert not Path("out/results.json").exists()


def test_too_little_memory_has_the_programs_own_remedy(
    trees: dict[str, Path], detect: Detect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "take_step", fail)
    status, _, errors = detect("--data", trees["voc"], *RANDOM, *SMALL)
    assert status == 1
    assert "try a smaller --batch-size, --short-side or --rois-per-image" in errors


def test_a_loss_that_is_not_finite_ends_the_run(trees: dict[str, Path], detect: Detect) -> None:
    flags = ("--data", trees["voc"], *RANDOM, *SMALL, "--learning-rate", 1e18, "--warmup", 0, "--iterations", 5)
    status, _, errors = detect(*flags)
    assert status == 1
    assert "the loss is not finite" in errors
    assert "--learning-rate" in errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data", "voc"), "--weights"),
        (RANDOM, "--data"),
        (("--data", "nowhere", *RANDOM), "--data nowhere: expected a folder with VOC2007/"),
        (("--data", "untested", *RANDOM), "No such file or directory: 'untested/VOC2007/ImageSets/Main/test.txt'"),
        (("--data", "empty", *RANDOM), "in the test: 0 images, 0 boxes, 3 images left out"),
        (("--data", "voc", "--weights", "absent.pt"), "absent.pt: no such file"),
        (("--data", "voc", "--weights", "random", "--arch", "small-cnn"), "expected a ResNet"),
        (
            ("--data", "voc", *RANDOM, "--batch-size", "7"),
            "--batch-size 7: expected from 1, one for each process, to 6",
        ),
        (("--data", "voc", *RANDOM, "--iterations", "0"), "--iterations 0: expected a whole number"),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: tuple[str, ...], expected: str, trees: dict[str, Path], detect: Detect
) -> None:
    for name in ("voc", "untested", "empty"):
        shutil.copytree(trees["voc"], name)
    Path("untested/VOC2007/ImageSets/Main/test.txt").unlink()
    shutil.rmtree("empty/VOC2007/JPEGImages")
    status, _, errors = detect(*SMALL, *flags)
    assert status == 2
    assert errors.startswith("error: ")
    assert expected in errors
    assert errors.count("\n") == 1
