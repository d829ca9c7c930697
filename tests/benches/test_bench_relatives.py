"""The bench of the relatives times right answers, and the page says what it measured."""

import json

import pytest
import torch

import relatives
from barlow_loss import reference
from relatives import ALPHA, LAMBD, MIX_SCALE, OURS, PUBLISHED, RELATIVES
from workload import Cell, errors, step

CELL = Cell(24, 60)


def doubles():
    return [z.detach().double().requires_grad_() for z in CELL.views()]


@pytest.mark.parametrize("who", [OURS, PUBLISHED])
@pytest.mark.parametrize("name", RELATIVES)
def test_each_gives_the_value_and_gradient_of_its_oracle(name, who):
    found = errors(step(RELATIVES[name].contenders[who], *doubles()), step(RELATIVES[name].oracles[who], *doubles()))
    assert found.loss < 1e-12
    assert found.gradient < 1e-11


def test_the_oracle_of_mixed_samples_is_the_packages():
    z1, z2 = doubles()
    index, z_mixed = relatives._mixed(z1, z2)
    settings = {"lambd": LAMBD, "mix_scale": MIX_SCALE}
    expected = reference.mixed_barlow_twins_loss(z1, z2, z_mixed, ALPHA, index, **settings).loss
    torch.testing.assert_close(RELATIVES["Mixed Barlow Twins"].oracles[OURS](z1, z2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RELATIVES)
def test_a_measurement_becomes_a_row(name):
    record = relatives.measure(name, CELL, rounds=3, seconds=0.1)
    assert record["rounds"] == 3
    assert record["working_bytes"][PUBLISHED] > 2 * 4 * CELL.d**2
    environment = {"cpu": "a processor", "instructions": "some", "versions": {"torch": "2"}}
    text = relatives.table({"date": "today", "environment": environment, "records": [record]})
    assert text.splitlines()[-1].startswith(f"| {name} | 24 × 60 | ")


def test_a_wrong_answer_is_not_timed(monkeypatch):
    wrong = RELATIVES["VICReg"]._replace(oracles={OURS: lambda a, b: (a * b).sum(), PUBLISHED: lambda a, b: a.sum()})
    monkeypatch.setitem(RELATIVES, "VICReg", wrong)
    with pytest.raises(AssertionError, match="expected errors of at most"):
        relatives.measure("VICReg", CELL, rounds=3, seconds=0.1)


def test_the_page_says_what_was_measured():
    page = relatives.DOCS / "relatives.md"
    if not page.exists():
        pytest.skip("the page is not part of a source distribution")
    report = json.loads((relatives.DOCS / "relatives.json").read_text(encoding="utf-8"))
    assert relatives.page_with(report) == page.read_text(encoding="utf-8")
