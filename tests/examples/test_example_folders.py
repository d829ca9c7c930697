"""Opening a run's folder: what a program finds there, what it refuses, and what it leaves for the next one."""

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from outcomes import rows

from barlow_recipes import checkpoint, command_line, folders
from barlow_recipes.command_line import Positive, RunSettings
from barlow_recipes.errors import UsageError
from barlow_recipes.outputs import BACKBONE

PARTS = {"settings", "step"}


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    epochs: Positive = 3
    "passes"


def settings(*flags: object) -> Settings:
    return command_line.read(Settings, ["--device", "cpu", *map(str, flags)], "")


def train(given: Settings, step: int, **more: Any) -> Path:
    """A run as programs are: it goes on from a checkpoint, counts to the step and saves."""
    must_match, default = {"epochs": given.epochs}, Path("runs/counting")
    saved = folders.load(folders.find(given, default), PARTS)
    with folders.opened(given, default, must_match, saved, **more) as (out, metrics):
        for number in range(saved.content["step"] if saved else 0, step):
            metrics.add("epoch", {"step": number + 1})
            content = {"settings": must_match, "step": number + 1}
            checkpoint.save(out / "checkpoint.pt", content, keep_previous=True)
    return out


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_goes_on_with_its_history_and_its_settings() -> None:
    out = train(settings("--epochs", 5), 2)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "epoch", "step": 3}) + "\n")  # of an epoch that was not saved
    again = settings("--settings", out / "settings.yaml", "--resume")
    assert again.epochs == 5
    assert train(again, 4) == out
    assert [row["step"] for row in rows(out, "epoch")] == [1, 2, 3, 4]
    assert [row["epochs"] for row in rows(out, "settings")] == [5]
    assert "resume" not in yaml.safe_load((out / "settings.yaml").read_text())


def test_a_damaged_checkpoint_is_told_and_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    out = train(settings(), 2)
    (out / "checkpoint.pt").write_bytes(b"broken")
    train(settings("--resume"), 2)
    output, errors = capsys.readouterr()
    assert f"continuing from {out}/checkpoint.previous.pt, after step 1" in output
    assert f"warning: {out}/checkpoint.pt is damaged or missing" in errors
    assert "damaged" in rows(out, "event")[0]["text"]  # type: ignore[operator]
    assert (out / "checkpoint.damaged.pt").read_bytes() == b"broken"
    assert checkpoint.read(out / "checkpoint.pt")["step"] == 2


def test_another_run_is_refused_or_numbered_or_replaced() -> None:
    assert [train(settings(), 1) for _ in range(2)] == [Path("runs/counting"), Path("runs/counting-2")]
    with pytest.raises(UsageError, match="holds another run"):
        train(settings("--out", "runs/counting"), 1)
    Path("runs/counting/classifier-linear.safetensors").write_text("another's")
    Path("runs/counting/mine.txt").write_text("mine")
    train(settings("--out", "runs/counting", "--overwrite"), 1)
    assert not Path("runs/counting/classifier-linear.safetensors").exists()
    assert Path("runs/counting/mine.txt").exists()


def test_what_was_begun_under_other_settings_is_refused() -> None:
    train(settings(), 1)
    with pytest.raises(UsageError, match="epochs was 3 and is now 4"):
        train(settings("--epochs", 4, "--resume"), 1)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew() -> None:
    """Unless it has ended for good, which its last file says."""
    out = train(settings("--out", "out"), 0)
    assert train(settings("--out", "out", "--resume"), 0) == out
    (out / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="holds another run"):
        train(settings("--out", "out", "--resume"), 0)
    train(settings("--out", "out", "--resume"), 0, finished=BACKBONE)


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_run_of_another_program_is_not_overwritten(flag: str) -> None:
    """Known by its flags."""
    out = train(settings("--out", "out"), 0)
    with (out / "settings.yaml").open("a") as file:
        file.write("projector: 64-64\n")
    with pytest.raises(UsageError, match="--out out: holds a run of another program"):
        train(settings("--out", "out", flag), 1)


def test_a_checkpoint_of_another_program_is_refused() -> None:
    out = train(settings("--out", "out"), 1)
    with pytest.raises(UsageError, match="not a checkpoint of this program"):
        folders.load(out / "checkpoint.pt", {"results", "step"})


def test_one_run_at_a_time() -> None:
    fork = multiprocessing.get_context("fork")
    busy = pytest.raises(UsageError, match="--out out: another run is writing there")
    with folders.opened(settings("--out", "out"), Path("x"), {}), fork.Pool(1) as pool, busy:
        pool.apply(train, (settings("--out", "out", "--overwrite"), 1))
