"""The model of a step on a GPU against what PyTorch is asked to do, and the page of what was measured on one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import gpu
from machine import RESULTS, load
from measure import Cell, Errors
from model import AUTOCAST, COMPILED, CONTENDERS, EAGER, MODELS, SETTINGS, TEXTBOOK, TRITON, Setting, counted

CELL = Cell(64, 512)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("name", [TEXTBOOK, EAGER, TRITON])
def test_the_model_is_what_pytorch_is_asked_to_do(name: str, setting: Setting) -> None:
    if name == TRITON and find_spec("triton") is None:
        pytest.skip("needs triton")
    cost, (moved, launches) = MODELS[name](CELL, setting), counted(name, CELL, setting)
    assert cost.moved == pytest.approx(moved, rel=0.03)
    assert abs(cost.launches - launches) <= 1  # the fill of ∂L/∂L


@pytest.fixture
def stored() -> dict[str, Any]:
    return load(RESULTS / "gpu.json")


def test_one_that_is_no_contender_any_more_keeps_what_was_measured(stored: dict[str, Any]) -> None:
    record = stored["cells"][0]
    found = record["contenders"][CONTENDERS[0]]
    record["contenders"]["a former one"] = found
    page = gpu.markdown(stored)
    assert "- a former one: as it was measured; it is no contender any more" in page
    (row,) = (line for line in page.splitlines() if "| a former one |" in line)
    head = next(line for line in page.splitlines() if line.startswith("| N | D | contender |"))
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["predicted, ms"] == ""
    assert cells["ms"].startswith(f"{1e3 * found['seconds']['median']:.4g} (")
    assert cells["loss error"] == f"{found['loss_error']:.1e}"
    assert gpu.failures(stored) == []


def test_a_measurement_becomes_the_rows_of_the_page(stored: dict[str, Any]) -> None:
    """On the CPU, where the two that need a GPU are left out, and without time for what is compiled."""
    where = gpu.Device.of(torch.device("cpu"))
    record = gpu.measure(Cell(16, 64), AUTOCAST, where, rounds=2, deadline=0.0)
    timed = {name: found for name, found in record["contenders"].items() if "seconds" in found}
    assert timed.keys() >= {TEXTBOOK, EAGER}
    assert record["contenders"][TRITON] == {"left_out": "needs a GPU"}
    assert record["contenders"][COMPILED] == {"left_out": "the budget was spent"}
    assert timed[TEXTBOOK]["times"][EAGER]["median"] > 0
    page = gpu.markdown({**stored, "cells": [record], "left_out": ["the rest: left out, the budget was spent"]})
    assert f"| 16 | 64 | {EAGER} | " in page
    assert "- the rest: left out" in page


def test_a_wrong_answer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "allowed", lambda name, setting: Errors(0.0, 0.0))
    record = gpu.measure(Cell(16, 64), AUTOCAST, gpu.Device.of(torch.device("cpu")), rounds=1, deadline=0.0)
    assert record["contenders"][EAGER]["failed"].startswith("wrong: errors of at most")
    assert "seconds" not in record["contenders"][EAGER]
    assert len(gpu.failures({"cells": [record]})) == 1


def test_it_needs_nothing_that_a_bare_machine_lacks() -> None:
    """A machine with a GPU has torch and triton, and often neither a network nor a package that draws."""
    program = "import sys, gpu; print(*sys.modules)"
    path = os.pathsep.join([str(RESULTS.parent), str(RESULTS.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"PIL", "lightly", "matplotlib", "pandas", "stable_pretraining", "torchvision"})
