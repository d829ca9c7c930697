"""A run of the bench on small shapes: what it refuses to time, what it writes, and where."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if not all(map(find_spec, ("matplotlib", "torchvision"))):
    pytest.skip("needs matplotlib and torchvision", allow_module_level=True)

from torch import Tensor

import bench
import measure
import render
from contenders import FFT, OURS, TEXTBOOK, Contender
from measure import Cell

SMALL = bench.Plan(
    cells=(Cell(32, 128), Cell(128, 32)),
    names=(OURS, TEXTBOOK, FFT),
    limits=(Cell(64, 256),),
    rounds=2,
    seconds=0.1,
)


def halved(contender: Contender) -> Contender:
    """A contender with its value, and half of its gradient."""

    def wrong(z1: Tensor, z2: Tensor) -> Tensor:
        loss = contender(z1, z2)
        return 0.5 * (loss + loss.detach())

    return wrong


@pytest.mark.parametrize("name", [OURS, TEXTBOOK, FFT])
def test_a_wrong_gradient_is_never_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.build
    monkeypatch.setattr(
        bench, "build", lambda chosen, d: halved(honest(chosen, d)) if chosen == name else honest(chosen, d)
    )
    monkeypatch.setattr(bench, "beside", lambda *args: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"{name} at 32×64: expected errors of at most"):
        bench.compare(Cell(32, 64), (OURS, TEXTBOOK, FFT), rounds=1, seconds=0)


@pytest.mark.parametrize("name", [OURS, TEXTBOOK])
def test_a_training_step_with_a_wrong_loss_is_never_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = measure.build
    monkeypatch.setattr(
        measure, "build", lambda chosen, d: halved(honest(chosen, d)) if chosen == name else honest(chosen, d)
    )
    with pytest.raises(AssertionError, match=f"{name} at 16×32: expected errors of at most"):
        measure.checked_turns(Cell(16, 32), (OURS, TEXTBOOK), *Cell(16, 32).views())


def test_a_run_writes_figures_page_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[str]] = []
    store = measure.store

    def watched_store(results: measure.Record, path: Path) -> None:
        store(results, path)
        assert path.name.endswith(".partial.json")
        kept.append(set(json.loads(path.read_text())))

    monkeypatch.setattr(measure, "store", watched_store)
    path = bench.run(SMALL, ("cells", "growth", "limits", "host"), tmp_path)
    assert [kept[i] - kept[i - 1] for i in range(1, 5)] == [{"cells"}, {"growth"}, {"limits"}, {"host"}]
    page = path.with_suffix(".md")
    render.write({page: render.page(json.loads(path.read_text()), path)}, path)
    assert set(tmp_path.iterdir()) == {path, page, *(render.picture(path, kind) for kind in render.TITLES)}
    results = json.loads(path.read_text())
    assert list(results["cells"][0]["contenders"]) == [OURS, TEXTBOOK, FFT]
    assert [cell["algorithm"] for cell in results["cells"]] == ["dual", "primal"]
    assert results["cells"][0]["contenders"][OURS]["times_ours"]["median"] == 1
    assert results["host"]["steps"][0]["what"] == "eager"
    assert "32×128, dual: " in capsys.readouterr().out


def test_growth_without_cells_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "growth"])
    with pytest.raises(SystemExit):
        bench.arguments()
    assert "growth follows from cells, name both" in capsys.readouterr().err


def test_a_part_is_not_written_among_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
        return bench.arguments().out

    assert out() == measure.RESULTS
    assert out("--only", "limits") == out("--plan", "check") == Path("runs/bench")
    assert out("--only", "limits", "--out", "there") == Path("there")
