"""The hand-written backward: against finite differences, against autograd, and as autograd expects it to behave."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import strategies
from barlow_loss import barlow_twins_loss, reference
from comparison import LAMBD, assert_near, evaluate, truth
from strategies import Batch

# Sizes that a block, a leaf of a recursion or a vector lane does not divide, on either side of N = D/2 and N = D.
# Column sums of products go in blocks of rows from 2¹⁹ elements on.
SHAPES = [
    (2, 1),  # the smallest legal input
    (2, 3),  # two samples: rank one, every |C_ij| near 1
    (3, 2),  # the smallest batch with a free direction left, N > D
    (5, 1),  # no off-diagonal
    (7, 13),  # N just above D/2: "auto" turns to the primal
    (6, 13),  # N just below D/2: "auto" turns to the dual
    (17, 17),  # N = D, one above a power of two
    (31, 67),  # N < D/2, primes
    (67, 31),  # N > D, primes
    (129, 40),  # one row above twice a leaf of 64 rows: the Gram matrix is put together from blocks, oddly split
    (257, 300),  # one row above four leaves
    (300, 1800),  # blocks of rows, the last one short
    (1030, 560),  # blocks of rows, the last one short
    (730, 727),  # blocks of rows, N just above D
]


@pytest.fixture(params=[(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, -2.0, 3.0)], ids=str)
def weights(request):
    """Upstream gradients of loss, on-diagonal and off-diagonal sum."""
    return request.param


def _combine(terms, weights):
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def _leaves(n, d, dtype=torch.float64, kind="trained", mean=0.5):
    return [view.requires_grad_() for view in Batch(n, d, 100 * n + d, kind, mean=mean).views(dtype)]


@pytest.mark.parametrize("kind", ["trained", "dead_features", "low_rank"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_parity_with_float64_autograd(algorithm, n, d, kind):
    """Value and gradients of float32 and float64 against float64 autograd through the oracle."""
    for dtype, value_tol, gradient_tol in ((torch.float64, 1e-12, 1e-10), (torch.float32, 2e-6, 1e-5)):
        z1, z2 = Batch(n, d, 100 * n + d, kind, mean=0.5).views(dtype)
        expected, got = truth(z1, z2), evaluate(z1, z2, algorithm=algorithm)
        assert_near(got.loss, expected.loss, expected.value_budget(value_tol, dtype), f"{dtype} loss")
        for view in (0, 1):
            budget = expected.gradient_budget(view, gradient_tol, dtype)
            assert_near(got.gradients[view], expected.gradients[view], budget, f"{dtype} gradient of z{view + 1}")


@pytest.mark.parametrize(("n", "d"), [(2, 3), (4, 9), (6, 6), (9, 4), (5, 1)])
def test_p28_gradcheck(algorithm, n, d):
    """Finite differences in float64 agree with the gradients of all three results in both views and λ."""
    lambd = torch.tensor(LAMBD, dtype=torch.float64, device=strategies.DEVICE, requires_grad=True)

    def terms(z1, z2, lambd):
        return tuple(barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm, return_terms=True))

    assert torch.autograd.gradcheck(terms, (*_leaves(n, d), lambd), check_undefined_grad=True)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["z1", "z2"])
def test_p28_gradcheck_of_one_view(algorithm, needs):
    """The same with the other view detached."""
    views = [view.requires_grad_(need) for view, need in zip(Batch(4, 7, 3, "trained").views(), needs, strict=True)]
    assert torch.autograd.gradcheck(lambda *z: barlow_twins_loss(*z, algorithm=algorithm), views)


def test_each_term_has_its_own_gradient(algorithm, weights):
    """Any weighting of loss, on-diagonal and off-diagonal sum differentiates like the oracle's, λ included."""
    views = _leaves(7, 11)
    lambd = torch.tensor(0.3, dtype=torch.float64, device=strategies.DEVICE, requires_grad=True)
    got = torch.autograd.grad(
        _combine(barlow_twins_loss(*views, lambd=lambd, algorithm=algorithm, return_terms=True), weights),
        [*views, lambd],
        materialize_grads=True,
    )
    expected = torch.autograd.grad(
        _combine(reference.barlow_twins_loss(*views, lambd=lambd), weights), [*views, lambd], materialize_grads=True
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("upstream", [3.5, -2.0, 0.0])
def test_gradients_are_multiplied_by_the_upstream_gradient(algorithm, dtype, upstream):
    """∂(a·L)/∂z = a·∂L/∂z."""
    views = _leaves(7, 11, dtype)
    got = torch.autograd.grad(upstream * barlow_twins_loss(*views, algorithm=algorithm), views)
    plain = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views)
    torch.testing.assert_close(got, tuple(upstream * gradient for gradient in plain))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_the_upstream_gradient_is_applied_before_rounding_to_16_bits(algorithm, half):
    """A GradScaler's factor must lift small gradients above float16's underflow, not multiply zeros."""
    n, d, scale = 512, 96, 2.0**16
    leaves = [(30 * view).to(half).requires_grad_() for view in Batch(n, d, 5, "trained").views()]
    expected = truth(*(leaf.detach() for leaf in leaves))
    tiny = torch.finfo(torch.float16).tiny
    assert max(float(gradient.abs().max()) for gradient in expected.gradients) < tiny * 40, "the case is not small"
    got = torch.autograd.grad(scale * barlow_twins_loss(*leaves, algorithm=algorithm), leaves)
    for view in (0, 1):
        assert got[view].dtype == half
        budget = torch.finfo(half).eps * scale * float(expected.gradients[view].norm())
        assert_near(got[view], scale * expected.gradients[view], budget, f"gradient of z{view + 1}")


def test_returning_the_terms_changes_no_bit(algorithm, dtype):
    """`return_terms` is a matter of packaging."""
    views = _leaves(9, 14, dtype)
    loss = barlow_twins_loss(*views, algorithm=algorithm)
    terms = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)
    assert torch.equal(loss, terms.loss)
    for one, other in zip(torch.autograd.grad(loss, views), torch.autograd.grad(terms.loss, views), strict=True):
        assert torch.equal(one, other)


def test_backward_twice_needs_retain_graph(algorithm):
    """Exactly as any torch operation: the second backward raises, unless the first one kept the graph."""
    views = _leaves(5, 8)
    loss = barlow_twins_loss(*views, algorithm=algorithm)
    first = torch.autograd.grad(loss, views, retain_graph=True)
    second = torch.autograd.grad(loss, views)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, views)


def test_gradients_accumulate(algorithm):
    """Two backward calls add up in .grad."""
    views = _leaves(5, 8)
    single = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views)
    for _ in range(2):
        barlow_twins_loss(*views, algorithm=algorithm).backward()
    for view, gradient in zip(views, single, strict=True):
        torch.testing.assert_close(view.grad, 2 * gradient)


def test_modifying_a_view_before_backward_raises(algorithm):
    """Backward never uses a view that was overwritten after forward: it either saved what it needs, or raises."""
    views = _leaves(5, 8)
    expected = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views)
    hidden = [2 * view for view in views]
    halved = [view / 2 for view in hidden]
    loss = barlow_twins_loss(*halved, algorithm=algorithm)
    with torch.no_grad():
        for view in halved:
            view.zero_()
    try:
        got = torch.autograd.grad(loss, halved)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(got, expected)


class TestSecondDerivatives:
    """They are not implemented; every way of asking for them raises, none returns a number."""

    def test_p28_gradient_penalty(self, algorithm):
        views = _leaves(5, 8)
        gradients = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views, create_graph=True)
        with pytest.raises(RuntimeError):
            sum(gradient.square().sum() for gradient in gradients).backward()

    def test_p28_gradient_penalty_of_one_view(self, algorithm):
        z1, z2 = Batch(5, 8, 1, "trained").views()
        z1.requires_grad_()
        (gradient,) = torch.autograd.grad(barlow_twins_loss(z1, z2, algorithm=algorithm), z1, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()

    def test_p28_gradient_penalty_beside_other_terms(self, algorithm):
        """Where the rest of the objective is differentiable, a penalty that is not must not be dropped from it."""
        views = _leaves(5, 8)
        loss = barlow_twins_loss(*views, algorithm=algorithm)
        gradients = torch.autograd.grad(loss, views, create_graph=True)
        with pytest.raises(RuntimeError):
            (loss + views[0].sum() + sum(gradient.square().sum() for gradient in gradients)).backward()

    @pytest.mark.parametrize("term", ["loss", "on_diagonal", "off_diagonal"])
    def test_p28_of_each_term(self, algorithm, term):
        z1, z2 = _leaves(5, 8)
        value = getattr(barlow_twins_loss(z1, z2, algorithm=algorithm, return_terms=True), term)
        (gradient,) = torch.autograd.grad(value, z1, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.sum(), z2)

    def test_p28_mixed_with_lambd(self, algorithm):
        z1, z2 = _leaves(5, 8)
        lambd = torch.tensor(0.5, dtype=torch.float64, device=strategies.DEVICE, requires_grad=True)
        loss = barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm)
        (gradient,) = torch.autograd.grad(loss, z1, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.sum(), lambd)

    def test_p28_message_says_what_to_do(self, algorithm):
        z1, z2 = _leaves(5, 8)
        (gradient,) = torch.autograd.grad(barlow_twins_loss(z1, z2, algorithm=algorithm), z1, create_graph=True)
        with pytest.raises(RuntimeError, match=r"(?i)(second derivative|twice|once_differentiable)"):
            gradient.sum().backward()

    def test_p28_create_graph_alone_is_harmless(self, algorithm):
        views = _leaves(5, 8)
        loss = barlow_twins_loss(*views, algorithm=algorithm)
        with_graph = torch.autograd.grad(loss, views, create_graph=True)
        plain = torch.autograd.grad(loss, views)
        for one, other in zip(with_graph, plain, strict=True):
            assert torch.equal(one.detach(), other)

    def test_p28_hessian(self, algorithm):
        z1, z2 = Batch(3, 4, 1, "trained").views()
        with pytest.raises(RuntimeError):
            torch.autograd.functional.hessian(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm), z1)

    def test_p28_func_hessian(self, algorithm):
        z1, z2 = Batch(3, 4, 1, "trained").views()
        with pytest.raises(RuntimeError):
            torch.func.hessian(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm))(z1)


def test_forward_mode_raises(algorithm):
    """No forward-mode derivative is implemented, so torch.func.jvp raises; it never returns a zero tangent."""
    z1, z2 = Batch(3, 4, 1, "trained").views()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm), (z1,), (torch.ones_like(z1),))


def test_vmap_raises(algorithm):
    """Without a batching rule torch.vmap raises; it never mixes the batches."""
    z1, z2 = (torch.stack([view, 2 * view]) for view in Batch(3, 4, 1, "trained").views())
    z1.requires_grad_()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.vmap(lambda a, b: barlow_twins_loss(a, b, algorithm=algorithm))(z1, z2)


def test_func_grad_is_right_or_raises(algorithm):
    """torch.func.grad gives the gradient of backward, or an error."""
    z1, z2 = Batch(5, 8, 1, "trained").views()
    try:
        got = torch.func.grad(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm))(z1)
    except RuntimeError:
        return
    torch.testing.assert_close(got, truth(z1, z2).gradients[0], rtol=1e-10, atol=1e-14)


def test_checkpointing_gives_the_same_gradients(algorithm):
    """The loss may lie inside torch.utils.checkpoint, in either mode."""
    views = _leaves(5, 8)
    expected = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views)
    for use_reentrant in (True, False):
        leaves = [view.detach().clone().requires_grad_() for view in views]
        loss = torch.utils.checkpoint.checkpoint(
            lambda *z: barlow_twins_loss(*z, algorithm=algorithm), *leaves, use_reentrant=use_reentrant
        )
        loss.backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert torch.equal(leaf.grad, gradient)


def test_a_slope_beyond_float32_is_no_error(algorithm):
    """λ times what arrives may overflow; then the gradient is not finite, as arithmetic has it."""
    views = [view.requires_grad_() for view in Batch(6, 20, 1, "trained").views(torch.float32)]
    loss = barlow_twins_loss(*views, lambd=1e30, algorithm=algorithm)
    (finite,) = torch.autograd.grad(loss, views[0], retain_graph=True)
    assert finite.isfinite().all()
    (gradient,) = torch.autograd.grad(loss, views[0], torch.tensor(1e30))
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_no_number(algorithm, mode, pre_dispatch):
    """Numbers are read in plain eager mode alone: what make_fx has recorded holds for other views."""

    def gradient(z1, z2):
        loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
        return (loss,) if pre_dispatch else torch.autograd.grad(loss, (z1, z2))

    first, second = _leaves(5, 8), [view.detach().mul(3).add(1).requires_grad_() for view in _leaves(5, 8)[::-1]]
    inputs = [view.detach() for view in first] if pre_dispatch else first
    recorded = make_fx(gradient, tracing_mode=mode, pre_dispatch=pre_dispatch)(*inputs)
    with torch.no_grad():  # it holds operations that write into a buffer
        answer = recorded(*second)
    for got, expected in zip(answer, gradient(*second), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_fake_tensors_have_no_numbers_to_read(algorithm):
    with FakeTensorMode() as mode:
        views = [mode.from_tensor(view) for view in Batch(5, 8, 1, "trained").views()]
        leaves = [view.requires_grad_() for view in views]
        gradients = torch.autograd.grad(barlow_twins_loss(*leaves, algorithm=algorithm), leaves)
    assert [gradient.shape for gradient in gradients] == [view.shape for view in views]


def test_a_backward_that_is_traced_alone(algorithm):
    """The forward was not."""
    z1, z2 = _leaves(5, 8)
    loss = barlow_twins_loss(z1, z2, algorithm=algorithm)

    def backward(slope):
        return torch.autograd.grad(loss, z1, slope, retain_graph=True)[0]

    recorded = make_fx(backward)(torch.tensor(1.0, dtype=torch.float64))
    three = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(recorded(three), backward(three))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.autograd.grad(loss, z1)[0].shape == z1.shape


@pytest.mark.parametrize("of", [(0,), (1,), (0, 1)], ids=str)
def test_a_tensor_of_another_kind_is_not_looked_into(algorithm, of):
    """Not even where it is the second view alone."""
    views, halves = _leaves(5, 8), [[view.detach(), 2 * view.detach() + 1] for view in _leaves(5, 8)[::-1]]
    both = [TwoTensor(*halves[view]) if view in of else views[view].detach() for view in (0, 1)]
    got = barlow_twins_loss(*both, algorithm=algorithm)
    for half, part in (("a", 0), ("b", 1)):
        alone = [halves[view][part] if view in of else views[view].detach() for view in (0, 1)]
        right = barlow_twins_loss(*alone, algorithm=algorithm)
        torch.testing.assert_close(getattr(got, half), right, rtol=1e-12, atol=1e-12)
