"""The evaluation on the built-in data: fair to all methods, blind to the test images, told as it was measured."""

import gzip
import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import EXAMPLES
from torch import Tensor

import evaluate_small
from barlow_recipes import small
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import Aborted
from barlow_recipes.small import (
    AUGMENTED,
    DIGITS,
    FASHION,
    KNN,
    MOST,
    PRETRAINED,
    RAW,
    SCRATCH,
    STUDIES,
    UNTRAINED,
    VIEWS,
    DataSet,
    Labelled,
    load,
)
from programs import start

CPU = torch.device("cpu")
Call = Callable[..., tuple[int, str, str]]
SHORT = ("--only", "digits", "--seeds", 2, "--epochs", 1, "--quick", "--effort", 0.02)


def idx(values: Tensor) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 training images and 50 test images in the files of Fashion-MNIST; each class has a stripe of its own."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 1000), ("t10k", 50)):
        labels = torch.arange(n) % 10
        grey = torch.randint(60, (n, 28, 28), generator=generator, dtype=torch.uint8)
        grey[torch.arange(n), 2 + 2 * labels] = 255
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels.to(torch.uint8))))
    return folder


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load(DIGITS, "")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the program with flags, in an empty folder; get its exit status, its output and its errors."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: object) -> tuple[int, str, str]:
        return evaluate_small.main([str(flag) for flag in flags]), *capsys.readouterr()

    return call


def row(method: str, labels: str, seed: int, accuracy: float) -> dict[str, Any]:
    return small.row_of(DIGITS, method, labels, seed, 0, accuracy=accuracy)


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "settings": {"seeds": 2, "epochs": {DIGITS: 30}},
        "environment": {"device": "cpu", "versions": {"torch": "2.14"}},
        "data": {DIGITS: {"train": 1442, MOST: 1442, "test": 355}},
        "jobs": {"digits-seed-0": {"seconds": 90.0}},
        "pretraining": [],
        "rows": rows,
    }


# The labels


def test_a_share_is_a_share_of_each_class(fashion: Path) -> None:
    data = load(FASHION, str(fashion))
    counts = [data.train.labels[data.labelled(column, 0)].bincount().tolist() for column in ("1%", "10%")]
    assert counts == [[1] * 10, [10] * 10]


@pytest.mark.parametrize("column", ["1", "10"])
def test_a_draw_has_as_many_of_each_class_and_is_a_function_of_the_seed(digits: DataSet, column: str) -> None:
    numbers = digits.labelled(column, seed=3)
    assert digits.train.labels[numbers].bincount().tolist() == [int(column)] * 10
    assert numbers.equal(digits.labelled(column, seed=3))
    assert not numbers.equal(digits.labelled(column, seed=4))
    assert set(digits.labelled("1", 3).tolist()) <= set(numbers.tolist())  # more contain the fewer


def test_every_method_gets_the_same_labels(digits: DataSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Probes of five representations, and training from scratch in two ways: what each of them asks for."""
    weights, expected, asked = tmp_path / "backbone.pt", digits.draws("10", 1)[0], []
    torch.save(build_encoder("digits-cnn").module.state_dict(), weights)

    def fitted(features: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
        asked.append(labels.equal(digits.train.labels[expected]))
        return 0.0

    def trained(data: DataSet, numbers: Tensor, *_: object) -> Any:
        asked.append(numbers.equal(expected))
        return {"accuracy": 0.0}

    monkeypatch.setattr(small.probes, "linear_accuracy", fitted)
    monkeypatch.setattr(small, "train", trained)
    study = STUDIES[DIGITS]._replace(columns=("10",), scratch={SCRATCH: ("10",), AUGMENTED: ("10",)})
    monkeypatch.setitem(STUDIES, DIGITS, study)
    rows = small.measure_frozen(digits, dict.fromkeys(VIEWS, weights), 1, CPU)
    assert [(each["method"], each["accuracy"]) for each in rows] == [
        (method, 0.0) for method in (RAW, UNTRAINED, *VIEWS)
    ]
    assert len(small.train_from_scratch(digits, 1, 1.0, CPU)) == 2
    assert asked == [True] * (5 + 2)


# The images


@pytest.mark.parametrize("name", [DIGITS, FASHION])
def test_no_test_image_is_among_the_training_images(name: str, fashion: Path) -> None:
    data = load(name, str(fashion))
    train, test = ({image.numpy().tobytes() for image in part.images} for part in (data.train, data.test))
    assert train.isdisjoint(test)
    assert len(data.bank.unique()) == len(data.bank) <= len(data.train.labels)


@pytest.mark.parametrize("method", [SCRATCH, AUGMENTED])
def test_training_is_blind_to_the_test_images(digits: DataSet, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test images the same weights come out, whose accuracy on them is another."""
    blank = digits._replace(test=Labelled(torch.zeros_like(digits.test.images), digits.test.labels))
    encoders: list[Any] = []

    def built(arch: str) -> Any:
        encoders.append(build_encoder(arch))
        return encoders[-1]

    monkeypatch.setattr(small, "build_encoder", built)
    one, other = (small.train(data, digits.labelled("1", 0), method, 0, 0.1, CPU) for data in (digits, blank))
    assert one["loss"] == other["loss"]
    assert one["accuracy"] != other["accuracy"]
    for left, right in zip(*(encoder.module.state_dict().values() for encoder in encoders), strict=True):
        assert left.equal(right)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("augmented", [True, False])
def test_every_encoder_sees_what_it_takes(name: str, augmented: bool, fashion: Path) -> None:
    images = load(name, str(fashion)).train.images[:40]
    before = images.clone()
    generator = torch.Generator().manual_seed(0)
    seen = small.augmented(name, images, generator) if augmented else small.plain(images)
    assert seen.shape == (40, *((1, 8, 8) if name == DIGITS else (3, 28, 28)))
    assert seen.dtype == torch.float32
    assert images.equal(before)
    assert build_encoder(STUDIES[name].arch).module(seen).isfinite().all()
    assert seen.flatten(1).std(dim=0).min() > 0 or name == DIGITS  # no two images became one


# The table


def test_mean_and_spread_are_over_seeds_and_draws_are_averaged_first() -> None:
    rows = [row(PRETRAINED, "1", seed, value) for seed, value in ((0, 80), (0, 90), (1, 91), (1, 91))]
    assert small.figures(rows)[DIGITS, PRETRAINED, "1"] == (88.0, pytest.approx(18**0.5))  # of 85 and 91, with n − 1
    assert small.figures(rows[:1])[DIGITS, PRETRAINED, "1"] == (80.0, None)


def test_markdown() -> None:
    rows = [row(RAW, KNN, seed, 97.7) for seed in (0, 1)]
    rows += [row(PRETRAINED, labels, seed, 90 + seed) for labels in (KNN, "1") for seed in (0, 1)]
    rows += [row(AUGMENTED, "1", seed, 60) for seed in (0, 1)]
    lines = small.markdown(results(rows)).splitlines()
    assert lines[:6] == [
        "|  | 10-NN | 1 a class |",
        "| --- | ---: | ---: |",
        "| **Digits** |  |  |",
        "| raw pixels | **97.7 ± 0.0** | – |",
        "| from scratch, augmented | – | 60.0 ± 0.0 |",
        "| pretrained encoder | 90.5 ± 0.7 | **90.5 ± 0.7** |",
    ]
    text = " ".join(lines[6:])
    assert "standard deviation over 2 seeds" in text
    assert "1,442 of 1,442" in text
    assert "1.5 minutes of one process on cpu, with torch 2.14" in text


def test_the_table_tells_what_each_way_of_pretraining_took() -> None:
    seconds = [(23, 25, 24.0), (24, 26, 25.0)]  # of two seeds
    pretraining = [
        {"task": DIGITS, "seed": seed, "method": method, "epochs": epochs, "seconds": taken}
        for seed, each in enumerate(seconds)
        for method, epochs, taken in zip(VIEWS, (25, 13, 11), each, strict=True)
    ]
    found = results([row(method, "10", 0, 90.0) for method in VIEWS]) | {"pretraining": pretraining}
    text = small.markdown(found)
    assert "| pretrained, 2 + 4 local crops | **90.0** |" in text
    assert "with 2 and 4 local crops: on digits 25 in 24 s, 13 in 26 s, 11 in 24 s. All of it" in text


def test_more_views_get_fewer_epochs_in_proportion() -> None:
    usual, twice = (evaluate_small.Settings(epochs=epochs) for epochs in (None, 50))
    assert [usual.epochs_of(DIGITS, method) for method in VIEWS] == [*evaluate_small.EPOCHS[DIGITS].values()]
    assert [twice.epochs_of(DIGITS, method) for method in VIEWS] == [50, 26, 22]
    assert [evaluate_small.Settings(epochs=1).epochs_of(FASHION, method) for method in VIEWS] == [1, 1, 1]


# The program


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert evaluate_small.main([str(flag) for flag in (*SHORT, "--out", out)]) == 0
    return out


@pytest.mark.slow
def test_results_are_complete(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert found["settings"]["seeds"] == 2
    assert {"device", "cores", "processes", "versions"} <= found["environment"].keys()
    assert found["data"] == {DIGITS: {"train": 1442, MOST: 1442, "test": 355}}
    assert all(job["seconds"] > 0 for job in found["jobs"].values())
    assert [each["method"] for each in found["pretraining"]] == [*VIEWS] * 2
    assert all(each["seconds"] > 0 for each in found["pretraining"])
    assert all(0 <= each["accuracy"] <= 100 for each in found["rows"])
    cells = Counter((each["method"], each["labels"]) for each in found["rows"])
    study = STUDIES[DIGITS]
    asked = [*product((RAW, UNTRAINED, *VIEWS), study.columns)]
    asked += [(method, column) for method, columns in study.scratch.items() for column in columns]
    counts = {cell: 2 * small.DRAWS.get(cell[1], 1) for cell in asked}
    assert cells == counts | {(RAW, column): 1 for column in (KNN, MOST)}  # the same for every seed
    assert (finished / "table.md").read_text() == small.markdown(found) + "\n"
    for name in ("digits-seed-0.log", "digits-seed-0/backbone.pt", "digits-seed-1-local-crops-4/curves.png"):
        assert (finished / name).exists()


@pytest.mark.slow
def test_a_finished_run_is_neither_repeated_nor_lost(finished: Path, run: Call) -> None:
    before = json.loads((finished / "results.json").read_text())
    status, output, errors = run(*SHORT, "--out", finished)
    assert (status, output) == (2, "")
    assert "holds another run" in errors
    assert json.loads((finished / "results.json").read_text()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "cifar"), "invalid choice 'cifar' for argument '--only'"),
        (("--data", "/nowhere"), "--data /nowhere: expected a folder with the four files"),
        (("--effort", "-1"), "--effort -1.0: expected a number ≥ 0"),
        (("--check", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_bad_flags_are_told_in_one_line(run: Call, flags: tuple[str, ...], message: str) -> None:
    status, _, errors = run(*flags)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_a_missing_data_set_is_told_with_its_remedy(run: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate_small, "INSTALLED", tmp_path / "absent")
    status, _, errors = run()
    assert status == 2
    assert "apt install dataset-fashion-mnist" in errors
    assert "--only digits" in errors


def test_without_flags_both_are_measured_with_three_seeds_the_longer_first(
    fashion: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(name: str, seed: int, *_: Any) -> tuple[str, Any]:
        return f"{name}-seed-{seed}", {"rows": [], "pretraining": [], "seconds": 1.0}

    monkeypatch.setattr(evaluate_small, "study", measured)
    monkeypatch.setattr(small, "markdown", str)
    assert run("--data", fashion, "--out", "out", "--processes", 1)[0] == 0
    expected = [f"{name}-seed-{seed}" for name in (FASHION, DIGITS) for seed in range(3)]
    assert [*json.loads(Path("out/results.json").read_text())["jobs"]] == expected


# docs/evaluation.md


def test_the_table_in_the_readme(tmp_path: Path, run: Call) -> None:
    found, path = tmp_path / "results.json", tmp_path / "evaluation.md"
    found.write_text(json.dumps(results([row(RAW, KNN, seed, 97.7) for seed in (0, 1)])))
    begin, end = (f"<!-- evaluation:{mark} -->" for mark in ("begin", "end"))
    path.write_text(f"# Before\n\n{begin}\nold\n{end}\n\nafter\n")
    status, _, errors = run("--check", found, "--page", path)
    assert (status, "has not what" in errors) == (2, True)
    assert run("--update", found, "--page", path)[0] == 0
    text = path.read_text()
    assert text.startswith(f"# Before\n\n{begin}\n|")
    assert text.endswith(f"{end}\n\nafter\n")
    assert run("--check", found, "--page", path)[0] == 0
    path.write_text("no marks")
    status, _, errors = run("--update", found, "--page", path)
    assert (status, "marks" in errors) == (2, True)


# The processes


def dies(name: str, *_: Any) -> None:
    os._exit(7)


def fails(name: str, *_: Any) -> None:
    raise Aborted("exit status 1 (see a.log)")


@pytest.mark.slow
@pytest.mark.parametrize(("study", "message"), [(dies, "a process has died"), (fails, "exit status 1 (see a.log)")])
def test_a_failing_part_ends_all_and_is_told(
    study: Any, message: str, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_small, "study", study)
    status, _, errors = run("--only", "digits", "--out", "out", "--processes", 2)
    assert status == 1
    assert errors.splitlines()[-1].startswith(f"error: {message}")
    assert not Path("out/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_program_and_processes(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "evaluate_small.py", *SHORT, "--epochs", 300, "--processes", 2, "--out", out]
    with start(command, tmp_path) as process:
        process.until(lambda: len([*out.glob("digits-seed-*/checkpoint.pt")]) == 2, "two checkpoints")
        process.send(number)
        assert process.wait() == 130
    assert process.errors.startswith("error: interrupted\n")
    assert not (out / "results.json").exists()
