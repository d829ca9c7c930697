"""The section "training": the arithmetic of its records, on a tiny real run."""

from contextlib import nullcontext
from importlib.util import find_spec
from unittest import mock

import pytest

if find_spec("torchvision") is None:
    pytest.skip("needs torchvision", allow_module_level=True)

from contenders import OURS, TEXTBOOK
from training import ALONE, WHOLE, Sizes, training


@pytest.fixture(scope="module")
def tiny():
    with mock.patch("training.all_cores", nullcontext):
        return training(Sizes(batch_size=4, projector_batch_size=16, image_size=32, width=64, chunk=4), rounds=3)


def test_what_was_run(tiny):
    whole, alone = tiny
    assert (whole["what"], alone["what"]) == (WHOLE, ALONE) == ("ResNet-50 and projector", "projector alone")
    assert (whole["batch_size"], whole["image_size"], whole["chunks"]) == (4, 32, [2, 4])
    assert (alone["batch_size"], alone["image_size"]) == (16, None)
    assert whole["parts"].keys() == {"backbone", "projector", "optimizer"}
    assert alone["parts"].keys() == {"projector", "optimizer"}
    for record in tiny:
        assert (record["projector"], record["threads"], record["rounds"]) == (64, 1, 3)


def test_shares_and_speed_up(tiny):
    for record in tiny:
        steps, losses = record["steps"], record["losses"]
        assert steps.keys() == losses.keys() == {OURS, TEXTBOOK}
        assert record["speed_up"] == pytest.approx(steps[TEXTBOOK] / steps[OURS])
        for name in (OURS, TEXTBOOK):
            assert record["shares"][name] == pytest.approx(losses[name]["median"] / steps[name])
            assert 0 < record["shares"][name] < 1


def test_with_the_backbone_a_step_is_the_sum_of_its_parts(tiny):
    whole, _ = tiny
    for name in (OURS, TEXTBOOK):
        assert whole["steps"][name] == pytest.approx(sum(whole["parts"].values()) + whole["losses"][name]["median"])


def test_a_real_step_is_not_much_shorter_than_each_of_its_parts(tiny):
    """They were measured one after the other, perhaps on a busy machine."""
    _, alone = tiny
    for name in (OURS, TEXTBOOK):
        assert 10 * alone["steps"][name] > max(alone["parts"]["optimizer"], alone["losses"][name]["median"])
