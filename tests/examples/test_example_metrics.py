"""Metrics survive a resume, a crash and a full disk; TensorBoard and Weights & Biases get the same numbers."""

import contextlib
import json
import math
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.metrics import Metrics, TensorBoard, WeightsAndBiases


class Kept(list[tuple[str, dict[str, Any]]]):
    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.append((kind, row))


def test_metrics_are_json_lines_and_mirrors_get_the_same(tmp_path: Path) -> None:
    mirrors = [Kept(), Kept()]
    metrics = Metrics(tmp_path, mirrors=mirrors)
    metrics.add("step", {"step": 1, "loss": math.inf})
    metrics.add("event", {"step": 2, "text": "a fallback"})
    expected = [("step", {"step": 1, "loss": None}), ("event", {"step": 2, "text": "a fallback"})]
    assert mirrors == [expected, expected]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == metrics.rows == [{"kind": kind, **row} for kind, row in expected]
    assert metrics.of_kind("event") == rows[1:]


def test_a_resumed_run_keeps_its_history_and_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for kind in ("settings", "step", "epoch", "profile", "event", "evaluation", "report"):
        metrics.add(kind, {"step": 3})
    metrics.add("step", {"step": 4})
    others = ["5", "null", "[]", '{"kind": "step"}', '{"kind": "step", "step": "3"}', '{"step": 1}', "{half"]
    with (tmp_path / "metrics.jsonl").open("a") as file:  # lines that are not a run's; then the power went
        file.write("\n".join(others))
    resumed = Metrics(tmp_path, resumed=tmp_path / "checkpoint.previous.pt", step=3)
    resumed.add("step", {"step": 4, "loss": 3.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == resumed.rows
    kept = [(kind, 3) for kind in ("step", "epoch", "profile", "event")]
    assert [(row["kind"], row["step"]) for row in rows] == [*kept, ("step", 4)]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 200 bytes. Not a fixture: pytest, too, writes before it ends one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_the_run_and_not_its_history(tmp_path: Path) -> None:
    with full_disk():
        metrics = Metrics(tmp_path)
        for step in (0, 1, 2):
            metrics.add("step", {"step": step, "loss": 1 / 3})
        with pytest.raises(Aborted, match=r"cannot write .*metrics.jsonl: File too large"):
            metrics.add("step", {"step": 3, "loss": 1 / 3})
        for _ in range(2):  # also of what was then written again
            kept = Metrics(tmp_path, resumed=tmp_path / "checkpoint.pt", step=3).rows
            assert [row["step"] for row in kept] == [0, 1, 2]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: values for tag, values in found.items() if values}


def test_tensorboard_shows_the_metrics_and_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "tensorboard"
    metrics = Metrics(None, mirrors=[TensorBoard(tmp_path)])
    metrics.add("settings", {"seed": 0})
    for step in (1, 11, 21, 31):
        metrics.add("step", {"step": step, "loss": math.nan if step == 11 else float(step), "dead_features": 3})
    metrics.add("epoch", {"step": 31, "epoch": 1, "knn": 50.5})
    assert scalars(folder)["step/loss"] == [(1, 1), (21, 21), (31, 31)]

    resumed = Metrics(None, mirrors=[TensorBoard(tmp_path, resumed_step=21)])
    for step in (31, 41):
        resumed.add("step", {"step": step, "loss": -float(step), "dead_features": 3})
    resumed.add("evaluation", {"step": 41, "representation": "raw pixels", "knn": 97.75})
    resumed.add("event", {"step": 41, "text": "all is well"})
    assert scalars(folder) == {
        "step/loss": [(1, 1), (21, 21), (31, -31), (41, -41)],
        "step/dead_features": [(1, 3), (11, 3), (21, 3), (31, 3), (41, 3)],
        "evaluation/raw pixels/knn": [(41, 97.75)],
    }


def sent(run: Path) -> Iterator[Any]:
    """The records of a W&B run that is kept offline: blocks as of LevelDB's log, each small record in one piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    data, at = path.read_bytes(), 7  # after the file's own head
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1
        yield Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


def history(run: Path) -> list[dict[str, Any]]:
    """The rows of numbers, without what W&B itself adds."""
    rows = [record.history.item for record in sent(run) if record.WhichOneof("record_type") == "history"]
    named = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if "/" in name or name == "_step"} for row in named]


@pytest.mark.slow
def test_weights_and_biases_offline_gets_the_numbers_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    ids, runs = [], []
    for resumed_step in (None, 11, None):
        mirror = WeightsAndBiases(tmp_path, resumed_step)
        metrics = Metrics(None, mirrors=[mirror])
        metrics.add("settings", {"seed": 5, "command": ["--wandb"]})
        for step in (1, 11) if resumed_step is None else (21,):
            metrics.add("step", {"step": step, "loss": math.nan if step == 11 else float(step), "dead_features": 3})
            metrics.add("event", {"step": step, "text": "all is well"})
        metrics.add("evaluation", {"step": step, "representation": "raw pixels", "knn": 97.75})
        assert mirror.run.config["seed"] == 5
        mirror.run.finish()
        ids.append((tmp_path / "wandb.id").read_text())
        runs.append((tmp_path / "wandb" / "latest-run").resolve())
        assert ids[-1] == mirror.run.id
    assert ids[0] == ids[1] != ids[2]  # resumed, and a new run in the same folder
    assert history(runs[0]) == [
        {"_step": 1, "step/loss": 1.0, "step/dead_features": 3},
        {"_step": 11, "step/dead_features": 3, "evaluation/raw pixels/knn": 97.75},
    ]


@pytest.mark.parametrize(("module", "mirror"), [("tensorboard", TensorBoard), ("wandb", WeightsAndBiases)])
def test_a_missing_package_is_named_with_the_remedy(
    module: str, mirror: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"--{module} needs {module}.*pip install --group scale"):
        mirror(tmp_path)


def test_without_an_account_wandb_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match=r"^--wandb: No API key configured.*WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path)
    assert not (tmp_path / "wandb.id").exists()
