"""The evaluation program end to end: all protocols, resume, what cannot be read, and one line for every mistake."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from labelled_tree import SMALL, make_tree, spoil
from outcomes import differences, rows
from safetensors.torch import load
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import imagenet_evaluate as program
from barlow_recipes import checkpoint, command_line, probes
from barlow_recipes.classifier import RECIPES
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import UsageError
from barlow_recipes.labelled import centres, load_tree

Call = Callable[..., tuple[int, str, str]]
FILES = {".lock", "checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "results.json", "settings.yaml"}
PRODUCTS = {f"classifier-{name}.safetensors" for name in ("linear", "semi-1", "semi-10")}
TWO_EPOCHS = ("--epochs", 2)
FINE_TUNED = ("--protocols", "linear", "semi-10", *TWO_EPOCHS, "--lr-classifier", 0.05)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "flowers")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the program in an empty folder; get its exit status, its output and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(*flags: object) -> tuple[int, str, str]:
        status = program.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return call


def results(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


def last_epoch(folder: str) -> dict[str, Any]:
    """The state after the last epoch; the checkpoint itself is that of the finished run."""
    return checkpoint.read(Path(folder) / "checkpoint.previous.pt")


def test_a_slow_precision_is_told_first(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    tree = make_tree(tmp_path / "flowers", train=2, validation=2)
    status, output, _ = call("--data", tree, *SMALL, "--protocols", "knn", "--precision", "bf16")
    assert status == 0
    assert output.startswith("note: --precision bf16 can be several times slower than fp32 here")


def test_neighbours_of_no_readable_image_are_no_accuracy(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would have voted for nothing: an accuracy of 0."""
    tree = make_tree(tmp_path / "flowers", train=2, validation=2)
    monkeypatch.setattr(program, "look_at_some", lambda *_: None)  # as of files that are damaged after it
    for path in (tree / "train").rglob("*.JPEG"):
        spoil(path)
    status, _, errors = call("--data", tree, *SMALL, "--protocols", "knn")
    assert (status, errors) == (1, "error: no image of train/ can be read: is --data damaged?\n")


def test_all_protocols(call: Call, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "flowers", train=6, validation=2)
    flags = (*SMALL, "--batch-size", 12, "--neighbours", 5, "--lr-classifier", 0.05)
    status, output, errors = call("--data", tree, *flags, *TWO_EPOCHS)
    assert (status, errors) == (0, "")
    out = Path("runs/flowers-evaluation")
    assert output.splitlines()[-1].endswith(f"Results: {out}")
    assert {path.name for path in out.iterdir()} == FILES | PRODUCTS
    lines = output.splitlines()
    assert "flowers: 3 classes, 18 images to train on and 6 to validate on" in lines
    assert "small-cnn, random weights: fp32 on cpu; results go to runs/flowers-evaluation" in lines
    assert "semi-10: 3 images, 10 % of each class or one, by a fixed seed, not a published list" in lines
    assert re.search(r"^linear, epoch 2/2: loss \S+, \S+ images/s, top-1 \S+ %, top-5 100.00 %$", output, re.MULTILINE)

    found = results(out)["protocols"]
    assert list(found) == ["linear", "knn", "semi-1", "semi-10"]
    assert "by a fixed seed, not a published list" in found["semi-10"]["labels"]
    assert found["knn"]["neighbours"] == 5
    epochs = rows(out, "epoch")
    assert [(row["protocol"], row["epoch"], row["step"]) for row in epochs] == [
        ("linear", 1, 1), ("linear", 2, 2), ("semi-1", 1, 3), ("semi-1", 2, 4), ("semi-10", 1, 5), ("semi-10", 2, 6)
    ]  # fmt: skip
    assert [row["lr_classifier"] for row in epochs] == pytest.approx([0.05, 0.025] * 3)
    assert [row.get("lr_backbone") for row in epochs] == [None, None, *[0.005, 0.0025] * 2]
    for name in ("linear", "semi-1", "semi-10"):
        own = [row for row in epochs if row["protocol"] == name]
        assert {key: own[-1][key] for key in ("top1", "top5", "mean_per_class", "loss")}.items() <= found[name].items()
        assert found[name]["file"] == f"classifier-{name}.safetensors"
    table = output[output.index("published") :]
    assert re.search(r"^linear +\S+ % +100.00 % +\S+ % +73.2 % / 91.0 %$", table, re.MULTILINE)


def settings(*flags: object) -> program.Settings:
    given = ["--data", "x", "--weights", "y", *map(str, flags)]
    return command_line.read(program.Settings, given, "")


def test_the_defaults_are_the_published_numbers_and_flags_change_them() -> None:
    defaults = settings()
    assert {name: defaults.recipe(name) for name in RECIPES} == RECIPES
    assert (defaults.protocols, defaults.neighbours) == (("linear", "knn", "semi-1", "semi-10"), 20)
    assert (defaults.batch_size, defaults.image_size) == (256, 224)
    flags = ("--lr-classifier", 0.02, "--epochs", 20, "--milestones", 12, 4, 8, "--momentum", 0)
    changed = settings(*flags, "--batch-size", 64).recipe("places205")
    assert (changed.lr_classifier, changed.epochs, changed.milestones) == (0.02, 20, (12, 4, 8))
    assert (changed.weight_decay, changed.momentum, changed.batch_size) == (5e-4, 0, 64)
    assert settings("--milestones").recipe("places205").factor(7) == pytest.approx(0.5)  # a cosine
    both = settings("--lr-backbone", 0.1)
    assert [both.recipe(name).lr_backbone for name in ("linear", "semi-1")] == [None, 0.1]
    with pytest.raises(UsageError, match="--milestones 5 9: expected less than --epochs 9"):
        settings("--epochs", 9).recipe("places205")


def test_a_transfer_to_a_tree_with_test_in_the_place_of_val(call: Call, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "flowers", train=6, held_out="test")
    flags = ("--protocols", "places205", "--epochs", 3, "--milestones", 1, 2, "--out", "out")
    status, output, errors = call("--data", tree, *SMALL, *flags)
    assert (status, errors) == (0, "")
    assert re.search(r"^places205 +\S+ % +100.00 % +\S+ % +54.1 %$", output, re.MULTILINE)
    assert list(results("out")["protocols"]) == ["places205"]
    assert [row["lr_classifier"] for row in rows(Path("out"), "epoch")] == pytest.approx([0.01, 0.001, 0.0001])
    other = ("--lr-classifier", 1, "--seed", 1)
    status, _, errors = call("--settings", "out/settings.yaml", "--out", "out", "--resume", *other)
    assert (status, "places205 lr_classifier was 0.01 and is now 1.0; seed was 0 and is now 1" in errors) == (2, True)
    assert "--weights was" in errors  # the random ones are those of the seed


def test_the_last_epoch_is_the_result_whichever_was_best(
    call: Call, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], program.accuracies

    def falling(*args: Any) -> Any:
        measured.append(measure(*args) | {"top1": 90.0 - 10 * len(measured)})
        return measured[-1]

    monkeypatch.setattr(program, "accuracies", falling)
    status, output, _ = call("--data", tree, *SMALL, "--protocols", "linear", "--epochs", 3, "--out", "out")
    assert status == 0
    found = results("out")["protocols"]["linear"]
    assert (found["epoch"], found["top1"]) == (3, 70)
    assert re.search(r"^linear +70.00 % ", output, re.MULTILINE)


def test_the_workers_do_not_matter(call: Call, tree: Path) -> None:
    for workers in (0, 2):
        assert call("--data", tree, *SMALL, *FINE_TUNED, "--workers", workers, "--out", workers)[0] == 0
    assert differences(last_epoch("0"), last_epoch("2")) == []
    assert results("0")["protocols"] == results("2")["protocols"]


def test_a_protocol_does_not_depend_on_those_before_it(call: Call, tree: Path) -> None:
    """The first one fine-tunes a copy of the encoder."""
    flags = ("--data", tree, *SMALL, "--epochs", 1)
    assert call(*flags, "--protocols", "semi-1", "knn", "semi-10", "--out", "both")[0] == 0
    assert call(*flags, "--protocols", "semi-10", "--out", "one")[0] == 0
    assert results("both")["protocols"]["semi-10"] == results("one")["protocols"]["semi-10"]
    assert torch.equal(*(last_epoch(out)["model"]["encoder.0.weight"] for out in ("both", "one")))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_that_was_interrupted_resumes_with_the_same_bits(
    epochs: int, call: Call, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch of the first protocol, at the beginning of the second one, and amid it."""
    flags = ("--data", tree, *SMALL, *FINE_TUNED)
    assert call(*flags, "--out", "whole")[0] == 0
    measure, measured = program.accuracies, []

    def interrupted(*args: Any) -> Any:
        measured.append(args)
        if len(measured) > epochs:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(program, "accuracies", interrupted)
        assert call(*flags, "--out", "parts")[0] == 130
    assert not Path("parts/results.json").exists()
    status, output, _ = call(*flags, "--out", "parts", "--resume")
    assert status == 0
    assert f"continuing from parts/checkpoint.pt, after epoch {epochs}" in output
    assert differences(last_epoch("whole"), last_epoch("parts")) == []
    assert results("whole")["protocols"] == results("parts")["protocols"]
    for name in ("linear", "semi-10"):
        one, other = (Path(out, f"classifier-{name}.safetensors").read_bytes() for out in ("whole", "parts"))
        assert load(one).keys() == load(other).keys()
        assert all(torch.equal(value, load(other)[key]) for key, value in load(one).items())
    told = [[{**row, "images_per_second": 0} for row in rows(Path(out), "epoch")] for out in ("whole", "parts")]
    assert told[0] == told[1]


def test_a_finished_run_resumes_to_its_results(call: Call, tree: Path) -> None:
    flags = ("--data", tree, *SMALL, "--protocols", "linear", "--epochs", 1, "--out", "out")
    _, first, _ = call(*flags)
    before = results("out")
    status, again, _ = call(*flags, "--resume")
    assert status == 0
    assert "epoch 1/1" not in again
    assert results("out") == before
    assert again.splitlines()[-6:-1] == first.splitlines()[-6:-1]


def test_unreadable_images_are_left_out_and_told(call: Call, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "flowers")
    for name in ("train/n01/n01_0.JPEG", "train/n03/n03_7.JPEG", "val/n02/n02_1.JPEG"):
        spoil(root / name)
    status, output, _ = call("--data", root, *SMALL, "--protocols", "linear", "knn", "--epochs", 1, "--out", "o")
    assert status == 0
    assert re.search(
        r"^linear, epoch 1/1: .*, 2 unreadable in training, left out, 1 unreadable in validation, left out$",
        output, re.MULTILINE,
    )  # fmt: skip
    assert re.search(
        r"^knn: .*, 1 unreadable in validation, left out, 2 unreadable in bank, left out$", output, re.MULTILINE
    )
    found = results("o")["protocols"]
    assert [found[name]["validation_images"] for name in ("linear", "knn")] == [11, 11]
    assert [found[name]["unreadable_in_validation"] for name in ("linear", "knn")] == [1, 1]
    assert (found["linear"]["unreadable_in_training"], found["knn"]["unreadable_in_bank"]) == (2, 2)


def test_images_of_four_channels(call: Call, tree: Path, tmp_path: Path) -> None:
    """Bands in .npy files, told what their values mean, for a random encoder and for one from a file."""
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dry", "wet")):
            folder = tmp_path / "fields" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                generator = np.random.default_rng([label, number, count])
                np.save(folder / f"{number}.npy", generator.uniform(label, label + 1, (4, 20, 20)).astype("float32"))
    flags = ("--data", "fields", *SMALL, "--protocols", "linear", "knn", "--epochs", 2, "--channels", 4)
    status, _, errors = call(*flags)
    assert (status, "--value-range" in errors) == (2, True), errors
    torch.save(build_encoder("small-cnn", channels=4).module.state_dict(), "bands.pth")
    for out, more in (("random", ()), ("file", ("--weights", "bands.pth"))):
        status, _, errors = call(*flags, "--value-range", 0, 2, "--out", out, *more)
        assert (status, errors) == (0, "")
        assert results(out)["protocols"]["knn"]["top1"] == 100
    status, _, errors = call("--data", tree, *SMALL, "--weights", "bands.pth")
    assert (status, "weights bands.pth: expected those of small-cnn" in errors) == (2, True), errors


@pytest.mark.slow
def test_an_encoder_of_one_size_is_built_for_that_of_the_images(call: Call, tree: Path) -> None:
    status, _, errors = call("--data", tree, *SMALL, "--arch", "vit_b_32", "--protocols", "knn")
    assert (status, errors) == (0, "")


def test_flags_that_are_not_those_of_pretraining_are_told(
    call: Call, tree: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Without them the encoder sees other numbers than it has learned from, and accuracies suffer."""
    status, _, errors = run(
        *("--data", tree / "train", "--arch", "small-cnn", "--projector", "8-8", "--image-size", 16, "--batch-size", 4),
        *("--epochs", 1, "--limit-steps", 1, "--workers", 0, "--device", "cpu", "--no-probe", "--no-evaluation"),
        *("--std", 1, 1, 0.5, "--out", tmp_path / "pretrained"),
    )
    assert status == 0, errors
    flags = ("--data", tree, *SMALL, "--weights", tmp_path / "pretrained", "--protocols", "knn")
    note = "note: the encoder was trained with --std 1.0 1.0 0.5"
    assert note in call(*flags, "--out", "first")[1]
    assert "note:" not in call(*flags, "--std", 1, 1, 0.5, "--out", "second")[1]


def test_a_rate_that_diverges_ends_the_run(call: Call, tree: Path) -> None:
    flags = ("--protocols", "semi-10", "--lr-backbone", 1e18, "--lr-classifier", 1e18)
    status, _, errors = call("--data", tree, *SMALL, *flags, "--batch-size", 2)
    assert (status, errors) == (1, "error: the loss is not finite: try a lower learning rate, and fp32\n")


def test_a_batch_of_one_image_that_cannot_be_normalised_gets_one_line(call: Call, tree: Path) -> None:
    """The last layers of a ResNet see one pixel of an image of 32."""
    flags = ("--arch", "resnet18", "--protocols", "semi-10", "--epochs", 1, "--batch-size", 2)
    status, _, errors = call("--data", tree, *SMALL, *flags)
    assert status == 1
    assert errors == "error: a batch of a single image has no variance to normalise by: try another --batch-size\n"


def test_the_neighbours_vote_as_scikit_learns_do(tree: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("small-cnn")
    part, reading = load_tree(tree), settings("--image-size", 16, "--batch-size", 8, "--workers", 0, "--device", "cpu")
    labels = torch.randint(3, (30, 1), generator=torch.Generator().manual_seed(0))
    at_random = replace(part.train, table=torch.cat([labels, part.train.table[:, 1:]], dim=1))
    loaders = [centres(catalogue, reading) for catalogue in (at_random, part.validation)]
    (bank, labels, _), (queries, truth, _) = (
        probes.extract(encoder.module.eval(), loader, torch.device("cpu")) for loader in loaders
    )
    bank, queries = (F.normalize(features - bank.mean(dim=0), dim=1) for features in (bank, queries))
    found = []
    for k in (1, 3, 7, 20, 1000):
        # Of vectors of length 1 the squared distance is 2 − 2 cosine.
        theirs = KNeighborsClassifier(min(k, 30), weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        right = torch.from_numpy(theirs.fit(bank, labels).predict(queries)) == truth
        measured = probes.nearest(encoder, *loaders, 3, torch.device("cpu"), "fp32", k)
        assert measured["top1"] == pytest.approx(100 * float(right.float().mean()), abs=1e-4)
        counts = [measured[name] for name in ("validation_images", "unreadable_in_validation", "unreadable_in_bank")]
        assert counts == [12, 0, 0]
        found.append(measured["top1"])
    assert len(set(found)) > 1  # k matters here


SAME = "--data {data}: expected the same class folders in train/ and val/"
MISTAKES = {
    "rm train": "--data {data}: expected a folder train/ of class folders",
    "rm val": "--data {data}: expected a folder val/ or test/ of class folders",
    "rm train/n02 train/n03": f"{SAME}; 2 are in one of them alone, the first is n02",
    "empty val/n01": "--data {data}/val: no image in 1 of 3 class folders, the first is n01. Remove it or fill it",
    "empty train": "--data {data}/train: no image",
    "spoil train": "--data {data}/train: of ",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tree_that_does_not_fit_gets_one_line(mistake: str, call: Call, tree: Path, tmp_path: Path) -> None:
    data = tmp_path / "copy"
    shutil.copytree(tree, data)
    verb, *folders = mistake.split()
    for folder in folders:
        if verb == "spoil":
            for path in (data / folder).glob("*/*"):
                spoil(path)
            continue
        shutil.rmtree(data / folder)
        if verb == "empty":
            (data / folder).mkdir()
    told(call("--data", data, *SMALL), MISTAKES[mistake].format(data=data))


def told(found: tuple[int, str, str], message: str) -> None:
    """One line, and nothing done."""
    status, output, errors = found
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: {message}")
    assert not Path("runs").exists()


def test_a_list_of_images_is_no_missing_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n")
    assert "list.csv: a file; evaluation wants a folder with" in call("--data", tmp_path / "list.csv", *SMALL)[2]


FLAGS = {
    "": "Missing from",
    "--protocols semi-5": "invalid choice 'semi-5' for argument '--protocols'",
    "--protocols": "--protocols: expected some of linear, knn",
    "--arch resnet51": "--arch resnet51: expected",
    "--arch digits-cnn": "--channels 3: digits-cnn takes images of 1 alone",
    "--arch vit_b_32 --image-size 40": "--arch vit_b_32: cannot take 40 pixels of 3 channels",
    "--weights none.pth": "weights none.pth: no such file",
    "--lists .": "--lists 1percent.txt: expected a list of image files, one a line",
    "--lr-backbone -1": "--lr-backbone -1.0: expected a number ≥ 0",
    "--batch-size 0": "--batch-size 0: expected a whole number ≥ 1",
    "--resume none.pt": "--resume none.pt: no such file",
}


@pytest.mark.parametrize("mistake", FLAGS)
def test_a_bad_flag_gets_one_line(mistake: str, call: Call, tree: Path) -> None:
    given = ("--data", tree, *SMALL, *mistake.split()) if mistake else ()
    told(call(*given), FLAGS[mistake])


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    class Features(NamedTuple):
        module: nn.Module = nn.Flatten()
        features: int = 3

    images = torch.eye(3).view(3, 3, 1, 1)
    bank = DataLoader([*zip(images, (0, 1, 2), strict=True)], batch_size=2)
    queries = DataLoader([*zip(images, (0, 1, 0), strict=True)], batch_size=2)
    for k, top5 in ((1, 200 / 3), (3, 100)):
        measured = probes.nearest(Features(), bank, queries, 3, torch.device("cpu"), "fp32", k)
        assert (measured["top1"], measured["top5"]) == (pytest.approx(200 / 3), pytest.approx(top5))
