"""Laws of VICReg and of mixed samples: they are the oracle's, in any order of samples, features and views."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from barlow_loss import mixed_barlow_twins_loss, vicreg_loss
from comparison import assert_near, tolerance
from related import ALPHA, RELATIVES, answer, permutation_of, right
from strategies import Batch, batches


@pytest.fixture(params=RELATIVES)
def relative(request):
    return RELATIVES[request.param]


def _assert_near(got, expected, dtype, value_tol, gradient_tol):
    assert_near(got.loss, expected.loss, expected.value_budget(value_tol, dtype), "loss")
    for view, (one, other) in enumerate(zip(got.gradients, expected.gradients, strict=True)):
        assert_near(one, other, expected.gradient_budget(view, gradient_tol, dtype), f"gradient of view {view + 1}")


@given(data=st.data(), batch=batches())
def test_value_and_gradients_equal_float64_dense(algorithm, dtype, data, batch):
    """Each term too; in float32 the oracle is given the same float32 numbers."""
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    expected, got = right(relative, views), answer(relative, views, algorithm=algorithm)
    _assert_near(got, expected, dtype, tolerance(dtype, 1e-12, 2e-6), tolerance(dtype, 1e-10, 1e-5))


@given(data=st.data(), batch=batches())
def test_primal_equals_dual(dtype, data, batch):
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    expected = right(relative, views)
    primal, dual = (answer(relative, views, algorithm=algorithm) for algorithm in ("primal", "dual"))
    assert_near(primal.loss, dual.loss, expected.value_budget(tolerance(dtype, 1e-12, 1e-6), dtype))
    for view, (one, other) in enumerate(zip(primal.gradients, dual.gradients, strict=True)):
        assert_near(one, other, expected.gradient_budget(view, tolerance(dtype, 1e-11, 1e-5), dtype))


@given(data=st.data(), batch=batches())
def test_permuting_the_features_leaves_the_loss(algorithm, dtype, data, batch):
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    order = torch.randperm(batch.d, generator=batch.generator())
    got = answer(relative, [z[:, order] for z in views], algorithm=algorithm)
    expected = right(relative, views)
    plain = answer(relative, views, algorithm=algorithm)
    assert_near(got.loss, plain.loss, expected.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype))
    for view, (one, other) in enumerate(zip(got.gradients, plain.gradients, strict=True)):
        budget = expected.gradient_budget(view, tolerance(dtype, 1e-11, 1e-5), dtype)
        assert_near(one, other[:, order], budget, f"gradient of view {view + 1}")


@given(batch=batches(), count=st.integers(2, 4))
def test_permuting_the_batch_or_the_views_leaves_vicreg(algorithm, dtype, batch, count):
    """Samples of all views in a common order; views in any."""
    relative = RELATIVES["vicreg of 4 views"]
    views = relative.views(batch, dtype)[:count]
    order = torch.randperm(batch.n, generator=batch.generator())
    expected = right(relative, views)
    budget = expected.value_budget(tolerance(dtype, 1e-12, 5e-6), dtype)
    plain = answer(relative, views, algorithm=algorithm)
    assert_near(vicreg_loss(*(z[order] for z in views), algorithm=algorithm), plain.loss, budget)
    turned = answer(relative, views[::-1], algorithm=algorithm)
    assert_near(turned.loss, plain.loss, budget)
    for view in range(count):
        allowed = expected.gradient_budget(view, tolerance(dtype, 1e-11, 1e-5), dtype)
        assert_near(turned.gradients[count - 1 - view], plain.gradients[view], allowed, f"gradient of view {view + 1}")


@given(batch=batches())
def test_permuting_the_batch_of_mixed_samples(algorithm, dtype, batch):
    """Row σ(n) becomes row n: then π becomes σ⁻¹ π σ."""
    relative = RELATIVES["mixed"]
    views = relative.views(batch, dtype)
    order = torch.randperm(batch.n, generator=batch.generator())
    permutation = order.argsort()[permutation_of(batch.n)[order]]
    budget = right(relative, views).value_budget(tolerance(dtype, 1e-12, 5e-6), dtype)
    got = mixed_barlow_twins_loss(*(z[order] for z in views), ALPHA, permutation, algorithm=algorithm)
    assert_near(got, relative.loss(*views, algorithm=algorithm), budget)


@given(batch=batches())
def test_exchanging_the_mixed_views(algorithm, dtype, batch):
    """Without a permutation the views may be exchanged, α with 1 − α; with one they may not."""
    z1, z2, z_mixed = RELATIVES["mixed"].views(batch, dtype)
    alone = torch.arange(batch.n)
    loss = mixed_barlow_twins_loss(z1, z2, z_mixed, ALPHA, alone, algorithm=algorithm)
    got = mixed_barlow_twins_loss(z2, z1, z_mixed, 1 - ALPHA, alone, algorithm=algorithm)
    budget = right(RELATIVES["mixed"], [z1, z2, z_mixed]).value_budget(tolerance(dtype, 1e-12, 5e-6), dtype)
    assert_near(got, loss, budget)


@given(data=st.data(), batch=batches())
def test_strides_do_not_matter_and_inputs_are_never_mutated(algorithm, dtype, data, batch):
    """Every second row and column of a larger tensor: the same bits."""
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    strided = []
    for z in views:
        wide = z.new_full((2 * batch.n, 2 * batch.d), torch.nan)
        wide[::2, ::2] = z
        strided.append(wide[::2, ::2])
    before = [z._version for z in views]
    plain, got = (answer(relative, each, algorithm=algorithm) for each in (views, strided))
    assert torch.equal(got.loss, plain.loss)
    assert all(torch.equal(one, other) for one, other in zip(got.gradients, plain.gradients, strict=True))
    assert [z._version for z in views] == before


@given(data=st.data(), batch=batches(means=(0.0,), stds=(1.0,)), bad=st.sampled_from([torch.nan, torch.inf]))
def test_nan_stays_nan(algorithm, dtype, data, batch, bad):
    """Infinity gives NaN or infinity: never a number."""
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    views[data.draw(st.integers(0, relative.count - 1))][-1, data.draw(st.integers(0, batch.d - 1))] = bad
    loss = relative.loss(*views, algorithm=algorithm)
    assert loss.isnan() if bad != bad else not loss.isfinite()


@given(data=st.data(), batch=batches(), constant=st.sampled_from([0.0, -3.7, 1e4]))
def test_constant_features_have_no_gradient(algorithm, dtype, data, batch, constant):
    """VICReg asks (1 − √ε)/D for each, the mixed loss 1; nothing else is changed but the D of the means."""
    relative = RELATIVES[data.draw(st.sampled_from(list(RELATIVES)))]
    views = relative.views(batch, dtype)
    padded = [torch.cat([z, z.new_full((batch.n, 2), constant)], dim=1) for z in views]
    plain, got = (answer(relative, each, algorithm=algorithm) for each in (views, padded))
    share = 1.0 if relative.name == "mixed" else batch.d / (batch.d + 2)
    added = 2.0 if relative.name == "mixed" else 25 * 0.99 * 2 / (batch.d + 2)
    expected = right(relative, padded)
    assert_near(
        got.loss, share * plain.loss.double() + added, expected.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype)
    )
    for view, (one, other) in enumerate(zip(got.gradients, plain.gradients, strict=True)):
        budget = expected.gradient_budget(view, tolerance(dtype, 1e-11, 1e-5), dtype)
        assert_near(one[:, : batch.d], share * other, budget)
        assert not one[:, batch.d :].any()


@given(seed=st.integers(0, 999), n=st.integers(3, 24), d=st.integers(1, 40))
def test_large_means_in_float32(algorithm, seed, n, d):
    """Mean 1e4, std 1e-2: within 1e-5 of float64 of the same float32 numbers, but for the band of the products."""
    for relative in RELATIVES.values():
        views = relative.views(Batch(n, d, seed, "trained", mean=1e4, std=1e-2), torch.float32)
        _assert_near(answer(relative, views, algorithm=algorithm), right(relative, views), torch.float32, 2e-6, 1e-5)


@given(
    n=st.integers(2, 24),
    d=st.integers(1, 32),
    constant=st.sampled_from([0.0, -0.1, 1e4]),
    eps=st.sampled_from([1e-4, 0.25]),
)
def test_collapse_in_plain_numbers(algorithm, dtype, n, d, constant, eps):
    """All samples alike: no covariance, no difference, and a hinge of 1 − √ε; a mixed loss of D."""
    z = torch.full((n, d), constant, dtype=dtype)
    terms = vicreg_loss(z, z, eps=eps, algorithm=algorithm, return_terms=True)
    assert_near(terms.variance, 1 - eps**0.5, 1e-6 if dtype == torch.float32 else 1e-14)
    assert not terms.invariance.any()
    assert not terms.covariance.any()
    assert RELATIVES["mixed"].loss(z, z, z, algorithm=algorithm) == d


def test_views_that_are_alike_and_white_cost_nothing(algorithm):
    corners = [[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]]
    z = torch.tensor(corners, dtype=torch.float64, device=strategies.DEVICE)
    assert vicreg_loss(z, z, z, algorithm=algorithm) == 0
    assert vicreg_loss(z, -z, algorithm=algorithm, return_terms=True).invariance == 16
    assert mixed_barlow_twins_loss(z, z, z, 1.0, torch.arange(4), eps=0.0, algorithm=algorithm) == 0


def test_more_views_keep_the_scale_of_two(algorithm):
    """The same two views several times: v and c are theirs, and s has the pairs that differ, 4 of 6."""
    z1, z2 = Batch(9, 30, 3, "trained").views()
    two = vicreg_loss(z1, z2, algorithm=algorithm, return_terms=True)
    four = vicreg_loss(z1, z2, z1, z2, algorithm=algorithm, return_terms=True)
    torch.testing.assert_close(four.variance, two.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(four.covariance, two.covariance, rtol=1e-12, atol=0)
    torch.testing.assert_close(four.invariance, two.invariance * 4 / 6, rtol=1e-12, atol=0)
