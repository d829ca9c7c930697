"""The evaluation on the built-in data: fair to all methods, blind to the test images, told as it was measured."""

import gzip
import json
import multiprocessing
import os
import re
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
from barlow_recipes.command_line import read
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import Aborted
from barlow_recipes.pixels import MEAN, STD
from barlow_recipes.small import data as small_data
from barlow_recipes.small import methods, tables
from barlow_recipes.small.data import DIGITS, FASHION, KNN, MOST, TASKS, DataSet, Labelled, load
from barlow_recipes.small.jobs import Job, run_jobs
from barlow_recipes.small.methods import recipe_for, train_with_labels
from programs import start

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


def row(task: str, method: str, labels: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"task": task, "method": method, "labels": labels, "seed": seed, "draw": 0, "accuracy": accuracy} | more


def results(rows: list[dict[str, Any]], seeds: int = 2) -> dict[str, Any]:
    return {
        "settings": {"seeds": seeds, "epochs": {DIGITS: 30}},
        "environment": {"device": "cpu", "processes": 2, "threads": 1, "versions": {"torch": "2.14"}},
        "data": {DIGITS: {"train": 1442, MOST: 1442, "test": 355}},
        "seconds": 90.0,
        "rows": rows,
    }


# The labels


def test_labels_of_each_class() -> None:
    asked = [("1", 1442), ("10", 1442), ("1%", 60_000), ("10%", 60_000), ("1%", 200)]
    assert [small_data.labels_per_class(*each) for each in asked] == [1, 10, 60, 600, 1]


@pytest.mark.parametrize("column", ["1", "10"])
def test_a_draw_has_as_many_of_each_class_and_is_a_function_of_the_seed(digits: DataSet, column: str) -> None:
    numbers = digits.labelled(column, seed=3)
    assert digits.train.labels[numbers].bincount().tolist() == [int(column)] * 10
    assert numbers.equal(digits.labelled(column, seed=3))
    assert not numbers.equal(digits.labelled(column, seed=4))
    assert set(digits.labelled("1", 3).tolist()) <= set(numbers.tolist())  # more contain the fewer


def test_every_method_gets_the_same_labels(digits: DataSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Probes of three representations, training from scratch and fine-tuning: what each of them asks for."""
    weights, expected, asked = tmp_path / "backbone.pt", methods.draws(digits, "10", 1)[0], []
    torch.save(build_encoder("digits-cnn").module.state_dict(), weights)

    def fitted(features: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
        asked.append(labels.equal(digits.train.labels[expected]))
        return 0.0

    def trained(task: object, data: DataSet, numbers: Tensor, *_: object, **__: object) -> Any:
        asked.append(numbers.equal(expected))
        return {"accuracy": 0.0}

    monkeypatch.setattr(methods.probes, "linear_accuracy", fitted)
    monkeypatch.setattr(methods, "train_with_labels", trained)
    methods.probe(DIGITS, "", str(weights), ["10"], 1, "cpu")
    methods.supervise(DIGITS, "", None, "10", 1, 1.0, "cpu")
    methods.supervise(DIGITS, "", str(weights), "10", 1, 1.0, "cpu")
    assert asked == [True] * (3 + 2 + 1)


# The images


@pytest.mark.parametrize("name", [DIGITS, FASHION])
def test_no_test_image_is_among_the_training_images(name: str, fashion: Path) -> None:
    data = load(name, str(fashion))
    train, test = ({image.numpy().tobytes() for image in part.images} for part in (data.train, data.test))
    assert train.isdisjoint(test)
    assert len(data.bank.unique()) == len(data.bank) <= len(data.train.labels)


@pytest.mark.parametrize("augmented", [True, False])
def test_training_is_blind_to_the_test_images(digits: DataSet, augmented: bool) -> None:
    """With other test images the same weights come out, whose accuracy on them is another."""
    blank = digits._replace(test=Labelled(torch.zeros_like(digits.test.images), digits.test.labels))
    numbers, recipe = digits.labelled("1", 0), recipe_for(10, augmented=augmented, effort=0.1)
    trained, encoders = [], []
    for data in (digits, blank):
        torch.manual_seed(0)
        encoders.append(build_encoder("digits-cnn"))
        trained.append(
            train_with_labels(TASKS[DIGITS], data, numbers, encoders[-1], recipe, augmented=augmented, seed=0)
        )
    assert trained[0]["loss"] == trained[1]["loss"]
    assert trained[0]["accuracy"] != trained[1]["accuracy"]
    for left, right in zip(*(encoder.module.state_dict().values() for encoder in encoders), strict=True):
        assert left.equal(right)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("augmented", [True, False])
def test_every_task_shows_its_encoder_what_it_takes(name: str, augmented: bool, fashion: Path) -> None:
    task = TASKS[name]
    data = load(task.data, str(fashion))
    images = data.train.images[:40]
    before = images.clone()
    seen = task.augmented(images, torch.Generator().manual_seed(0)) if augmented else task.plain(images)
    shape = (1, 8, 8) if task.arch == "digits-cnn" else (3, 28, 28)
    assert seen.shape == (40, *shape)
    assert seen.dtype == torch.float32
    assert images.equal(before)
    assert build_encoder(task.arch).module(seen).isfinite().all()
    assert seen.flatten(1).std(dim=0).min() > 0 or task.data == DIGITS  # no two images became one


def test_a_digit_grown_and_shrunk_again_is_itself() -> None:
    """Grey in three channels, 28×28: undone by the way that Fashion-MNIST takes to 8×8, but for the smoothing."""
    flat = torch.full((2, 1, 8, 8), 0.5)
    grown = TASKS["fashion-mnist-to-digits"].plain(flat)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(grown * std + mean, torch.full((2, 3, 28, 28), 0.5))
    coloured = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    shrunk = TASKS["digits-to-fashion-mnist"].plain(coloured)
    torch.testing.assert_close(shrunk, torch.full((1, 1, 8, 8), 0.299))


# The table


def test_mean_and_spread_are_over_seeds_and_draws_are_averaged_first() -> None:
    """Of training with augmentation and without the better counts."""
    rows = [row(DIGITS, methods.PRETRAINED, "1", seed, value) for seed, value in ((0, 80), (0, 90), (1, 91), (1, 91))]
    figure = tables.summarize(rows)[DIGITS, methods.PRETRAINED, "1"]
    assert (figure.mean, figure.seeds, str(figure)) == (88.0, 2, "88.0 ± 4.2")  # √18: of 85 and 91, with n − 1
    assert str(tables.summarize(rows[:1])[DIGITS, methods.PRETRAINED, "1"]) == "80.0"
    tried = product((0, 1), (True, False))
    rows = [row(DIGITS, methods.SCRATCH, "10", seed, 90 + seed + with_, augmented=with_) for seed, with_ in tried]
    assert tables.summarize(rows)[DIGITS, methods.SCRATCH, "10"][::3] == (91.5, True)


def test_markdown() -> None:
    rows = [row(DIGITS, methods.RAW, KNN, seed, 97.7) for seed in (0, 1)]
    rows += [row(DIGITS, methods.PRETRAINED, labels, seed, 90 + seed) for labels in (KNN, "1") for seed in (0, 1)]
    rows += [row(DIGITS, methods.SCRATCH, "1", seed, 60, augmented=True) for seed in (0, 1)]
    lines = tables.markdown(results(rows)).splitlines()
    assert lines[:6] == [
        "|  | 10-NN | 1 a class |",
        "| --- | ---: | ---: |",
        "| **Digits** |  |  |",
        "| raw pixels | **97.7 ± 0.0** | – |",
        "| trained from scratch | – | 60.0 ± 0.0 |",
        "| pretrained encoder | 90.5 ± 0.7 | **90.5 ± 0.7** |",
    ]
    text = " ".join(lines[6:])
    assert "standard deviation over 2 seeds" in text
    assert "1,442 of 1,442" in text
    assert "torch 2.14" in text


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
    assert (found["complete"], found["settings"]["seeds"]) == (True, 2)
    assert {"device", "cores", "processes", "threads", "versions"} <= found["environment"].keys()
    assert found["data"] == {DIGITS: {"train": 1442, MOST: 1442, "test": 355}}
    assert all(job["seconds"] > 0 and job["cpu_seconds"] > 0 for job in found["jobs"].values())
    assert all(0 <= each["accuracy"] <= 100 for each in found["rows"])
    cells = Counter((each["method"], each["labels"], each.get("augmented")) for each in found["rows"])
    frozen = product((methods.RAW, methods.UNTRAINED, methods.PRETRAINED), TASKS[DIGITS].columns, [None])
    scratch = product([methods.SCRATCH], TASKS[DIGITS].trained, (True, False))
    counts = {key: 2 * methods.DRAWS.get(key[1], 1) for key in (*frozen, *scratch)}
    assert cells == counts | {(methods.RAW, column, None): 1 for column in (KNN, MOST)}  # the same for every seed
    assert (finished / "table.md").read_text() == tables.markdown(found) + "\n"
    for name in ("accuracies.png", "digits-seed-0/backbone.pt", "digits-seed-1/curves.png"):
        assert (finished / name).exists()


@pytest.mark.slow
def test_a_finished_run_is_neither_repeated_nor_lost(finished: Path, run: Call) -> None:
    before = json.loads((finished / "results.json").read_text())
    status, output, errors = run(*SHORT, "--out", finished)
    assert (status, output) == (2, "")
    assert "holds another run" in errors
    status, output, _ = run(*SHORT, "--out", finished, "--resume")
    assert status == 0
    assert "0 parts" in output
    after = json.loads((finished / "results.json").read_text())
    assert (after["rows"], after["jobs"]) == (before["rows"], before["jobs"])
    status, _, errors = run(*SHORT, "--out", finished, "--resume", "--seeds", 3)
    assert status == 2
    assert "seeds was 2 and is now 3" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "cifar"), "invalid choice 'cifar' for argument '--only'"),
        (("--labels", "5"), "invalid choice '5' for argument '--labels'"),
        (("--data", "/nowhere"), "--data /nowhere: expected a folder with the four files"),
        (("--effort", "-1"), "--effort -1.0: expected a number ≥ 0"),
        (("--resume", "--overwrite"), "--resume: expected it without --overwrite"),
        (("--only", "digits", "--labels", "1%"), "--labels 1%: expected some of the columns of digits"),
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
    monkeypatch.setattr(evaluate_small, "evaluate", lambda settings: print(*settings.only))
    status, output, _ = run()
    note, tasks = output.splitlines()
    assert status == 0
    assert "apt install dataset-fashion-mnist" in note
    assert tasks == "digits"
    status, _, errors = run("--only", "fashion-mnist")
    assert status == 2
    assert "apt install dataset-fashion-mnist" in errors


def test_fashion_mnist_in_a_folder(fashion: Path, tmp_path: Path) -> None:
    settings = evaluate_small.completed(read(evaluate_small.Settings, ["--data", str(fashion)], ""))
    assert settings.only == tuple(TASKS)
    jobs = {job.name: job for job in evaluate_small.plan_jobs(settings, tmp_path)}
    assert all(job.arguments["source"] == str(fashion) for job in jobs.values())
    assert {f"{data}/pretraining/{seed}" for data in (DIGITS, FASHION) for seed in range(3)} <= jobs.keys()
    assert all(job.waits == bool(job.arguments.get("weights")) for job in jobs.values())
    fine = methods.supervise(FASHION, str(fashion), None, "1%", 0, 0.01, "cpu")["rows"]
    assert [each["augmented"] for each in fine] == [True, False]


# README.md


def test_the_table_in_the_readme(tmp_path: Path, run: Call) -> None:
    found, path = tmp_path / "results.json", tmp_path / "README.md"
    found.write_text(json.dumps(results([row(DIGITS, methods.RAW, KNN, seed, 97.7) for seed in (0, 1)])))
    path.write_text(f"# Before\n\n{evaluate_small.BEGIN}\nold\n{evaluate_small.END}\n\nafter\n")
    status, _, errors = run("--check", found, "--readme", path)
    assert (status, "has not the table" in errors) == (2, True)
    assert run("--update", found, "--readme", path)[0] == 0
    text = path.read_text()
    assert text.startswith(f"# Before\n\n{evaluate_small.BEGIN}\n|")
    assert text.endswith(f"{evaluate_small.END}\n\nafter\n")
    assert run("--check", found, "--readme", path)[0] == 0
    path.write_text("no markers")
    status, _, errors = run("--update", found, "--readme", path)
    assert (status, "markers" in errors) == (2, True)


# The processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("bad", json.loads, {"s": "nothing"}), "bad: JSONDecodeError: Expecting value: line 1 column 1 (char 0) ("),
        (Job("dead", os._exit, {"status": 7}), "a process has died"),
    ],
)
def test_a_failing_job_ends_all_and_is_told(job: Job, message: str, tmp_path: Path) -> None:
    with pytest.raises(Aborted, match=re.escape(message)):
        list(run_jobs([Job("long", signal.pause, {}), job], 2, 1, tmp_path))  # which by itself would wait for ever
    assert not multiprocessing.active_children()
    if job.name == "bad":
        assert any("Traceback" in log.read_text() for log in tmp_path.glob("process-*.log"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_program_and_processes_and_the_run_can_go_on(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "evaluate_small.py", *SHORT, "--epochs", 300, "--processes", 2, "--out", out]
    with start(command, tmp_path) as process:
        process.until(lambda: len([*out.glob("digits-seed-*/checkpoint.pt")]) == 2, "two checkpoints")
        process.send(number)
        assert process.wait() == 130
    assert "--resume" in process.errors
    steps = {path.parent.name: torch.load(path)["step"] for path in out.glob("digits-seed-*/checkpoint.pt")}
    assert len(steps) == 2
    assert all(step > 0 for step in steps.values())
    assert json.loads((out / "results.json").read_text())["complete"] is False
