"""Laws with a value that can be written down: the identity, collapse, anti-correlation, the smallest shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from barlow_loss import barlow_twins_loss, cross_correlation
from comparison import EPS, LAMBD, assert_near, centered, evaluate, tolerance, truth
from strategies import Batch, batches, epsilons, whitened_batches

sizes = st.tuples(st.integers(2, 24), st.integers(1, 32))
constants = st.sampled_from([0.0, 1.0, -0.1, 1e4])


@given(batch=whitened_batches())
def test_p19_identity_of_whitened_equal_views(algorithm, dtype, batch):
    """C = k·I with k = v/(v + ε): the loss is D(1 − k)² = D(ε/(v + ε))², small and not 0."""
    z1, z2 = batch.views(dtype)
    v = batch.std**2
    expected = batch.d * (EPS / (v + EPS)) ** 2
    budget = truth(z1, z2).rounded_input_budget(tolerance(dtype, 1e-11, 2e-6), dtype)
    assert_near(barlow_twins_loss(z1, z2, algorithm=algorithm), expected, budget)


@given(size=sizes, first=constants, second=constants, eps=epsilons)
def test_p20_collapse_of_both_views_costs_exactly_d(algorithm, dtype, size, first, second, eps):
    """Every sample alike: C = 0, L = D exactly, and the gradient is exactly 0: collapse is a plateau, not a NaN."""
    z1, z2 = (torch.full(size, constant, dtype=dtype, device=strategies.DEVICE) for constant in (first, second))
    got = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    assert float(got.loss) == size[1]
    assert not got.gradients[0].any()
    assert not got.gradients[1].any()


@given(batch=batches(), constant=constants)
def test_p20_collapse_of_one_view_costs_exactly_d(algorithm, dtype, batch, constant):
    """One constant view is enough for C = 0. Its own gradient, −2 r ẑ2/N, is not 0: the other view pulls it away."""
    z2, _ = batch.views(dtype)
    z1 = torch.full_like(z2, constant)
    got, expected = evaluate(z1, z2, algorithm=algorithm), truth(z1, z2)
    assert float(got.loss) == batch.d
    budget = expected.gradient_budget(0, tolerance(dtype, 1e-10, 1e-5), dtype)
    assert_near(got.gradients[0], expected.gradients[0], budget, "gradient of the constant view")
    assert not got.gradients[1].any()


@given(batch=batches(means=(0.0, 1e4)), eps=epsilons)
def test_p20_collapse_of_the_features_onto_one(algorithm, dtype, batch, eps):
    """All features equal, views equal: every C_ij = k, so L = D(1 − k)² + λD(D−1)k²."""
    feature = batch.views(dtype)[0][:, -1:]
    z = feature.expand(batch.n, batch.d).contiguous()
    v = centered(feature).square().mean()
    k = float(v / (v + eps))
    expected = batch.d * (1 - k) ** 2 + LAMBD * batch.d * (batch.d - 1) * k**2
    budget = truth(z, z, eps=eps).value_budget(tolerance(dtype, 1e-12, 2e-6), dtype)
    assert_near(barlow_twins_loss(z, z, eps=eps, algorithm=algorithm), expected, budget)


@given(batch=whitened_batches())
def test_p21_opposite_whitened_views_cost_most(algorithm, dtype, batch):
    """z2 = −z1: C = −k·I, so L = D(1 + k)²."""
    z1, _ = batch.views(dtype)
    v = batch.std**2
    expected = batch.d * (1 + v / (v + EPS)) ** 2
    budget = truth(z1, -z1).rounded_input_budget(tolerance(dtype, 1e-11, 2e-6), dtype)
    assert_near(barlow_twins_loss(z1, -z1, algorithm=algorithm), expected, budget)


@given(batch=batches(means=(0.0, 1e4)), eps=epsilons)
def test_p22_one_feature_costs_one_minus_its_correlation_squared(algorithm, dtype, batch, eps):
    """D = 1: L = (1 − c)² and there is no off-diagonal."""
    z1, z2 = (view[:, -1:] for view in batch.views(dtype))
    expected = truth(z1, z2, eps=eps)
    got = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    c = float(expected.correlation)
    assert_near(got.loss, (1 - c) ** 2, expected.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype))
    # In the dual: S − C_11², one number summed in two ways from terms of at most 1.
    assert float(got.off_diagonal) <= 8 * torch.finfo(dtype).eps


@given(d=st.integers(1, 32), seed=st.integers(0, 999))
def test_p22_two_samples_correlate_fully(algorithm, dtype, d, seed):
    """N = 2 and v ≫ ε: every standardised feature is ±1, so |C_ij| = 1 and L = 4·(opposite features) + λD(D−1)."""
    z1, z2 = (1e4 * view for view in Batch(2, d, seed, "gaussian").views(dtype))
    # Two samples of a feature may be near each other by chance; half the distance squared is their variance.
    least_variance = float(torch.stack([z1, z2]).double().diff(dim=1).div(2).square().min())
    shortfall = EPS / least_variance
    C = cross_correlation(z1, z2)
    assert_near(C.abs().max(), 1.0, shortfall + 8 * torch.finfo(dtype).eps)
    opposite = int((C.diagonal() < 0).sum())
    expected = 4 * opposite + LAMBD * d * (d - 1)
    tol = tolerance(dtype, 1e-12, 2e-6)
    assert_near(barlow_twins_loss(z1, z2, algorithm=algorithm), expected, (tol + 4 * shortfall) * 4 * d)


def test_p19_p20_the_two_ends_in_plain_numbers(algorithm):
    """Four samples, two features, no rounding anywhere: 0 for perfect views (ε = 0), D for collapsed ones."""
    corners = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
    z = torch.tensor(corners, dtype=torch.float64, device=strategies.DEVICE)
    assert float(barlow_twins_loss(z, z, eps=0.0, algorithm=algorithm)) == 0.0
    assert float(barlow_twins_loss(z, torch.ones_like(z), algorithm=algorithm)) == 2.0
    assert float(barlow_twins_loss(z, -z, eps=0.0, algorithm=algorithm)) == pytest.approx(8.0)
