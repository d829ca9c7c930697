"""No run overwrites another, metrics survive a resume, tables line up, pictures are drawn."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretraining import pictures, reporting
from pretraining.errors import UsageError
from pretraining.reporting import Metrics, accuracy_table, find_checkpoint, make_output_folder


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    default = tmp_path / "runs" / "digits"
    made = [make_output_folder(None, default, overwrite=False, resumed=None) for _ in range(3)]
    assert [folder.name for folder in made] == ["digits", "digits-2", "digits-3"]
    assert make_output_folder(None, default, overwrite=True, resumed=None) == default


def test_a_run_is_overwritten_on_demand_only_and_other_files_never(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=None) == tmp_path
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="holds another run"):
        make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=None)
    make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=tmp_path / "checkpoint.pt")
    assert (tmp_path / "metrics.jsonl").exists()
    make_output_folder(tmp_path, tmp_path / "unused", overwrite=True, resumed=None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*file.out: cannot be written \(Not a directory\)"):
        make_output_folder(tmp_path / "file" / "out", tmp_path, overwrite=False, resumed=None)


def test_resume_finds_the_newest_checkpoint(tmp_path: Path) -> None:
    default = tmp_path / "digits"
    assert find_checkpoint(None, None, default) is None
    assert find_checkpoint("auto", None, default) is None
    for name in ("digits", "digits-2", "digits-3"):
        (tmp_path / name).mkdir()
    for name in ("digits", "digits-2"):
        (tmp_path / name / "checkpoint.pt").touch()
    assert find_checkpoint("auto", None, default) == tmp_path / "digits-2" / "checkpoint.pt"
    assert find_checkpoint("auto", default, default) == default / "checkpoint.pt"
    assert find_checkpoint(str(default), None, default) == default / "checkpoint.pt"
    assert find_checkpoint("some/where.pt", None, default) == Path("some/where.pt")


def test_metrics_are_json_lines_and_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.add("settings", {"seed": 0})
    for step in (1, 11, 21):
        metrics.add("step", {"step": step, "loss": math.nan if step == 11 else 2.0})
    with metrics.path.open("a") as file:
        file.write('{"kind": "step", "st')  # the power went
    resumed = Metrics(tmp_path, resumed=tmp_path / "checkpoint.pt", step=15)
    resumed.add("step", {"step": 21, "loss": 3.0})
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert rows == resumed.rows == resumed.of_kind("step")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (11, None), (21, 3.0)]


def test_the_table_lines_up() -> None:
    table = accuracy_table({"raw pixels": {"knn": 9.5, "linear_1": 100.0}, "encoder": {"knn": 98.25, "linear_1": 3.0}})
    assert table.splitlines() == [
        "             10-NN  1 label/class",
        "─────────────────────────────────",
        "raw pixels   9.5 %        100.0 %",
        "encoder     98.2 %          3.0 %",
    ]


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(maxcolors=2**24) or [])


@pytest.mark.parametrize("looks", [True, False])
def test_curves_are_drawn_also_with_gaps_and_without_a_probe(looks: bool, tmp_path: Path) -> None:
    names = ("loss", "on_diagonal", "off_diagonal", "effective_rank")
    steps = [{"step": step} | dict.fromkeys(names, None if step == 21 else 100.0 - step) for step in range(1, 60, 10)]
    epochs = [{"step": step} | ({"knn": 50.0, "linear_1": 40.0} if looks else {}) for step in (20, 40)]
    path = tmp_path / "curves.png"
    baselines = {"raw pixels": {"linear_1": 20.0}, "untrained encoder": {"linear_1": 10.0}} if looks else {}
    for rows in (steps, []):
        pictures.draw_curves(
            path, rows, epochs, lambd=0.005, noise_floor=1000.0, attainable_rank=99, baselines=baselines
        )
        assert colours(path) > 50


def test_the_cross_correlation_is_drawn_on_one_scale(tmp_path: Path) -> None:
    path = tmp_path / "cross_correlation.png"
    pictures.draw_cross_correlation(path, torch.zeros(16, 16), torch.eye(16))
    assert colours(path) > 200
    with Image.open(path) as image:
        assert image.width > image.height > 500
    assert reporting.PICTURES == ("curves.png", "cross_correlation.png")
