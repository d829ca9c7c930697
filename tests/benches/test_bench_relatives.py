"""The bench of the relatives and of more views times right answers, and the pages say what it measured."""

import pytest
import torch

import measure
import relatives
from measure import Cell, errors, gram_form, step
from relatives import ALPHA, EIGHT, LAMBD, MIX_SCALE, OURS, PUBLISHED, RELATIVES, VIEWS

CELL = Cell(24, 60)
HEAD = {
    "date": "today",
    "environment": {
        "cpu": "a processor",
        "instructions": "some",
        "cores": 2,
        "system": "one",
        "python": "3",
        "versions": {"torch": "2"},
    },
}


def doubles(count=2):
    return CELL.views(count, dtype=torch.float64)


@pytest.mark.parametrize("who", [OURS, PUBLISHED])
@pytest.mark.parametrize("name", RELATIVES)
def test_each_gives_the_value_and_gradient_of_its_oracle(name, who):
    contender = RELATIVES[name][1][who]
    found = errors(step(contender.loss, *doubles()), step(contender.oracle, *doubles()))
    assert found.loss < 1e-12
    assert found.gradient < 1e-11


def gram_form_of_mixed(z1, z2):
    """Without D×D matrices; as published without ε, by the unbiased deviation."""
    index, z_mixed = relatives._mixed(z1, z2)
    n = len(z1)
    u1, u2, um = ((z - z.mean(dim=0)) / z.std(dim=0) for z in (z1, z2, z_mixed))
    e = um - ALPHA * u1 - (1 - ALPHA) * u2[index]
    grams = [u @ u.T for u in (u1, u2)]
    c = (u1 * u2).sum(dim=0) / n
    off_diagonal = (grams[0] * grams[1]).sum() / n**2 - c.square().sum()
    mixture = (e @ e.T * (grams[0] + grams[1])).sum() / n**2
    return (c - 1).square().sum() + LAMBD * off_diagonal + MIX_SCALE * LAMBD * mixture


def test_the_published_formula_of_mixed_samples_is_what_it_says():
    found = errors(step(relatives.published_mixed, *doubles()), step(gram_form_of_mixed, *doubles()))
    assert max(found) < 1e-11


def test_the_truth_of_many_views_is_the_mean_over_pairs():
    of_three = doubles(3)
    assert max(errors(step(relatives.loop_over_pairs, *of_three), step(gram_form, *of_three))) < 1e-12


@pytest.mark.parametrize("name", RELATIVES)
def test_a_measurement_of_a_relative_becomes_a_row(name):
    record = relatives.measured(name, CELL, RELATIVES[name][1], rounds=3, seconds=0.1)
    assert record["rounds"] == 3
    found = record["contenders"][PUBLISHED]
    assert found["working_bytes"] > 2 * 4 * CELL.d**2
    assert found["over"].keys() == {OURS}
    text = relatives.block("relatives", {**HEAD, "records": [record]})
    assert text.splitlines()[-1].startswith(f"| {name} | 24×60 | ")


def test_a_measurement_of_views_becomes_the_rows():
    record = relatives.measured("Barlow Twins", CELL, VIEWS, rounds=3, seconds=0.1)
    assert record["rounds"] == 3
    assert set(record["contenders"]) == set(VIEWS)
    text = relatives.block("views", {**HEAD, "records": [record]})
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()[4:8]]
    assert [row[0] for row in rows] == list(VIEWS)
    assert [row[2] for row in rows].index("—") == 0  # the two views are what the others stand beside
    assert rows[0][4] == f"{4e-6 * (5 * 24 * 60 + 6 * 24**2):.3g}"


@pytest.mark.parametrize("name", [OURS, PUBLISHED])
def test_a_wrong_relative_is_not_timed(monkeypatch, name):
    contenders = dict(RELATIVES["VICReg"][1])
    contenders[name] = contenders[name]._replace(loss=lambda a, b: (a * b).sum())
    monkeypatch.setattr(measure, "interleave", lambda *args: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"{name} at 24×60: expected errors of at most"):
        relatives.measured("VICReg", CELL, contenders, rounds=3, seconds=0.1)


def test_a_wrong_answer_of_many_views_is_not_timed():
    wrong = VIEWS[EIGHT]._replace(loss=lambda *z: torch.stack([view.sum() for view in z]).sum())
    with pytest.raises(AssertionError, match="8 views at 24×60: expected errors of at most"):
        relatives.measured("Barlow Twins", CELL, {**VIEWS, EIGHT: wrong}, rounds=3, seconds=0.1)
