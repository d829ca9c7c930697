"""Laws of more than two views: the weighted mean over pairs, at a cost linear in the number of views."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barlow_loss import barlow_twins_loss
from comparison import EPS, LAMBD, assert_near, tolerance, truth
from strategies import Batch, batches

counts = st.sampled_from([2, 3, 4, 6])
centred_batches = batches(means=(0.0, 1.0), stds=(1.0, 1e2))


def random_weights(views: int, seed: int, zeros: bool = True) -> list[list[float]]:
    """Symmetric, of different sizes, a third of them 0, but never all."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(views, views, generator=generator, dtype=torch.float64).triu(1)
    if zeros:
        upper *= torch.rand(views, views, generator=generator) > 1 / 3
    upper[0, 1] += 0.1
    return (upper + upper.T).tolist()


def evaluate(views, **settings):
    leaves = [view.detach().requires_grad_() for view in views]
    terms = barlow_twins_loss(*leaves, return_terms=True, **settings)
    return [term.detach() for term in terms], torch.autograd.grad(terms.loss, leaves)


class Mean:
    """The weighted mean of the float64 truths of the pairs, and of their budgets."""

    def __init__(self, views, weights=None, lambd=LAMBD, **definition):
        pairs = list(itertools.combinations(range(len(views)), 2))
        weights = {(i, j): 1.0 if weights is None else weights[i][j] for i, j in pairs}
        total = sum(weights.values())
        used = [pair for pair in pairs if weights[pair]]
        self.truths = {(i, j): truth(views[i], views[j], lambd, **definition) for i, j in used}
        self.shares = {pair: weights[pair] / total for pair in self.truths}
        self.loss = self._sum(lambda found: found.loss)
        self.gradients = [torch.zeros_like(view, dtype=torch.float64) for view in views]
        for (i, j), found in self.truths.items():
            self.gradients[i] += self.shares[i, j] * found.gradients[0]
            self.gradients[j] += self.shares[i, j] * found.gradients[1]

    def _sum(self, of):
        return sum(self.shares[pair] * of(found) for pair, found in self.truths.items())

    def value_budget(self, tol, dtype):
        return float(self._sum(lambda found: found.value_budget(tol, dtype)))

    def gradient_budget(self, view, tol, dtype):
        return sum(
            self.shares[pair] * found.gradient_budget(pair.index(view), tol, dtype)
            for pair, found in self.truths.items()
            if view in pair
        )

    def assert_holds(self, terms, gradients, dtype):
        assert_near(terms[0], self.loss, self.value_budget(tolerance(dtype, 1e-12, 2e-6), dtype))
        for view, gradient in enumerate(gradients):
            budget = self.gradient_budget(view, tolerance(dtype, 1e-10, 1e-5), dtype)
            assert_near(gradient, self.gradients[view], budget, f"gradient of z{view + 1}")


@given(batch=batches(), views=counts, weighted=st.booleans())
def test_the_loss_is_the_weighted_mean_over_pairs(algorithm, dtype, batch, views, weighted):
    """Value and gradients, with and without weights."""
    z = batch.more_views(views, dtype)
    weights = random_weights(views, batch.seed) if weighted else None
    Mean(z, weights).assert_holds(*evaluate(z, algorithm=algorithm, pair_weights=weights), dtype)


@given(batch=batches(), views=counts)
def test_views_may_come_in_any_order_with_their_weights(algorithm, dtype, batch, views):
    z, weights = batch.more_views(views, dtype), random_weights(views, batch.seed)
    order = torch.randperm(views, generator=batch.generator()).tolist()
    terms, gradients = evaluate(
        [z[i] for i in order],
        algorithm=algorithm,
        pair_weights=[[weights[i][j] for j in order] for i in order],
    )
    Mean(z, weights).assert_holds(terms, [gradients[order.index(i)] for i in range(views)], dtype)


@given(batch=batches(kinds=("trained", "gaussian", "low_rank")), views=st.sampled_from([3, 4, 6]))
def test_a_view_whose_weights_are_0_is_not_there(algorithm, dtype, batch, views):
    """Its gradient is 0, and the others are those of a call without it."""
    z, weights = batch.more_views(views, dtype), random_weights(views, batch.seed)
    absent = views - 1
    weights[absent] = [0.0] * views
    for row in weights:
        row[absent] = 0.0
    terms, gradients = evaluate(z, algorithm=algorithm, pair_weights=weights)
    assert torch.equal(gradients[absent], torch.zeros_like(z[absent]))
    kept = [row[:absent] for row in weights[:absent]]
    Mean(z[:absent], kept).assert_holds(terms, gradients[:absent], dtype)


@given(batch=centred_batches, views=counts)
def test_samples_and_features_may_come_in_any_common_order(algorithm, dtype, batch, views):
    z = batch.more_views(views, dtype)
    rows = torch.randperm(batch.n, generator=batch.generator())
    columns = torch.randperm(batch.d, generator=batch.generator())
    loss = barlow_twins_loss(*(view[rows][:, columns] for view in z), algorithm=algorithm)
    expected = Mean(z)
    assert_near(loss, expected.loss, expected.value_budget(tolerance(dtype, 1e-12, 5e-6), dtype))


@given(batch=batches(), views=counts)
def test_primal_and_dual_agree(dtype, batch, views):
    z, weights = batch.more_views(views, dtype), random_weights(views, batch.seed)
    primal, dual = (evaluate(z, algorithm=name, pair_weights=weights) for name in ("primal", "dual"))
    expected = Mean(z, weights)
    for got in (primal, dual):
        expected.assert_holds(*got, dtype)


@given(batch=batches(), scale=st.sampled_from([1e-300, 0.3, 7.0, 1e300]))
def test_two_views_have_one_pair_whatever_its_weight(algorithm, dtype, batch, scale):
    """To the last bit."""
    z = batch.views(dtype)
    plain = evaluate(z, algorithm=algorithm)
    weighted = evaluate(z, algorithm=algorithm, pair_weights=[[0, scale], [scale, 0]])
    for one, other in zip(plain, weighted, strict=True):
        assert all(map(torch.equal, one, other))


@given(batch=batches(kinds=("trained", "gaussian")), views=st.sampled_from([3, 4]))
def test_a_view_without_gradient_leaves_the_others_as_they_are(algorithm, dtype, batch, views):
    """Bitwise."""
    z = batch.more_views(views, dtype)
    _, gradients = evaluate(z, algorithm=algorithm)
    for wanted in itertools.product([True, False], repeat=views):
        leaves = [view.detach().requires_grad_(want) for view, want in zip(z, wanted, strict=True)]
        loss = barlow_twins_loss(*leaves, algorithm=algorithm)
        if any(wanted):
            loss.backward()
        for leaf, want, gradient in zip(leaves, wanted, gradients, strict=True):
            assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize("views", [3, 4, 6])
def test_gradcheck(algorithm, views):
    """Of all three terms, with weights; λ too."""
    z = [view.requires_grad_() for view in Batch(5, 7, 1, "gaussian").more_views(views)]
    lambd = torch.tensor(0.3, dtype=torch.float64, device=z[0].device, requires_grad=True)
    weights = random_weights(views, 3)

    def terms(weight, *leaves):
        settings = {"algorithm": algorithm, "pair_weights": weights, "return_terms": True}
        return tuple(barlow_twins_loss(*leaves, lambd=weight, **settings))

    assert torch.autograd.gradcheck(terms, (lambd, *z), fast_mode=True)


def test_terms_are_means_over_pairs(algorithm):
    z = Batch(12, 30, 1, "trained").more_views(4)
    (loss, on, off), _ = evaluate(z, algorithm=algorithm)
    pairs = [truth(*pair) for pair in itertools.combinations(z, 2)]
    assert_near(on, sum(pair.on_diagonal for pair in pairs) / 6, 1e-11)
    assert_near(off, sum(pair.off_diagonal for pair in pairs) / 6, 1e-10)
    assert loss == on + LAMBD * off


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_anywhere_makes_the_loss_nan(algorithm, bad, place):
    z = list(Batch(8, 20, 1, "trained").more_views(3))
    z[place][3, 5] = bad
    assert barlow_twins_loss(*z, algorithm=algorithm).isnan()


def test_strided_views_give_the_bits_of_their_copies_and_stay_as_they_are(algorithm):
    wide = torch.stack(Batch(9, 24, 1, "trained").more_views(4, torch.float32), dim=2)
    strided = wide.unbind(2)
    before = wide.clone()
    got, expected = evaluate(strided, algorithm=algorithm), evaluate([z.clone() for z in strided], algorithm=algorithm)
    for one, other in zip(got, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(wide, before)


def test_one_tensor_as_several_views_gets_the_sum_of_their_gradients(algorithm):
    z1, z2, z3 = Batch(9, 24, 1, "trained").more_views(3)
    _, gradients = evaluate((z1, z2, z1, z3), algorithm=algorithm)
    leaf = z1.detach().requires_grad_()
    (got,) = torch.autograd.grad(barlow_twins_loss(leaf, z2, leaf, z3, algorithm=algorithm), leaf)
    torch.testing.assert_close(got, gradients[0] + gradients[2], rtol=1e-12, atol=1e-14)


def test_the_floor_is_that_of_a_pair():
    """All views alike and whitened: D (ε/(v + ε))², as for two."""
    z = Batch(32, 8, 1, "whitened").views()[0]
    loss = barlow_twins_loss(z, z, z, z)
    assert_near(loss, 8 * (EPS / (1 + EPS)) ** 2, 1e-11)
