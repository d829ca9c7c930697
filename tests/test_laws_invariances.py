"""Laws of invariance: what may be done to both views, or to one, and what the loss then does."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from barlow_loss import barlow_twins_loss
from comparison import EPS, LAMBD, assert_near, evaluate, tolerance, truth
from strategies import batches, epsilons, stds_near_root_eps

# Laws whose transformation rounds the inputs once more keep the mean within the spread.
centred_batches = batches(means=(0.0, 1.0), stds=(1.0, 1e2))


def _signs(batch):
    return (torch.randint(2, (batch.d,), generator=batch.generator(), dtype=torch.float64) * 2 - 1).to(
        strategies.DEVICE
    )


@given(batch=batches())
def test_p03_permuting_the_batch_leaves_the_loss(algorithm, dtype, batch):
    """The samples of both views may come in any common order."""
    z1, z2 = batch.views(dtype)
    order = torch.randperm(batch.n, generator=batch.generator())
    loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
    permuted = barlow_twins_loss(z1[order], z2[order], algorithm=algorithm)
    assert_near(permuted, loss, truth(z1, z2).value_budget(tolerance(dtype, 1e-12, 5e-6), dtype))


@given(batch=centred_batches)
def test_p04_rotating_the_batch_leaves_the_loss(algorithm, dtype, batch):
    """Any orthogonal Q over the samples with Q1 = 1: the loss knows the batch through its Gram matrices alone."""
    z1, z2 = batch.views(torch.float64)
    basis = torch.randn(batch.n, batch.n, generator=batch.generator(), dtype=torch.float64)
    basis[:, 0] = 1
    basis, _ = torch.linalg.qr(basis)  # Its first column is ±1/√N.
    rotation = torch.eye(batch.n, dtype=torch.float64)
    rotation[1:, 1:], _ = torch.linalg.qr(torch.randn_like(rotation[1:, 1:]))
    Q = basis @ rotation @ basis.T
    assert torch.allclose(Q.sum(1), torch.ones(batch.n, dtype=torch.float64))

    loss = barlow_twins_loss(z1.to(dtype), z2.to(dtype), algorithm=algorithm)
    rotated = [(Q.to(view.device) @ view).to(dtype) for view in (z1, z2)]
    budget = truth(*rotated).rounded_input_budget(tolerance(dtype, 1e-11, 1e-5), dtype)
    assert_near(barlow_twins_loss(*rotated, algorithm=algorithm), loss, budget)


@given(batch=batches())
def test_p05_permuting_the_features_leaves_the_loss(algorithm, dtype, batch):
    """The features of both views may come in any common order."""
    z1, z2 = batch.views(dtype)
    order = torch.randperm(batch.d, generator=batch.generator())
    loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
    permuted = barlow_twins_loss(z1[:, order], z2[:, order], algorithm=algorithm)
    assert_near(permuted, loss, truth(z1, z2).value_budget(tolerance(dtype, 1e-12, 2e-6), dtype))


@given(batch=batches())
def test_p06_swapping_the_views_leaves_the_loss_and_swaps_the_gradients(algorithm, dtype, batch):
    """L(z1, z2) = L(z2, z1)."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2)
    straight, swapped = evaluate(z1, z2, algorithm=algorithm), evaluate(z2, z1, algorithm=algorithm)
    tol = tolerance(dtype, 1e-12, 1e-6)
    assert_near(swapped.loss, straight.loss, expected.value_budget(tol, dtype))
    for view in (0, 1):
        budget = expected.gradient_budget(view, tol, dtype)
        assert_near(swapped.gradients[1 - view], straight.gradients[view], budget, f"gradient of z{view + 1}")


@given(batch=centred_batches, eps=epsilons)
def test_p07_shifting_the_features_of_one_view_leaves_the_loss(algorithm, dtype, batch, eps):
    """L(z1 + a, z2) = L(z1, z2) for any row a and any ε."""
    z1, z2 = batch.views(dtype)
    shift = 3 * batch.std * torch.randn(batch.d, generator=batch.generator(), dtype=torch.float64)
    shifted = (z1.double() + shift.to(z1.device)).to(dtype)
    loss = barlow_twins_loss(z1, z2, eps=eps, algorithm=algorithm)
    budget = truth(shifted, z2, eps=eps).rounded_input_budget(tolerance(dtype, 1e-11, 1e-5), dtype)
    assert_near(barlow_twins_loss(shifted, z2, eps=eps, algorithm=algorithm), loss, budget)


@given(batch=centred_batches, eps=epsilons, scale=st.floats(0.05, 20))
def test_p08_scaling_both_views_and_root_eps_leaves_the_loss(algorithm, dtype, batch, eps, scale):
    """L(s·z; s²ε) = L(z; ε)."""
    z1, z2 = batch.views(dtype)
    scaled = [(scale * view.double()).to(dtype) for view in (z1, z2)]
    loss = barlow_twins_loss(z1, z2, eps=eps, algorithm=algorithm)
    budget = truth(*scaled, eps=scale**2 * eps).rounded_input_budget(tolerance(dtype, 1e-12, 5e-6), dtype)
    assert_near(barlow_twins_loss(*scaled, eps=scale**2 * eps, algorithm=algorithm), loss, budget)


@given(batch=batches(kinds=("near_collapsed",), means=(0.0,), stds=(1.0,)))
def test_p08_scale_alone_changes_the_loss(algorithm, dtype, batch):
    """With ε > 0 the loss is not scale-invariant: a spread of about √ε is not the same as ten times that."""
    z1, z2 = batch.views(dtype)
    loss, scaled = (barlow_twins_loss(s * z1, s * z2, lambd=0.0, algorithm=algorithm) for s in (1, 10))
    assert abs(float(loss) - float(scaled)) > 1e-3 * float(loss)


@given(batch=batches(), eps=epsilons, exponent=st.integers(-6, 6))
def test_p09_gradients_scale_inversely(algorithm, dtype, batch, eps, exponent):
    """g(s·z; s²ε) = g(z; ε)/s; s is a power of two, which rounds no input."""
    z1, z2 = batch.views(dtype)
    s = 2.0**exponent
    plain = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    scaled = evaluate(s * z1, s * z2, eps=s**2 * eps, algorithm=algorithm)
    expected = truth(z1, z2, eps=eps)
    for view in (0, 1):
        budget = expected.gradient_budget(view, tolerance(dtype, 1e-10, 5e-5), dtype)
        assert_near(s * scaled.gradients[view], plain.gradients[view], budget, f"gradient of z{view + 1}")


@given(batch=batches(), eps=epsilons)
def test_p10_flipping_features_in_both_views_changes_no_bit(algorithm, dtype, batch, eps):
    """The sign of a feature is arbitrary: the same loss, and gradients with the signs flipped, bit for bit."""
    z1, z2 = batch.views(dtype)
    signs = _signs(batch).to(dtype)
    plain = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    flipped = evaluate(signs * z1, signs * z2, eps=eps, algorithm=algorithm)
    assert torch.equal(flipped.loss, plain.loss)
    for view in (0, 1):
        assert torch.equal(flipped.gradients[view], signs * plain.gradients[view])


@given(batch=batches())
def test_p11_flipping_features_in_one_view_flips_their_correlation(algorithm, dtype, batch):
    """L(s ⊙ z1, z2) = Σ_i (s_i C_ii − 1)² + λ·off."""
    z1, z2 = batch.views(dtype)
    signs = _signs(batch)
    plain, flipped = truth(z1, z2), truth(signs * z1, z2)
    expected = (signs * plain.correlation.diagonal() - 1).square().sum() + LAMBD * plain.off_diagonal
    got = barlow_twins_loss(signs.to(dtype) * z1, z2, algorithm=algorithm)
    assert_near(got, expected, flipped.value_budget(tolerance(dtype, 1e-12, 1e-6), dtype))


@given(batch=batches(), copies=st.integers(2, 4))
def test_p12_duplicating_the_batch_leaves_the_loss_and_divides_the_gradient(algorithm, dtype, batch, copies):
    """k copies of every sample: the same mean, variance and C, so the same L; each copy's gradient is 1/k."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2)
    single = evaluate(z1, z2, algorithm=algorithm)
    repeated = evaluate(z1.repeat(copies, 1), z2.repeat(copies, 1), algorithm=algorithm)
    tol = tolerance(dtype, 1e-12, 1e-5)
    assert_near(repeated.loss, single.loss, expected.value_budget(tol, dtype))
    for view in (0, 1):
        budget = expected.gradient_budget(view, tol, dtype)
        for copy in repeated.gradients[view].chunk(copies):
            assert_near(copies * copy, single.gradients[view], budget, f"gradient of z{view + 1}")


@given(batch=batches(), count=st.integers(1, 5), constant=st.sampled_from([0.0, 0.1, -3.7, 1e4]))
def test_p15_constant_features_add_one_each_and_nothing_else(algorithm, dtype, batch, count, constant):
    """A feature that is constant in both views has C_ij = 0: it adds (0 − 1)² = 1, its own gradient is exactly 0."""
    z1, z2 = batch.views(dtype)
    padded = [torch.cat([view, view.new_full((batch.n, count), constant)], dim=1) for view in (z1, z2)]
    expected = truth(*padded)
    plain, with_constants = evaluate(z1, z2, algorithm=algorithm), evaluate(*padded, algorithm=algorithm)
    tol = tolerance(dtype, 1e-12, 1e-6)
    assert_near(with_constants.loss, plain.loss.double() + count, expected.value_budget(tol, dtype))
    for view in (0, 1):
        live, dead = with_constants.gradients[view].split([batch.d, count], dim=1)
        budget = expected.gradient_budget(view, tol, dtype)
        assert_near(live, plain.gradients[view], budget, f"gradient of z{view + 1}")
        assert not dead.any()


@given(batch=batches(kinds=("gaussian", "trained", "near_collapsed"), means=(0.0,)), std=stds_near_root_eps)
def test_eps_is_added_to_the_biased_variance_inside_the_root(algorithm, dtype, batch, std):
    """For one feature, C = cov/√((v1 + ε)(v2 + ε)) with sums divided by N: neither √v + ε nor N − 1 gives this."""
    z1, z2 = (std * view[:, :1] for view in batch.views(torch.float64))
    x1, x2 = (view - view.mean() for view in (z1, z2))
    c = (x1 * x2).mean() / ((x1.square().mean() + EPS) * (x2.square().mean() + EPS)).sqrt()
    views = (z1.to(dtype), z2.to(dtype))
    budget = truth(*views).rounded_input_budget(tolerance(dtype, 1e-12, 2e-6), dtype)
    assert_near(barlow_twins_loss(*views, algorithm=algorithm), (c - 1) ** 2, budget)
