"""The bench of more than two views times right answers, and the page says what it measured."""

import json

import pytest
import torch

import views
from workload import Cell

CELL = Cell(24, 60)


def test_the_truth_is_the_mean_over_pairs():
    of_three = [view.detach().double().requires_grad_() for view in views.views_of(CELL, 3)]
    right = views.step(views.loop_over_pairs, of_three)
    assert max(views.errors(right, views.truth(of_three))) < 1e-12


def test_a_measurement_becomes_the_rows():
    record = views.measure(CELL, rounds=3, seconds=0.1)
    assert record["rounds"] == 3
    assert set(record["contenders"]) == set(views.CONTENDERS)
    environment = {"cpu": "a processor", "instructions": "some", "versions": {"torch": "2"}}
    text = views.table({"date": "today", "environment": environment, "record": record})
    assert [line.split("|")[1].strip() for line in text.splitlines()[4:8]] == list(views.CONTENDERS)


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setitem(views.CONTENDERS, views.EIGHT, (8, lambda *z: torch.stack([view.sum() for view in z]).sum()))
    with pytest.raises(AssertionError, match="8 views: expected errors of at most"):
        views.measure(CELL, rounds=3, seconds=0.1)


def test_the_page_says_what_was_measured():
    page = views.DOCS / "views.md"
    if not page.exists():
        pytest.skip("the page is not part of a source distribution")
    report = json.loads((views.DOCS / "views.json").read_text(encoding="utf-8"))
    assert views.page_with(report) == page.read_text(encoding="utf-8")
