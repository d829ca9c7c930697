"""The calls of docs/migrating.md: the value and the gradients of other implementations, by their formulas."""

import pytest
import torch

from barlow_loss import BarlowTwinsLoss
from strategies import Batch


def other(lambd, *, correction=0, inside=0.0, beside=0.0, target=0.0, scale=1.0):
    """A loss by its deviation √(v + inside) + beside, v with N − correction."""

    def loss_fn(z1, z2):
        hat = [(z - z.mean(0)) / ((z.var(0, correction=correction) + inside).sqrt() + beside) for z in (z1, z2)]
        c = hat[0].T @ hat[1] / len(z1)
        identity = torch.eye(len(c), dtype=torch.bool)
        on_diagonal = (c.diagonal() - 1).square().sum()
        return scale * (on_diagonal + lambd * (c - target).masked_fill(identity, 0).square().sum())

    return loss_fn


# Theirs, ours, our factor, and how far apart they may be: an ε beside the root is its square in it, nearly.
ROWS = {
    "official": (other(0.0051, inside=1e-5), BarlowTwinsLoss(), 1, 1e-11),
    "lightly": (other(0.005, inside=1e-5), BarlowTwinsLoss(0.005), 1, 1e-11),
    "solo-learn": (other(0.005, inside=1e-5, scale=0.025), BarlowTwinsLoss(0.005), 0.025, 1e-11),
    "stable-pretraining": (
        other(0.005, correction=1, beside=1e-5),
        BarlowTwinsLoss(0.005, correction=1, eps=1e-10),
        1,
        2e-4,
    ),
    "MONAI": (other(0.005, correction=1, beside=1e-6), BarlowTwinsLoss(0.005, correction=1, eps=1e-12), 1, 2e-5),
    "Catalyst": (other(1.0, correction=1, inside=1e-12), BarlowTwinsLoss(1.0, correction=1, eps=1e-12), 1, 1e-11),
    "HSIC": (
        other(0.01, correction=1, target=-1.0),
        BarlowTwinsLoss(0.01, off_diagonal_target=-1.0, correction=1, eps=0.0),
        1,
        1e-11,
    ),
}
PACKAGES = {"lightly": "lightly.loss", "stable-pretraining": "stable_pretraining.losses"}


def _answer(loss_fn, factor=1.0, constant_features=0):
    views = [view.clone() for view in Batch(20, 30, 1, "trained", mean=1.0).views()]
    for view in views:
        view[:, :constant_features] = 0.5
        view.requires_grad_()
    loss = factor * loss_fn(*views)
    return loss.detach(), *torch.autograd.grad(loss, views)


def _assert_near(got, expected, tolerance):
    for one, right in zip(got, expected, strict=True):
        assert (one - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", ROWS)
def test_the_call_gives_the_value_and_the_gradients_of_the_formula(name):
    theirs, ours, factor, tolerance = ROWS[name]
    _assert_near(_answer(ours, factor), _answer(theirs), tolerance)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "HSIC"])  # which divides by 0
def test_a_constant_feature_counts_as_it_does_there(name):
    theirs, ours, factor, tolerance = ROWS[name]
    expected = _answer(theirs, constant_features=3)[0]
    assert expected.isfinite()
    _assert_near(_answer(ours, factor, constant_features=3)[:1], [expected], tolerance)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_formula_is_that_of_the_package(name):
    theirs = pytest.importorskip(PACKAGES[name]).BarlowTwinsLoss()
    _assert_near(_answer(ROWS[name][0]), _answer(theirs), 1e-11)
