"""Laws of the gradient: what it is orthogonal to, and how the two views share it."""

import torch
from hypothesis import given

from barlow_loss import barlow_twins_loss
from comparison import LAMBD, assert_near, centered, evaluate, tolerance, truth
from strategies import batches, epsilons


@given(batch=batches(), eps=epsilons)
def test_p13_gradients_sum_to_zero_over_the_batch(algorithm, dtype, batch, eps):
    """Σ_n g_ni = 0 for any ε, since a shift leaves L; scale: √N times the gradient's norm."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2, eps=eps)
    got = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    for view in (0, 1):
        budget = batch.n**0.5 * expected.gradient_budget(view, tolerance(dtype, 1e-12, 1e-5), dtype)
        assert_near(got.gradients[view].double().sum(0), 0.0, budget, f"gradient of z{view + 1}")


@given(batch=batches(), eps=epsilons)
def test_p14_radial_gradient_is_what_eps_leaves_of_it(algorithm, dtype, batch, eps):
    """⟨g_i, z_i − μ_i⟩ = rowsum(M∘C)_i · ε/(v_i + ε): growing a feature helps only as far as ε matters."""
    _assert_radial_law(batch, dtype, eps, algorithm)


@given(batch=batches(kinds=("gaussian", "trained", "heavy_tailed", "low_rank"), means=(0.0, 1.0)))
def test_p14_radial_gradient_vanishes_without_eps(algorithm, dtype, batch):
    """ε = 0: the loss is scale-invariant and the gradient orthogonal to every centred feature."""
    _assert_radial_law(batch, dtype, 0.0, algorithm)


def _assert_radial_law(batch, dtype, eps, algorithm):
    """Scale: the sums that the law equates, by the absolute values of their terms (the dual's hold λC_ii² twice)."""
    z1, z2 = batch.views(dtype)
    C = truth(z1, z2, eps=eps).correlation
    M = 2 * LAMBD * C
    M.diagonal().copy_(2 * (C.diagonal() - 1))
    got = evaluate(z1, z2, eps=eps, algorithm=algorithm)
    for view, dim in ((0, 1), (1, 0)):
        x = centered((z1, z2)[view])
        g = got.gradients[view].double()
        share = eps / (x.square().mean(0) + eps)
        expected = (M * C).sum(dim) * share
        scale = (g * x).abs().sum(0) + (M * C).abs().sum(dim) + 4 * LAMBD * C.diagonal().square()
        error = ((g * x).sum(0) - expected).abs()
        assert bool((error <= tolerance(dtype, 1e-11, 1e-5) * scale).all()), f"view {view + 1}: {(error / scale).max()}"


@given(batch=batches(), eps=epsilons)
def test_p23_same_tensor_as_both_views_gets_both_gradients(algorithm, dtype, batch, eps):
    """L(z, z): ∂L/∂z = g1 + g2 of two separate copies."""
    z, _ = batch.views(dtype)
    copies = evaluate(z, z.clone(), eps=eps, algorithm=algorithm)
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(barlow_twins_loss(leaf, leaf, eps=eps, algorithm=algorithm), leaf)
    budget = 2 * truth(z, z, eps=eps).gradient_budget(0, tolerance(dtype, 1e-12, 1e-6), dtype)
    assert_near(gradient, copies.gradients[0] + copies.gradients[1], budget)


@given(batch=batches(), eps=epsilons)
def test_p24_detaching_one_view_leaves_the_gradient_of_the_other(algorithm, dtype, batch, eps):
    """The gradient of a view does not know, to the bit, whether the other one is being differentiated."""
    both = evaluate(*batch.views(dtype), eps=eps, algorithm=algorithm)
    for view in (0, 1):
        leaves = [leaf.requires_grad_(index == view) for index, leaf in enumerate(batch.views(dtype))]
        loss = barlow_twins_loss(*leaves, eps=eps, algorithm=algorithm)
        loss.backward()
        assert torch.equal(loss.detach(), both.loss)
        assert torch.equal(leaves[view].grad, both.gradients[view])
        assert leaves[1 - view].grad is None
