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
import render
import sections
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
    honest = sections.build
    monkeypatch.setattr(
        sections, "build", lambda chosen, d: halved(honest(chosen, d)) if chosen == name else honest(chosen, d)
    )
    monkeypatch.setattr(sections, "beside", lambda *args: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"{name} at 32×64: expected errors of at most"):
        sections.compare(Cell(32, 64), (OURS, TEXTBOOK, FFT), threads=1, rounds=1, seconds=0)


@pytest.mark.parametrize("name", [OURS, TEXTBOOK])
def test_a_training_step_with_a_wrong_loss_is_never_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sections.build
    monkeypatch.setattr(
        sections, "build", lambda chosen, d: halved(honest(chosen, d)) if chosen == name else honest(chosen, d)
    )
    with pytest.raises(AssertionError, match=f"{name} at 16×32: expected errors of at most"):
        sections.checked_turns(Cell(16, 32), *Cell(16, 32).views())


def test_a_run_writes_figures_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.Run(SMALL, tmp_path)
    partial = tmp_path / f"{run.stem.name}.partial.json"
    assert partial.exists()
    run.measure("cells")
    assert json.loads(partial.read_text()).keys() == {"date", "revision", "environment", "seconds", "cells"}
    for section in ("growth", "limits", "host"):
        run.measure(section)
    files = run.report()
    assert not partial.exists()
    assert sorted(files) == sorted(tmp_path.iterdir())
    results = json.loads(files[0].read_text())
    assert list(results["cells"][0]["contenders"]) == [OURS, TEXTBOOK, FFT]
    assert [cell["algorithm"] for cell in results["cells"]] == ["dual", "primal"]
    assert results["cells"][0]["contenders"][OURS]["times_ours"]["median"] == 1
    assert results["host"]["steps"][0]["what"] == "eager"
    assert files[1].read_text() == render.markdown(results, files[0])
    assert "32 × 128, 1 thread, dual" in capsys.readouterr().out


def test_growth_without_cells_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="growth follows from cells, name both"):
        bench.Run(SMALL, tmp_path).measure("growth")


def test_a_part_is_not_written_among_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
        return bench.arguments().out

    assert out() == out("--plan", "full") == bench.RESULTS
    assert out("--only", "limits") == out("--plan", "check") == Path("runs/bench")
    assert out("--only", "limits", "--out", "there") == Path("there")


def test_promises_are_read_off_the_results() -> None:
    results = {
        "cells": [{"n": 256, "d": 4096, "contenders": {OURS: {"working_bytes": 4096**2}}}],
        "growth": {"features": {"n": 256, "contenders": {OURS: {"d": [2048, 32768], "exponent": 1.2}}}},
        "limits": [{"n": 256, "d": 8192, "threads": threads, "ours_over_gemms": {"median": 1.3}} for threads in (1, 2)],
        "training": [
            {"what": "ResNet-50 and projector", "shares": {OURS: 0.01}},
            {"what": "projector alone", "shares": {OURS: 0.2}},
        ],
        "seconds": dict.fromkeys(bench.SECTIONS, 120.0),
    }
    said = [line.split(":")[0] for line in bench.verdicts(results)]
    assert said == ["NOT KEPT", "kept", "kept", "kept", "NOT KEPT"]
    assert "exponent of time in D, N = 256: 1.2, promised at most 1.15" in bench.verdicts(results)[0]
    assert bench.verdicts({"limits": []}) == []
