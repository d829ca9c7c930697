"""Laws of exactness: the loss is the paper's, in value and gradient, whatever the algorithm, size and data."""

import os

import pytest
import torch
from hypothesis import given

import strategies
from barlow_loss import barlow_twins_loss, cross_correlation
from comparison import assert_bitwise, assert_near, evaluate, tolerance, truth
from strategies import Batch, batches, epsilons, lambdas


@given(batch=batches(), lambd=lambdas, eps=epsilons)
def test_p01_value_equals_float64_dense(algorithm, dtype, batch, lambd, eps):
    """L, the on-diagonal sum and λ times the off-diagonal sum are those of the D×D formula in float64."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2, lambd, eps)
    got = evaluate(z1, z2, lambd=lambd, eps=eps, algorithm=algorithm)
    budget = expected.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype)
    assert_near(got.loss, expected.loss, budget, "loss")
    assert_near(got.on_diagonal, expected.on_diagonal, budget, "on-diagonal sum")
    assert_near(lambd * got.off_diagonal, lambd * expected.off_diagonal, budget, "weighted off-diagonal sum")


@given(batch=batches(), lambd=lambdas, eps=epsilons)
def test_p02_gradients_equal_float64_dense(algorithm, dtype, batch, lambd, eps):
    """∂L/∂z1 and ∂L/∂z2 are those of float64 autograd through the D×D formula (error by norm)."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2, lambd, eps)
    got = evaluate(z1, z2, lambd=lambd, eps=eps, algorithm=algorithm)
    for view in (0, 1):
        budget = expected.gradient_budget(view, tolerance(dtype, 1e-10, 1e-5), dtype)
        assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")


@given(batch=batches(), lambd=lambdas)
def test_p16_affine_in_lambd_with_the_off_diagonal_as_slope(algorithm, dtype, batch, lambd):
    """L(λ) = on + λ·off with terms that do not depend on λ, and dL/dλ = off."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2, lambd)
    weight = torch.tensor(lambd, dtype=dtype, device=strategies.DEVICE, requires_grad=True)
    loss, on, off = barlow_twins_loss(z1, z2, lambd=weight, algorithm=algorithm, return_terms=True)
    (slope,) = torch.autograd.grad(loss, weight)

    tol = tolerance(dtype, 1e-12, 1e-6)
    assert_near(loss.detach(), on.detach() + lambd * off.detach(), tol * float(loss.detach()), "loss against its terms")
    assert_near(slope, off.detach(), tol * float(off), "dL/dλ")
    unweighted = barlow_twins_loss(z1, z2, lambd=0.0, algorithm=algorithm, return_terms=True)
    assert_near(unweighted.loss, on.detach(), expected.value_budget(tol, dtype), "L(0)")
    assert torch.equal(unweighted.off_diagonal, off.detach())


@given(batch=batches(), lambd=lambdas, eps=epsilons)
def test_p17_bounds(algorithm, dtype, batch, lambd, eps):
    """|C_ij| ≤ 1; 0 ≤ on ≤ 4D; 0 ≤ off ≤ D(D−1); ‖C‖² ≥ tr(C)²/(N−1), for centred rows have rank N−1 at most."""
    z1, z2 = batch.views(dtype)
    n, d = z1.shape
    roundoff = 16 * torch.finfo(dtype).eps
    rounded_up = 1 + roundoff
    C = cross_correlation(z1, z2, eps=eps)
    assert float(C.abs().max()) <= rounded_up
    assert float(C.square().sum()) * rounded_up >= float(C.trace()) ** 2 / (n - 1)

    got = evaluate(z1, z2, lambd=lambd, eps=eps, algorithm=algorithm)
    assert 0 <= float(got.on_diagonal) <= 4 * d * rounded_up
    # ‖C‖² ≤ D² is known to `roundoff`; the dual subtracts the diagonal from it.
    assert 0 <= float(got.off_diagonal) <= d * (d - 1) + roundoff * d**2
    assert 0 <= float(got.loss) <= (4 * d + lambd * d * (d - 1)) + roundoff * (4 * d + lambd * d**2)


@given(batch=batches(), lambd=lambdas, eps=epsilons)
def test_p18_primal_equals_dual(dtype, batch, lambd, eps):
    """The D×D and the N×N form are one function: the same value and the same gradients."""
    z1, z2 = batch.views(dtype)
    expected = truth(z1, z2, lambd, eps)
    primal, dual = (evaluate(z1, z2, lambd=lambd, eps=eps, algorithm=algorithm) for algorithm in ("primal", "dual"))
    tol = tolerance(dtype, 1e-12, 1e-6)
    assert_near(primal.loss, dual.loss, expected.value_budget(tol, dtype))
    for view in (0, 1):
        budget = expected.gradient_budget(view, tol, dtype)
        assert_near(primal.gradients[view], dual.gradients[view], budget, f"gradient of z{view + 1}")


@pytest.mark.parametrize(
    ("n", "d"),
    [
        pytest.param(24, 96, id="N<D"),
        pytest.param(33, 33, id="N=D"),
        pytest.param(96, 24, id="N>D"),
        pytest.param(
            *(520, 515),
            id="in blocks",
            marks=pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="takes a minute in triton's interpreter"),
        ),
    ],
)
def test_p27_five_runs_give_the_same_bits(algorithm, dtype, n, d):
    """The same inputs and the same number of threads give the same bits."""
    z1, z2 = Batch(n, d, 27, "trained").views(dtype)
    first = evaluate(z1, z2, algorithm=algorithm)
    for _ in range(4):
        assert_bitwise(evaluate(z1, z2, algorithm=algorithm), first)


@given(batch=batches(kinds=("gaussian", "trained", "heavy_tailed", "low_rank"), means=(1e4,), stds=(1e-2,)))
def test_p29_mean_1e4_std_1e_2_in_float32(algorithm, batch):
    """Features far from 0: the float32 gradient stays within 1e-5 of float64 on the same float32 input."""
    z1, z2 = batch.views(torch.float32)
    expected = truth(z1, z2)
    got = evaluate(z1, z2, algorithm=algorithm)
    assert_near(got.loss, expected.loss, expected.value_budget(2e-6, torch.float32), "loss")
    for view in (0, 1):
        budget = expected.gradient_budget(view, 1e-5, torch.float32)
        assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")
