"""The program end to end: both kinds of data, resume, Ctrl-C, and one line for everything that can go wrong."""

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from outcomes import EXAMPLES, FILES, SHORT_DIGITS, SMALL_CNN, SMALL_RESNET, differences, rows, states

import imagenet_pretrain
from barlow_recipes import checkpoint, reporting
from barlow_recipes.settings import read_settings
from programs import Nursery
from programs import run as run_program

Run = Callable[..., tuple[int, str, str]]
PROGRAM = EXAMPLES / "imagenet_pretrain.py"


@pytest.mark.slow
def test_the_command_without_torchvision_and_tensorboard_pretrains_on_digits(tmp_path: Path) -> None:
    """A new interpreter, in which neither can be imported."""
    block = "import runpy, sys; sys.modules.update(torchvision=None, tensorboard=None); sys.argv = sys.argv[1:]; "
    program = f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = run_program([sys.executable, "-c", block + program, PROGRAM, *SHORT_DIGITS, "--probe-every", 1], tmp_path)
    assert done.status == 0, done.errors
    assert done.output.splitlines()[-1].endswith("Results: runs/digits")
    assert {path.name for path in (tmp_path / "runs" / "digits").iterdir()} == FILES
    for label in ("raw pixels", "untrained encoder", "pretrained encoder", "epoch 1/2", "epoch 2/2"):
        assert label in done.output


@pytest.mark.slow
def test_a_short_run_learns_and_says_so(run: Run) -> None:
    """A quarter of the demo. Its promise, 15 points above untrained and 8 above pixels, is kept by then."""
    status, output, _ = run("--epochs", 15, "--out", "short")
    assert status == 0
    out = Path("short")
    assert {path.name for path in out.iterdir()} == FILES
    steps = rows(out, "step")
    assert [row["step"] for row in steps] == [*range(1, 151, 10), 150]
    for row in steps:
        assert row["loss"] == pytest.approx(row["on_diagonal"] + 0.0051 * row["off_diagonal"], rel=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    accuracy = {row["representation"]: row["linear_1"] for row in rows(out, "evaluation")}
    assert accuracy["pretrained encoder"] > accuracy["untrained encoder"] + 15
    assert accuracy["pretrained encoder"] > accuracy["raw pixels"] + 8
    printed = re.search(r"pretrained encoder +\S+ % +(\S+) %", output)
    assert printed
    assert float(printed[1]) == pytest.approx(accuracy["pretrained encoder"], abs=0.05)


@pytest.mark.usefixtures("few_looks")
def test_a_run_resumed_twice_ends_with_the_same_bits(run: Run) -> None:
    """After an epoch of ten steps, and in the middle of the next one."""
    assert run(*SHORT_DIGITS, "--out", "whole")[0] == 0
    assert run(*SHORT_DIGITS, "--out", "parts", "--limit-steps", 10)[0] == 0
    assert run(*SHORT_DIGITS, "--out", "parts", "--limit-steps", 13, "--resume")[0] == 0
    assert states("parts")[0]["step"] == 13
    measured = rows(Path("parts"), "baseline")
    assert len(measured) == 4  # of both probes, pixels and initial weights; not measured again
    assert run(*SHORT_DIGITS, "--resume", "parts/checkpoint.pt")[0] == 0
    assert differences(*states("whole", "parts")) == []
    assert rows(Path("whole"), "evaluation") == rows(Path("parts"), "evaluation")
    assert rows(Path("whole"), "baseline") == rows(Path("parts"), "baseline") == measured
    logged = {row["step"]: row["loss"] for row in rows(Path("whole"), "step")}
    assert set(logged) == {1, 11, 20}
    assert {row["step"]: row["loss"] for row in rows(Path("parts"), "step") if row["step"] in logged} == logged


@pytest.mark.usefixtures("few_looks")
@pytest.mark.slow
def test_a_run_on_jpegs_survives_a_broken_file_and_resumes(run: Run, jpegs: Path) -> None:
    status, output, _ = run("--data", jpegs, *SMALL_RESNET, "--out", "whole")
    assert status == 0
    assert "1 unreadable image" in output
    assert [row["unreadable"] for row in rows(Path("whole"), "epoch")] == [1, 1]
    assert {row["representation"] for row in rows(Path("whole"), "evaluation")} == {
        "raw pixels", "untrained encoder", "pretrained encoder"
    }  # fmt: skip
    backbone = torch.load("whole/backbone.pt", weights_only=True)
    keys = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])

    assert run("--data", jpegs, *SMALL_RESNET, "--out", "parts", "--limit-steps", 4)[0] == 0
    assert run("--data", jpegs, *SMALL_RESNET, "--resume", "parts/checkpoint.pt")[0] == 0
    assert differences(*states("whole", "parts")) == []


MORE = ("--views", "3", "--local-crops", "2", "--local-size", "16")
WAYS: dict[str, tuple[str, ...]] = {
    "colours on the device": ("--augment-on", "device", *MORE),
    "in chunks and parts": ("--chunk-size", "2", "--channels-last", "--accumulate", "2", *MORE),
    "the preset for CIFAR, TensorBoard": ("--preset", "cifar", "--tensorboard"),
}


@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_images_in_every_way(flags: tuple[str, ...], run: Run, jpegs: Path) -> None:
    """Two epochs of four steps, at once and in two parts."""
    common = ("--data", jpegs, *SMALL_CNN, "--no-probe", *flags)
    assert run(*common, "--out", "whole")[0] == 0
    assert run(*common, "--out", "parts", "--limit-steps", 5)[0] == 0
    assert run(*common, "--out", "parts", "--resume")[0] == 0
    assert differences(*states("whole", "parts")) == []
    assert all(row["loss"] for row in rows(Path("whole"), "step"))
    events = list(Path("parts").glob("tensorboard/events.out.tfevents.*"))
    assert len(events) == (2 if "--tensorboard" in flags else 0)


@pytest.mark.usefixtures("few_looks")
@pytest.mark.usefixtures("few_looks")
def test_a_slow_precision_is_told_before_the_first_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "An old one"})
    status, output, _ = run(*SHORT_DIGITS, "--limit-steps", 1, "--precision", "bf16")
    assert status == 0
    note = "note: --precision bf16 can be several times slower than fp32 here: this processor (An old one) has no"
    assert [line.startswith(note) for line in output.splitlines()[:3]] == [False, False, True]


def test_an_incompatible_resume_names_the_difference(run: Run) -> None:
    assert run(*SHORT_DIGITS, "--out", "first", "--limit-steps", 1)[0] == 0
    status, _, errors = run(*SHORT_DIGITS, "--projector", "32-32", "--resume", "first")
    assert status == 2
    assert errors == (
        "error: --resume first/checkpoint.pt: projector was 64-64 and is now 32-32. Give the same, or begin a new run\n"
    )
    assert differences(*states("first", "first")) == []


@pytest.mark.usefixtures("few_looks")
def test_a_checkpoint_of_before_there_were_more_views_goes_on_with_two(run: Run) -> None:
    assert run(*SHORT_DIGITS, "--out", "first", "--limit-steps", 1)[0] == 0
    (state,) = states("first")
    new = {"views", "local_crops", "local_size", "local_crop_scale"}
    settings = {name: value for name, value in state["settings"].items() if name not in new}  # type: ignore[attr-defined]
    checkpoint.save(Path("first/checkpoint.pt"), state | {"settings": settings})
    status, _, errors = run(*SHORT_DIGITS, "--views", 3, "--resume", "first")
    assert (status, "views was 2 and is now 3" in errors) == (2, True)
    assert run(*SHORT_DIGITS, "--resume", "first", "--limit-steps", 2)[0] == 0


@pytest.mark.usefixtures("few_looks")
def test_a_second_run_gets_its_own_folder(run: Run) -> None:
    """The first one died before its first checkpoint, and is begun again."""
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/metrics.jsonl").touch()
    for number, flags in {"digits": ["--resume"], "digits-2": []}.items():
        status, output, _ = run(*SHORT_DIGITS, "--limit-steps", 1, *flags)
        assert status == 0
        assert output.splitlines()[-1].endswith(f"Results: runs/{number}")
    assert run(*SHORT_DIGITS, "--limit-steps", 1, "--out", "runs/digits")[0] == 2


@pytest.mark.usefixtures("few_looks")
def test_the_result_of_a_run_whose_checkpoints_were_removed_is_kept(run: Run) -> None:
    """The same command again, as a scheduler would give it."""
    assert run(*SHORT_DIGITS, "--limit-steps", 1, "--out", "out", "--resume")[0] == 0
    for path in Path("out").glob("checkpoint*.pt"):
        path.unlink()
    before = Path("out/backbone.pt").read_bytes()
    status, _, errors = run(*SHORT_DIGITS, "--limit-steps", 1, "--out", "out", "--resume")
    assert status == 2
    assert "--out out: holds another run" in errors
    assert Path("out/backbone.pt").read_bytes() == before


def test_a_kill_while_looking_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch is saved before it is looked at."""

    def killed(*_: object) -> None:
        raise MemoryError("as if killed")

    monkeypatch.setattr(reporting, "accuracies", killed)
    with pytest.raises(MemoryError):
        run(*SHORT_DIGITS, "--probe-every", 1, "--out", "out")
    assert states("out")[0]["step"] == 10
    assert "as if killed" in Path("out/report.html").read_text()


@pytest.mark.usefixtures("few_looks")
def test_a_loss_that_is_not_finite_is_not_applied_and_ends_the_run(run: Run) -> None:
    status, _, errors = run(*SHORT_DIGITS, "--learning-rate-weights", 1e30, "--warmup-epochs", 0, "--out", "out")
    assert status == 1
    assert errors.startswith("error: the loss or its gradient was not finite in 5 steps in a row")
    assert errors.endswith("no checkpoint had been written\n")
    assert errors.count("\n") == 1


def test_a_run_on_broken_images_alone_does_not_begin(run: Run, tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "data" / "all" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff")
    status, _, errors = run("--data", tmp_path / "data", *SMALL_RESNET)
    assert status == 2
    assert "of 12 images that were tried, none can be read: " in errors
    assert "0.jpg is not a readable image: " in errors
    assert errors.count("\n") == 1


USAGE = {
    "an unknown flag": ("--bogus", "Unrecognized options: --bogus"),
    "an abbreviated flag": ("--epoch 3", "Unrecognized options: --epoch, 3"),
    "no epochs": ("--epochs 0", "--epochs 0: expected a whole number ≥ 1"),
    "a word for a number": ("--lambd much", "Error parsing --lambd: could not convert string to float: 'much'"),
    "not a number": ("--weight-decay nan", "--weight-decay nan: expected finite numbers"),
    "an unknown optimizer": ("--optimizer adam", "invalid choice 'adam' for argument '--optimizer'"),
    "an unknown precision": ("--precision fp8", "invalid choice 'fp8' for argument '--precision'"),
    "an unknown device": ("--device abacus", "--device: Expected one of cpu, cuda"),
    "a crooked projector": ("--projector 1-2-3", "--projector 1-2-3: expected widths such as"),
    "a ResNet for digits": ("--arch resnet18", "--arch resnet18: digits-cnn goes with the digits"),
    "an unknown encoder": (
        "--data . --arch abacus",
        "--arch abacus: expected digits-cnn, small-cnn, a classifier of torchvision",
    ),
    "no folder": ("--data nowhere", "--data nowhere: no such file or folder"),
    "a batch beyond the data": ("--batch-size 5000", "--batch-size 5000 is more than the 1302 images"),
    "a missing checkpoint": ("--resume nowhere.pt", "--resume nowhere.pt: no such file"),
}


@pytest.mark.parametrize(("flags", "message"), USAGE.values(), ids=USAGE)
def test_a_mistake_gets_one_line(flags: str, message: str, run: Run) -> None:
    status, output, errors = run(*flags.split())
    assert (status, output) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_missing_package_gets_the_line_that_installs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    status, _, errors = run("--data", ".")
    assert status == 2
    assert "needs torchvision" in errors
    assert "pip install --group examples in a clone of barlow-loss" in errors


def test_a_process_that_nobody_numbered_is_told_how_to_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    status, output, errors = run()
    assert (status, output) == (2, "")
    assert errors.startswith("error: WORLD_SIZE is 2, but the processes do not find each other (")
    assert errors.endswith("RANK expected, but not set): start them with torchrun\n")


def test_the_line_of_an_error_is_one_write(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that fail together share a stream; under PYTHONUNBUFFERED each write of theirs reaches it alone."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    assert run("--data", "nowhere")[0] == 2
    (line,) = written
    assert re.fullmatch("error: .*nowhere.*\n", line)


SIGNALS = [
    (signal.SIGTERM, 143),
    *(pytest.param(number, 128 + number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1)),
]


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_saved(
    number: signal.Signals, status: int, tmp_path: Path, nursery: Nursery
) -> None:
    with nursery.start([PROGRAM, "--no-probe", "--probe-every", 1, "--out", "out"], tmp_path) as process:
        process.until(lambda: "epoch 1/" in process.output, "the end of an epoch")
        process.send(number)
        assert process.wait() == status
    told = re.fullmatch(
        rf"error: stopped by {number.name} after step (\d+), saved in out/checkpoint.pt: continue with --resume\n",
        process.errors,
    )
    assert told
    assert states(tmp_path / "out")[0]["step"] == int(told[1]) > 10
    assert f"stopped by {number.name}" in (tmp_path / "out" / "report.html").read_text()


def test_a_second_run_does_not_write_where_the_first_one_does(tmp_path: Path, nursery: Nursery) -> None:
    with nursery.start([PROGRAM, "--no-probe", "--out", "out"], tmp_path) as first:
        first.until((tmp_path / "out" / "metrics.jsonl").exists, "its first line")
        with nursery.start([PROGRAM, "--out", "out", "--resume", "--no-probe"], tmp_path) as second:
            assert second.wait() == 2
        assert second.errors == "error: --out out: another run is writing there. Wait for its end, or end it\n"
        assert first.status is None


@pytest.mark.slow
def test_the_quickstart_learns(capsys: pytest.CaptureFixture[str]) -> None:
    from quickstart import main

    main()
    untrained, trained = map(int, re.findall(r"(\d+)% (?:un)?trained", capsys.readouterr().out))
    assert trained > untrained + 30


def test_the_settings_of_a_preset_can_be_seen_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(tmp_path), "--preset", "cifar", "--epochs", "7"]
    assert imagenet_pretrain.main([*flags, "--show-settings"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate_weights: 0.3\n" in shown
    file = tmp_path / "settings.yaml"
    file.write_text(shown)
    assert read_settings(["--settings", str(file)], "") == read_settings(flags, "")
