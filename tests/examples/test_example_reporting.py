"""No run overwrites another, metrics survive a resume, tables and bars fit, pictures are drawn, TensorBoard reads."""

import contextlib
import fcntl
import json
import math
import os
import resource
import struct
import termios
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from barlow_recipes import pictures, reporting
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.reporting import (
    Metrics,
    accuracy_table,
    clear,
    epoch_line,
    find_checkpoint,
    label_of,
    make_output_folder,
    progress,
    replacing,
)


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
    assert (tmp_path / "metrics.jsonl").exists()  # until the folder is locked
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "report.html",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "checkpoint.damaged.pt",
        "backbone.pt",
        "curves.png",
        "cross_correlation.png",
        "tensorboard/events.out.tfevents.1.host.2.3",
    ],
)
def test_every_file_of_a_run_is_known(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UsageError, match="holds another run"):
        make_output_folder(tmp_path, tmp_path, overwrite=False, resumed=None)
    clear(make_output_folder(tmp_path, tmp_path, overwrite=True, resumed=None))
    assert not path.exists()


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
    (tmp_path / "digits-3" / "checkpoint.previous.pt").touch()  # the run was killed between two renamings
    for out in (None, tmp_path / "digits-3"):
        assert find_checkpoint("auto", out, default) == tmp_path / "digits-3" / "checkpoint.pt"


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


def test_a_table_with_gaps_and_any_number_of_labels() -> None:
    table = accuracy_table({"raw pixels": {"knn": 9.5}, "encoder": {"knn": 1.0, "linear_10": 2.0, "linear_all": 3.0}})
    assert [line.split() for line in table.splitlines()[::2]] == [
        ["10-NN", "10", "labels/class", "all", "labels"],
        ["raw", "pixels", "9.5", "%", "–", "–"],
    ]
    assert [label_of(name) for name in ("linear_1", "linear_2")] == ["1 label/class", "2 labels/class"]


def test_the_line_of_an_epoch() -> None:
    row: dict[str, Any] = {"kind": "epoch", "step": 7, "epoch": 3, "unreadable": 2, "images_per_second": 1234.5}
    row |= {"knn": 50.04, "linear_all": 60.0, "unreadable_in_probe": 1}
    assert (
        epoch_line(row, 9) == "epoch 3/9: 10-NN 50.0 %, all labels 60.0 %, 1,234 images/s, 2 unreadable images replaced"
    )


STEPS = {
    "of digits": (200, 134.0657, 54.5682, 15587.7, 27.1487, 3122.9, "134.1", "54.57", "15.59k", "27.15"),
    "of ImageNet": (5_004_000, 1342.4, 8191.9, 67_100_000.0, 254.31, 12_345.0, "1342", "8192", "67.1M", "254.3"),
    "at collapse": (5_004_000, 134_567.0, 32_768.0, 1.2345e9, 1.0, 12_345.0, "134.6k", "32.77k", "1.234G", "1"),
    "not finite": (200, math.nan, math.nan, math.nan, math.nan, 0.0, "nan", "nan", "nan", "nan"),
}


def read(screen: int) -> str:
    """All that a terminal has been sent, once nobody has it open for writing."""
    pieces = []
    with contextlib.suppress(OSError):  # Linux says so at the end
        while piece := os.read(screen, 65536):
            pieces.append(piece)
    os.close(screen)
    return b"".join(pieces).decode()


@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_the_progress_bar_fits_a_terminal_of_100_columns(row: tuple[Any, ...]) -> None:
    """tqdm's own output, in a terminal; 5,004,000 steps are 1,000 epochs of ImageNet in batches of 256."""
    total, *values, loss, on_diagonal, off_diagonal, rank = row
    names = ("loss", "on_diagonal", "off_diagonal", "effective_rank", "images_per_second")
    says = progress(dict(zip(names, values, strict=True)))
    parts = [f"loss {loss}", f"on-diag {on_diagonal}", f"off-diag {off_diagonal}", f"rank {rank}"]
    assert says == ", ".join([*parts, f"{values[-1]:,.0f} img/s"])
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with os.fdopen(terminal, "w", encoding="utf-8") as file:
        bar = tqdm(total=total, initial=total // 2, file=file, dynamic_ncols=True, bar_format=reporting.BAR)
        bar.start_t -= 100 * 3600 * bar.total / 5_004_000  # a week is half over
        bar.n += total // 3
        bar.set_postfix_str(says)
        bar.close()
    shown = [line.strip() for line in read(screen).split("\r") if line.strip()]
    assert shown[-1].endswith(f", {says}]")
    assert max(map(len, shown)) <= 100
    assert f" {total // 2 + total // 3}/{total} [" in shown[-1]


class Kept(list[tuple[str, dict[str, Any]]]):
    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.append((kind, row))


def test_mirrors_get_what_the_file_gets() -> None:
    mirrors = [Kept(), Kept()]
    metrics = Metrics(None, mirrors=mirrors)
    metrics.add("step", {"step": 1, "loss": math.inf})
    metrics.add("event", {"step": 2, "text": "a fallback"})
    expected = [("step", {"step": 1, "loss": None}), ("event", {"step": 2, "text": "a fallback"})]
    assert mirrors == [expected, expected]


def test_a_resumed_run_keeps_its_history_and_forgets_its_end(tmp_path: Path) -> None:
    kinds = ("settings", "step", "epoch", "collapse", "profile", "event", "evaluation", "report")
    metrics = Metrics(tmp_path)
    for kind in kinds:
        metrics.add(kind, {"step": 3})
    resumed = Metrics(tmp_path, resumed=tmp_path / "checkpoint.previous.pt", step=3)
    assert [row["kind"] for row in resumed.rows] == ["step", "epoch", "collapse", "profile", "event"]
    assert Metrics(None, resumed=tmp_path / "checkpoint.pt", step=2).rows == []


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"

    def break_down() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_down()
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    with (
        pytest.raises(Aborted, match=r"cannot write .*nowhere.page: No such file"),
        replacing(tmp_path / "nowhere/page"),
    ):
        pass


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: values for tag, values in found.items() if values}


def test_tensorboard_shows_the_metrics_and_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from barlow_recipes.tensorboard import TensorBoard

    folder = tmp_path / "tensorboard"
    metrics = Metrics(None, mirrors=[TensorBoard(folder)])
    metrics.add("settings", {"seed": 0})
    for step in (1, 11, 21, 31):
        metrics.add("step", {"step": step, "loss": math.nan if step == 11 else float(step), "dead_features": 3})
    metrics.add("epoch", {"step": 31, "epoch": 1, "knn": 50.5})
    assert scalars(folder)["step/loss"] == [(1, 1), (21, 21), (31, 31)]

    resumed = Metrics(None, mirrors=[TensorBoard(folder, resumed_step=21)])
    for step in (31, 41):
        resumed.add("step", {"step": step, "loss": -float(step), "dead_features": 3})
    resumed.add("evaluation", {"step": 41, "representation": "raw pixels", "knn": 97.75})
    resumed.add("event", {"step": 41, "text": "all is well"})
    assert scalars(folder) == {
        "step/loss": [(1, 1), (21, 21), (31, -31), (41, -41)],
        "step/dead_features": [(1, 3), (11, 3), (21, 3), (31, 3), (41, 3)],
        "evaluation/raw pixels/knn": [(41, 97.75)],
    }


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(maxcolors=2**24) or [])


CURVES = ("loss", "on_diagonal", "off_diagonal", "effective_rank", "learning_rate", "gradient_norm")
ACCURACIES = {"knn": 50.0, "linear_1": 40.0, "linear_all": 60.0}
BASELINES = {"raw pixels": {**ACCURACIES, "knn": 20.0}, "untrained encoder": {**ACCURACIES, "knn": 10.0}}


def curve(names: tuple[str, ...], steps: range) -> list[dict[str, Any]]:
    return [{"step": step} | dict.fromkeys(names, None if step == 21 else 100 + step % 7) for step in steps]


HISTORIES = {
    "some steps with a gap": curve(CURVES, range(1, 60, 10)),
    "rows without the gradient's norm": curve(CURVES[:-1], range(1, 60, 10)),
    "a single step": curve(CURVES, range(1, 2)),
    "no finite value": curve(CURVES, range(21, 22)),
    "nothing yet": [],
    "a week": curve(CURVES, range(1, 150_000, 10)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("history", "looks"),
    [*((history, True) for history in HISTORIES), ("some steps with a gap", False), ("nothing yet", False)],
)
def test_curves_are_drawn_at_any_time(history: str, looks: bool, tmp_path: Path) -> None:
    epochs = [{"step": step, "epoch": 1} | (ACCURACIES if looks and step > 20 else {}) for step in (20, 40)]
    pictures.draw_curves(
        tmp_path / "curves.png",
        HISTORIES[history],
        epochs,
        lambd=0.005,
        noise_floor=1000.0,
        attainable_rank=99,
        baselines=BASELINES if looks else {},
    )
    assert colours(tmp_path / "curves.png") > 50
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 3999, 15_000])
def test_of_thousands_of_steps_some_are_drawn_and_the_last(count: int) -> None:
    rows = [{"step": step} for step in range(count)]
    drawn = [row["step"] for row in pictures._thinned(rows)]
    assert min(count, 1000) <= len(drawn) <= 2000
    assert drawn[-1:] == [row["step"] for row in rows[-1:]]
    assert len({after - before for before, after in pairwise(drawn)}) <= 1


def test_the_cross_correlation_is_drawn_on_one_scale(tmp_path: Path) -> None:
    path = tmp_path / "cross_correlation.png"
    pictures.draw_cross_correlation(path, torch.zeros(16, 16), torch.eye(16), step=1234)
    assert colours(path) > 200
    with Image.open(path) as image:
        assert image.width > image.height > 500
    assert reporting.PICTURES == ("curves.png", "cross_correlation.png")


def test_lines_that_are_not_a_runs_do_not_stop_its_resumption(tmp_path: Path) -> None:
    lines = ["5", "null", "[]", '{"kind": "step"}', '{"kind": "step", "step": "7"}', '{"step": 1}', "{half"]
    good = '{"kind": "step", "step": 1, "loss": 2.5}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, good]) + "\n")
    metrics = Metrics(tmp_path, resumed=tmp_path / "checkpoint.pt", step=3)
    assert metrics.rows == [{"kind": "step", "step": 1, "loss": 2.5}]
