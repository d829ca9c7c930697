"""The laws of the loss at the tolerance of each precision; ../test_laws_*.py hold them tighter, in float32 and float64.

Two evaluations that a law says are equal may each be as far from the truth as precision.py allows.
"""

import pytest
import torch
from precision import draw, evaluate, exact, gradient_budget, loss_budget, near, on, rounding, terms

from barlow_loss import barlow_twins_loss
from comparison import LAMBD

SHAPES = [(32, 128), (33, 75)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "×".join(map(str, shape)))
def views(request):
    """Float64, on the CPU, exact in every dtype."""
    return draw(*request.param)


@pytest.fixture
def run(setting, backend, algorithm, device):
    """Evaluate float64 views of the CPU under the setting at hand."""

    def evaluated(*views, **settings):
        chosen = {"backend": backend, "algorithm": algorithm} | settings
        return evaluate(setting, *on(device, setting, *views), **chosen)

    return evaluated


def _signs(d):
    return torch.randint(2, (d,), generator=torch.Generator().manual_seed(d), dtype=torch.float64) * 2 - 1


def _order(length):
    return torch.randperm(length, generator=torch.Generator().manual_seed(length))


def test_p03_permuting_the_batch(setting, run, views):
    expected, order = exact(*views), _order(len(views[0]))
    plain, permuted = run(*views), run(*(view[order] for view in views))
    near(permuted.loss, plain.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = 2 * gradient_budget(setting, expected, view)
        near(permuted.gradients[view], plain.gradients[view].cpu()[order], budget, f"gradient of z{view + 1}")


def test_p05_permuting_the_features(setting, run, views):
    expected, order = exact(*views), _order(views[0].shape[1])
    plain, permuted = run(*views), run(*(view[:, order] for view in views))
    near(permuted.loss, plain.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = 2 * gradient_budget(setting, expected, view)
        near(permuted.gradients[view], plain.gradients[view].cpu()[:, order], budget, f"gradient of z{view + 1}")


def test_p06_swapping_the_views(setting, run, views):
    expected = exact(*views)
    straight, swapped = run(*views), run(*reversed(views))
    near(swapped.loss, straight.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = 2 * gradient_budget(setting, expected, view)
        near(swapped.gradients[1 - view], straight.gradients[view], budget, f"gradient of z{view + 1}")


def test_p07_shifting_the_features_of_one_view(setting, run, views):
    """By −2 … 2, which rounds no element."""
    expected = exact(*views)
    shift = torch.arange(views[0].shape[1], dtype=torch.float64) % 5 - 2
    plain, shifted = run(*views), run(views[0] + shift, views[1])
    near(shifted.loss, plain.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = 2 * gradient_budget(setting, expected, view)
        near(shifted.gradients[view], plain.gradients[view], budget, f"gradient of z{view + 1}")


@pytest.mark.parametrize("exponent", [-3, 4])
def test_p08_p09_scaling_both_views_and_root_eps(setting, run, views, exponent):
    """L(s·z; s²ε) = L(z; ε) and the gradient is 1/s; s is a power of two."""
    s, expected = 2.0**exponent, exact(*views)
    plain, scaled = run(*views), run(*(s * view for view in views), eps=s**2 * 1e-5)
    near(scaled.loss, plain.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = (2 + s) * gradient_budget(setting, expected, view)  # its smallest float16 numbers are s times larger
        near(s * scaled.gradients[view], plain.gradients[view], budget, f"gradient of z{view + 1}")


def test_p10_flipping_features_in_both_views_changes_no_bit(run, views):
    signs = _signs(views[0].shape[1])
    plain, flipped = run(*views), run(*(signs * view for view in views))
    assert torch.equal(flipped.loss, plain.loss)
    for view in (0, 1):
        assert torch.equal(flipped.gradients[view].cpu(), signs * plain.gradients[view].cpu())


def test_p11_flipping_features_in_one_view(setting, run, views):
    """L(s ⊙ z1, z2) = Σ_i (s_i C_ii − 1)² + λ·off."""
    signs, plain = _signs(views[0].shape[1]), exact(*views)
    right = (signs * plain.correlation.diagonal() - 1).square().sum() + LAMBD * plain.off_diagonal
    budget = loss_budget(setting, exact(signs * views[0], views[1]))
    near(run(signs * views[0], views[1]).loss, right, budget, "loss")


@pytest.mark.parametrize("copies", [2, 3])
def test_p12_duplicating_the_batch(setting, run, views, copies):
    expected = exact(*views)
    single, repeated = run(*views), run(*(view.repeat(copies, 1) for view in views))
    near(repeated.loss, single.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = (1 + copies) * gradient_budget(setting, expected, view)
        for copy in repeated.gradients[view].chunk(copies):
            near(copies * copy, single.gradients[view], budget, f"gradient of z{view + 1}")


def test_p13_gradients_sum_to_zero(setting, run, views):
    n, d = views[0].shape
    expected, got = exact(*views), run(*views)
    for view in (0, 1):
        budget = n**0.5 * gradient_budget(setting, expected, view)
        near(got.gradients[view].sum(0), torch.zeros(d), budget, f"gradient of z{view + 1}")


@pytest.mark.parametrize("constant", [0.0, -3.75, 1024.0])
def test_p15_constant_features_add_one_each(setting, run, views, constant):
    count, d = 5, views[0].shape[1]
    padded = [torch.nn.functional.pad(view, (0, count), value=constant) for view in views]
    expected, plain, got = exact(*padded), run(*views), run(*padded)
    near(got.loss, plain.loss.double() + count, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        live, dead = got.gradients[view].split([d, count], dim=1)
        near(live, plain.gradients[view], 2 * gradient_budget(setting, expected, view), f"gradient of z{view + 1}")
        assert not dead.any()


@pytest.mark.parametrize("lambd", [0.0, 0.0051, 1.0])
def test_p16_affine_in_lambd(setting, backend, algorithm, device, views, lambd):
    weight = torch.tensor(lambd, dtype=setting.compute, device=device, requires_grad=True)
    inputs, settings = on(device, setting, *views), {"backend": backend, "algorithm": algorithm}
    loss, on_diagonal, off = terms(setting, *inputs, lambd=weight, **settings)
    (slope,) = torch.autograd.grad(loss, weight)
    few = 4 * torch.finfo(setting.compute).eps
    near(loss.detach(), on_diagonal.double() + lambd * off.double(), few * float(loss), "loss against its terms")
    near(slope, off.detach(), few * float(off), "dL/dλ")
    assert torch.equal(terms(setting, *inputs, lambd=lambd, **settings).off_diagonal, off.detach())


def test_p17_bounds(setting, run, views):
    n, d = views[0].shape
    got, unit = run(*views), 2.0**-9 if setting.half else 1e-5
    assert 0 <= float(got.on_diagonal) <= 4 * d * (1 + unit)
    assert 0 <= float(got.off_diagonal) <= d * (d - 1) + unit * d**2
    squares = float(got.off_diagonal) + float(exact(*views).correlation.diagonal().square().sum())
    assert squares * (1 + unit) >= float(exact(*views).correlation.trace()) ** 2 / (n - 1)


def test_p18_primal_equals_dual(setting, backend, device, views):
    inputs, expected = on(device, setting, *views), exact(*views)
    primal, dual = (evaluate(setting, *inputs, backend=backend, algorithm=name) for name in ("primal", "dual"))
    near(primal.loss, dual.loss, 2 * loss_budget(setting, expected), "loss")
    for view in (0, 1):
        budget = 2 * gradient_budget(setting, expected, view)
        near(primal.gradients[view], dual.gradients[view], budget, f"gradient of z{view + 1}")


@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, 1e4])
def test_p20_collapse_costs_exactly_d(setting, backend, algorithm, device, constant):
    """Of both views, without a gradient; of one, whose own gradient is not 0."""
    flat = torch.full((33, 75), constant, dtype=setting.views, device=device)
    settings = {"backend": backend, "algorithm": algorithm}
    both = evaluate(setting, flat, flat.clone(), **settings)
    assert float(both.loss) == 75
    assert not any(gradient.any() for gradient in both.gradients)
    (live,) = on(device, setting, draw(33, 75)[0])
    assert float(evaluate(setting, flat, live, **settings).loss) == 75
    assert float(evaluate(setting, live, flat, **settings).loss) == 75


def test_p20_collapse_of_the_features_onto_one(setting, run, views):
    """Every C_ij = k: D(1 − k)² + λD(D−1)k²."""
    z = views[0][:, :1].expand_as(views[0])
    v, d = float(z[:, 0].var(correction=0)), z.shape[1]
    k = v / (v + 1e-5)
    right = d * (1 - k) ** 2 + LAMBD * d * (d - 1) * k**2
    near(run(z, z).loss, right, 2 * loss_budget(setting, exact(z, z)), "loss")


def test_p23_same_tensor_as_both_views(setting, backend, algorithm, device, views):
    (z,) = on(device, setting, views[0])
    settings = {"backend": backend, "algorithm": algorithm}
    copies, expected = evaluate(setting, z, z.clone(), **settings), exact(views[0], views[0])
    leaf = z.requires_grad_()
    (got,) = torch.autograd.grad(setting.scale * terms(setting, leaf, leaf, **settings).loss, leaf)
    together = copies.gradients[0] + copies.gradients[1]
    budget = 2 * gradient_budget(setting, expected, 0) + rounding(setting, together)
    near(got.double() / setting.scale, together, budget, "gradient")


def test_p24_detaching_one_view_changes_no_bit_of_the_other(setting, backend, algorithm, device, views):
    inputs, settings = on(device, setting, *views), {"backend": backend, "algorithm": algorithm}
    both = evaluate(setting, *inputs, **settings)
    for view in (0, 1):
        leaves = [z.detach().requires_grad_(index == view) for index, z in enumerate(inputs)]
        loss = terms(setting, *leaves, **settings).loss
        (gradient,) = torch.autograd.grad(setting.scale * loss, leaves[view])
        assert torch.equal(loss.detach(), both.loss)
        assert torch.equal(gradient.double() / setting.scale, both.gradients[view])


@pytest.mark.parametrize(("n", "d"), [*SHAPES, (257, 1031), (256, 256)])
def test_p27_five_runs_give_the_same_bits(run, n, d):
    views = draw(n, d, seed=27)
    first = run(*views)
    for _ in range(4):
        again = run(*views)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(one, other) for one, other in zip(again.gradients, first.gradients, strict=True))


def test_p28_a_second_derivative_and_a_second_backward(setting, backend, algorithm, device, views):
    """The former is that of the plain formula, whatever the backend; the latter raises."""
    leaves = [view.requires_grad_() for view in on(device, setting, *views)]
    loss = terms(setting, *leaves, backend=backend, algorithm=algorithm).loss
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    (loss + sum(gradient.float().square().sum() for gradient in gradients)).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    loss = terms(setting, *leaves, backend=backend, algorithm=algorithm).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_p28_gradcheck(backend, algorithm, device):
    leaves = [view.to(device).requires_grad_() for view in draw(5, 9)]
    settings = {"backend": backend, "algorithm": algorithm}
    assert torch.autograd.gradcheck(lambda *z: barlow_twins_loss(*z, **settings), leaves)
