"""The model of a step on a GPU against what PyTorch is asked to do, and the page of what was measured on one."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest

import gpu
from machine import RESULTS
from measure import Cell
from model import CONTENDERS, EAGER, MODELS, SETTINGS, TEXTBOOK, TRITON, Setting, counted

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
    found = gpu.stored(RESULTS)
    assert found is not None
    return copy.deepcopy(found)


def test_the_page_is_what_the_figures_and_the_model_say(stored: dict[str, Any]) -> None:
    assert (RESULTS / "gpu.md").read_text(encoding="utf-8") == gpu.markdown(stored)


def test_one_that_is_no_contender_any_more_keeps_what_was_measured(stored: dict[str, Any]) -> None:
    record = stored["cells"][0]
    found = record["contenders"][CONTENDERS[0]]
    record["contenders"]["a former one"] = found
    page = gpu.markdown(stored)
    assert "- a former one: as it was measured; it is no contender any more" in page
    times, memory = (line.split(" | ") for line in page.splitlines() if "| a former one |" in line)
    assert times[2] == ""  # no prediction
    assert times[3].startswith(f"{1e3 * found['seconds']['median']:.4g} (")
    assert memory[-2:] == [f"{found['loss_error']:.1e}", f"{found['gradient_error']:.1e} |"]
    assert gpu.failures(stored) == []
