"""Laws of other definitions: the off-diagonal target t, Σ_{i≠j} (C_ij − t)², and the deviation with N − 1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barlow_loss import BarlowTwinsLoss, barlow_twins_loss
from comparison import LAMBD, assert_near, truth
from strategies import Batch, batches
from test_laws_views import Mean, evaluate, random_weights

targets = st.sampled_from([-1.0, 0.3, 1.0, 7.0])


@given(batch=batches(), views=st.sampled_from([2, 3, 4]), target=targets)
def test_the_loss_and_its_gradients(algorithm, dtype, batch, views, target):
    z, weights = batch.more_views(views, dtype), random_weights(views, batch.seed)
    found = evaluate(z, algorithm=algorithm, pair_weights=weights, off_diagonal_target=target)
    Mean(z, weights, target=target).assert_holds(*found, dtype)


@given(batch=batches(), views=st.sampled_from([2, 3]), target=st.sampled_from([0.0, -1.0]))
def test_a_deviation_with_n_minus_1(algorithm, dtype, batch, views, target):
    z = batch.more_views(views, dtype)
    found = evaluate(z, algorithm=algorithm, off_diagonal_target=target, correction=1)
    Mean(z, target=target, correction=1).assert_holds(*found, dtype)
    assert found[0][0] == found[0][1] + LAMBD * found[0][2]


@given(batch=batches(), views=st.sampled_from([2, 3]))
def test_0_is_the_loss_without_it(algorithm, dtype, batch, views):
    """To the last bit."""
    z = batch.more_views(views, dtype)
    plain, moved = (
        evaluate(z, algorithm=algorithm, **given) for given in ({}, {"off_diagonal_target": 0, "correction": 0})
    )
    for one, other in zip(plain, moved, strict=True):
        assert all(map(torch.equal, one, other))


def test_alike_features_reach_a_target_of_1(algorithm):
    """The only target but 0 that can be reached: off is 0 up to the rounding of D² in the dual."""
    z = Batch(16, 1, 1, "gaussian", std=10).views()[0].expand(-1, 50).clone()
    terms, _ = evaluate((z, z), algorithm=algorithm, off_diagonal_target=1.0)
    assert_near(terms[2], truth(z, z, target=1.0).off_diagonal, 1e-11)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("views", [2, 3])
def test_gradcheck(algorithm, views, correction):
    """Of all three terms; λ too."""
    z = [view.requires_grad_() for view in Batch(5, 7, 1, "gaussian").more_views(views)]
    lambd = torch.tensor(0.3, dtype=torch.float64, device=z[0].device, requires_grad=True)

    def terms(weight, *leaves):
        settings = {"algorithm": algorithm, "off_diagonal_target": -1.0, "return_terms": True, "correction": correction}
        return tuple(barlow_twins_loss(*leaves, lambd=weight, **settings))

    assert torch.autograd.gradcheck(terms, (lambd, *z), fast_mode=True)


def test_a_view_without_gradient_leaves_the_other_as_it_is(algorithm):
    z1, z2 = Batch(12, 30, 1, "trained").views()
    _, gradients = evaluate((z1, z2), algorithm=algorithm, off_diagonal_target=-1.0)
    leaf = z2.detach().requires_grad_()
    barlow_twins_loss(z1, leaf, algorithm=algorithm, off_diagonal_target=-1.0).backward()
    assert torch.equal(leaf.grad, gradients[1])


def test_16_bits(algorithm):
    """C − t is near −t: it is made before products are rounded to 16 bits, or it would keep two digits of C."""
    z = Batch(32, 60, 1, "trained").views(torch.bfloat16)
    with torch.autocast(z[0].device.type, torch.bfloat16):
        (loss, *_), gradients = evaluate(z, algorithm=algorithm, off_diagonal_target=-1.0)
    expected = truth(*z, target=-1.0)
    assert_near(loss, expected.loss, 2e-3 * float(expected.loss))
    for gradient, wanted in zip(gradients, expected.gradients, strict=True):
        assert_near(gradient, wanted, 2e-2 * float(wanted.norm()))


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("-1", TypeError, "off_diagonal_target to be a float, got str"),
        (True, TypeError, "got bool"),
        (torch.tensor(-1.0), TypeError, "got Tensor"),
        (float("nan"), ValueError, "finite, got nan"),
    ],
)
def test_what_is_no_number_is_refused(target, error, words):
    with pytest.raises(error, match=words):
        barlow_twins_loss(*Batch(4, 6, 1, "gaussian").views(), off_diagonal_target=target)
    with pytest.raises(error, match="BarlowTwinsLoss"):
        BarlowTwinsLoss(off_diagonal_target=target)


@pytest.mark.parametrize("correction", [2, -1, 1.0, True, None])
def test_a_correction_is_0_or_1(correction):
    with pytest.raises(ValueError, match="expected correction to be 0 or 1, got"):
        barlow_twins_loss(*Batch(4, 6, 1, "gaussian").views(), correction=correction)
    with pytest.raises(ValueError, match="BarlowTwinsLoss"):
        BarlowTwinsLoss(correction=correction)


def test_the_module_keeps_it():
    z1, z2 = Batch(9, 24, 1, "trained").views()
    loss_fn = BarlowTwinsLoss(off_diagonal_target=-1, correction=1)
    assert "off_diagonal_target=-1, correction=1" in repr(loss_fn)
    terms = loss_fn(z1, z2, return_terms=True)
    assert terms.loss == terms.on_diagonal + LAMBD * terms.off_diagonal
    assert loss_fn(z1, z2) == barlow_twins_loss(z1, z2, off_diagonal_target=-1.0, correction=1)
