"""The hand-written backward: against finite differences, against autograd, and as autograd expects it to behave."""

import functools
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import strategies
from barlow_loss import BarlowTwinsLoss, barlow_twins_loss, reference
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


def _oracle(z1, z2):
    return reference.barlow_twins_loss(z1, z2).loss


DEPENDENT = {
    "a function of it": lambda f, a: f(a, a.sin()),
    "itself": lambda f, a: f(a, a),
    "of a square": lambda f, a: f(a, a.cos()) ** 2,
    "and lambda": lambda f, a: f(a, a.sin(), lambd=a[0, 0].square()),
}


class TestSecondDerivatives:
    """Those of the plain formula, in whatever way they are asked for."""

    @pytest.mark.parametrize("settings", [{}, {"off_diagonal_target": -1.0}], ids=str)
    @pytest.mark.parametrize("views", [2, 3])
    def test_p28_gradgradcheck(self, algorithm, views, settings):
        """Of all three terms, λ and what arrives included."""
        z = [view.requires_grad_() for view in Batch(4, 5, 1, "gaussian").more_views(views)]
        lambd = torch.tensor(0.3, dtype=torch.float64, device=strategies.DEVICE, requires_grad=True)

        def terms(weight, *leaves):
            return tuple(barlow_twins_loss(*leaves, lambd=weight, algorithm=algorithm, return_terms=True, **settings))

        assert torch.autograd.gradgradcheck(terms, (lambd, *z))

    @pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
    def test_p28_gradient_penalty(self, algorithm, needed):
        """Beside other terms of the objective, of both views and of one."""
        found = []
        for loss_fn in (lambda *z: barlow_twins_loss(*z, algorithm=algorithm), _oracle):
            views = [z.requires_grad_(need) for z, need in zip(Batch(5, 8, 1, "trained").views(), needed, strict=True)]
            asked = [z for z in views if z.requires_grad]
            loss = loss_fn(*views)
            penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, asked, create_graph=True))
            found.append(torch.autograd.grad(loss + 3 * penalty, asked))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    def test_p28_third_derivatives(self, algorithm):
        z1, z2 = Batch(4, 3, 1, "gaussian").views()

        def of_penalty(z):
            (gradient,) = torch.autograd.grad(barlow_twins_loss(z, z2, algorithm=algorithm), z, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), z, create_graph=True)

        assert torch.autograd.gradcheck(of_penalty, z1.requires_grad_())

    def test_p28_create_graph_alone_changes_no_bit(self, algorithm):
        views = _leaves(5, 8)
        loss = barlow_twins_loss(*views, algorithm=algorithm)
        with_graph = torch.autograd.grad(loss, views, create_graph=True)
        plain = torch.autograd.grad(loss, views)
        for one, other in zip(with_graph, plain, strict=True):
            assert torch.equal(one.detach(), other)

    @pytest.mark.parametrize("case", [*DEPENDENT])
    def test_p28_where_one_view_is_made_of_the_other(self, algorithm, case):
        """Autograd must not walk from one to the other twice: orders 1 to 3, batched too, λ and the square included."""
        z = Batch(4, 3, 1, "gaussian").views()[0]
        of = DEPENDENT[case]
        hessian, jacobian = torch.autograd.functional.hessian, torch.autograd.functional.jacobian
        for derivative in (
            lambda f: hessian(f, z),
            lambda f: hessian(f, z, create_graph=True),
            lambda f: jacobian(lambda a: hessian(f, a, create_graph=True), z),
            lambda f: jacobian(lambda a: torch.stack([f(a), f(a) * 2]), z, vectorize=True),
        ):
            got = derivative(lambda a: of(functools.partial(barlow_twins_loss, algorithm=algorithm), a))
            expected = derivative(
                lambda a: of(lambda *views, **given: reference.barlow_twins_loss(*views, **given).loss, a)
            )
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_p28_hessian(self, algorithm, vectorize):
        z1, z2 = Batch(3, 4, 1, "trained").views()
        hessian = torch.autograd.functional.hessian
        got = hessian(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm), z1, vectorize=vectorize)
        torch.testing.assert_close(got, hessian(lambda z: _oracle(z, z2), z1), rtol=1e-9, atol=1e-12)


class TestTransforms:
    """Of torch.func and its relatives: the operation is taken apart, and nothing is silently wrong."""

    TRANSFORMS: ClassVar = {
        "grad": torch.func.grad,
        "jacrev": torch.func.jacrev,
        "jacfwd": torch.func.jacfwd,
        "hessian": torch.func.hessian,
        "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
        "jvp": lambda f: lambda z: torch.func.jvp(f, (z,), (torch.cos(z),))[1],
        "vmap": lambda f: lambda z: torch.vmap(f)(torch.stack([z, z + z.cos()])),
        "compiled grad": lambda f: torch.compile(torch.func.grad(f), backend="aot_eager"),
        "compiled hessian": lambda f: torch.compile(torch.func.hessian(f), backend="aot_eager"),
        "vmap of grad": lambda f: lambda z: torch.vmap(torch.func.grad(f))(torch.stack([z, z + z.cos()])),
    }

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_of_torch_func(self, algorithm, name):
        z1, z2 = Batch(4, 5, 1, "trained").views()
        transform = self.TRANSFORMS[name]
        got = transform(lambda z: barlow_twins_loss(z, z2, algorithm=algorithm))(z1)
        torch.testing.assert_close(got, transform(lambda z: _oracle(z, z2))(z1), rtol=1e-9, atol=1e-12)

    def test_forward_mode_outside_of_torch_func(self, algorithm):
        z1, z2 = Batch(4, 5, 1, "trained").views()
        with forward_ad.dual_level():
            loss = barlow_twins_loss(forward_ad.make_dual(z1, z1.cos()), z2, algorithm=algorithm)
            tangent = forward_ad.unpack_dual(loss).tangent
            assert forward_ad.unpack_dual(barlow_twins_loss(z1, z2, algorithm=algorithm)).tangent is None
        torch.testing.assert_close(tangent, torch.func.jvp(lambda z: _oracle(z, z2), (z1,), (z1.cos(),))[1])

    def test_batched_gradients(self, algorithm):
        """Through one backward, as is_grads_batched and vectorised Jacobians ask for them."""
        views = _leaves(4, 5)
        terms = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)
        outputs = torch.stack(terms)
        batched = torch.autograd.grad(
            outputs, views, torch.eye(3, dtype=outputs.dtype), is_grads_batched=True, retain_graph=True
        )
        for number, term in enumerate(terms):
            one = torch.autograd.grad(term, views, retain_graph=True)
            for got, expected in zip(batched, one, strict=True):
                torch.testing.assert_close(got[number], expected, rtol=1e-10, atol=1e-13)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
    def test_jit_trace(self, algorithm):
        """Called with another N, too; ε times it is rounded to float32."""
        loss_fn = BarlowTwinsLoss(algorithm=algorithm)
        traced = torch.jit.trace(loss_fn, Batch(4, 5, 1, "trained").views())
        views = Batch(7, 5, 2, "trained").views()
        torch.testing.assert_close(traced(*views), loss_fn(*views), rtol=1e-9, atol=0)

    def test_forward_mode_of_lambd(self, algorithm):
        z1, z2 = Batch(4, 5, 1, "trained").views()
        with forward_ad.dual_level():
            lambd = forward_ad.make_dual(torch.tensor(0.1, dtype=z1.dtype), torch.tensor(2.0, dtype=z1.dtype))
            terms = barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm, return_terms=True)
            tangent = forward_ad.unpack_dual(terms.loss).tangent
        torch.testing.assert_close(tangent, 2 * terms.off_diagonal)

    def test_a_view_without_gradient_may_change_or_be_of_inference_mode(self, algorithm):
        """As a frozen teacher's. For a second derivative its centred values were kept."""
        z1, z2 = Batch(4, 5, 1, "trained").views()
        with torch.inference_mode():
            frozen = z2.clone()
        for teacher in (frozen, z2.clone()):
            leaf = z1.clone().requires_grad_()
            loss = barlow_twins_loss(leaf, teacher, algorithm=algorithm)
            if not teacher.is_inference():
                teacher.zero_()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
            (expected,) = torch.autograd.grad(_oracle(leaf, z2), leaf, create_graph=True)
            torch.testing.assert_close(gradient, expected)
            torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), leaf)[0])


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
