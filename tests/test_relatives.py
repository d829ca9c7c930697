"""VICReg and mixed samples: the published numbers, autograd's rules, precision, cost, errors, modules, compilation."""

import copy
import inspect
import pickle
import re
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from barlow_loss import (
    MixedBarlowTwinsLoss,
    VICRegLoss,
    VICRegTerms,
    barlow_twins_loss,
    cross_correlation,
    mixed_barlow_twins_loss,
    vicreg_loss,
)
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._gram_norm import batch_for, cross_norm
from comparison import assert_near
from inductor import needs_compiler
from related import ALPHA, RELATIVES, answer, permutation_of, right
from strategies import Batch

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]


@pytest.fixture(params=RELATIVES)
def relative(request):
    return RELATIVES[request.param]


def _views(relative, n=12, d=20, dtype=torch.float64, kind="trained", **batch):
    return relative.views(Batch(n, d, 7, kind, **batch), dtype)


def _leaves(relative, *args, **kwargs):
    return [view.requires_grad_() for view in _views(relative, *args, **kwargs)]


class TestPublishedNumbers:
    """What the published programs computed in float64 of z1 = sin k, z2 = 1.2 sin(k + ½), z_m = cos 1.3 k, k = n·D + d.

    ``VICReg.forward`` of main_vicreg.py, github.com/facebookresearch/vicreg at 4e12602, with an identity as network, in
    a group of one process, with 25, 25 and 1 and with one of its three coefficients alone. Lines 55 to 84 of main.py,
    github.com/wgcban/mix-bt at e2c6af0, with λ = 0.0078125, a scale of 4, α = 0.3 and the permutations below. Lines 36
    to 53 of main.py, github.com/yaohungt/Barlow-Twins-HSIC at a30baba, with corr_neg_one and the same λ.
    """

    VICREG: ClassVar = {
        # (N, D): loss, s, v, c, norms of both gradients, their elements [1, 2]
        (6, 20): (
            *(17.774762041889872, 0.16771166504336188, 0.15408696438708852, 9.729796306128613),
            *((1.8827944977108062, 3.071422217477453), (0.23169838447861846, -0.33080246778496203)),
        ),
        (16, 5): (
            *(10.6549465959335, 0.16927174105660847, 0.20174814985505, 1.3794493231420382),
            *((2.6759099967385085, 1.95051380047534), (-0.40819549593611754, 0.1288467159685189)),
        ),
    }
    MIXED: ClassVar = {
        # (N, D): permutation, loss of both views, R · scale · λ
        (6, 20): ([2, 0, 5, 1, 3, 4], 2.4642986825956354, 10.658521537167578),
        (16, 5): ([(5 * i + 3) % 16 for i in range(16)], 0.2222735427791336, 0.08746208125203628),
    }

    HSIC: ClassVar = {
        # (N, D): loss and its off-diagonal sum, the latter's gradient: norms of both views, their elements [1, 2]
        (6, 20): (
            *(5.219218599980175, 480.7621309986597),
            *((4.904961161553447, 4.06004147574649), (1.2082853561342561, -0.039225843662317995)),
        ),
        (16, 5): (
            *(0.33465366611255254, 22.242529032139462),
            *((1.651957743986598, 1.3802261124739497), (-0.13889374329118095, 0.05573990637653244)),
        ),
    }

    @staticmethod
    def _inputs(n, d):
        k = torch.arange(n * d, dtype=torch.float64).view(n, d)
        return [t.requires_grad_() for t in (torch.sin(k), 1.2 * torch.sin(k + 0.5), torch.cos(1.3 * k))]

    @pytest.mark.parametrize("shape", VICREG)
    def test_vicreg(self, algorithm, shape):
        *numbers, norms, elements = self.VICREG[shape]
        z1, z2, _ = self._inputs(*shape)
        terms = vicreg_loss(z1, z2, algorithm=algorithm, return_terms=True)
        gradients = torch.autograd.grad(terms.loss, (z1, z2))
        assert [float(term.detach()) for term in terms] == pytest.approx(numbers, rel=1e-12)
        assert [float(gradient.norm()) for gradient in gradients] == pytest.approx(norms, rel=1e-11)
        assert [float(gradient[1, 2]) for gradient in gradients] == pytest.approx(elements, rel=1e-11)

    @pytest.mark.parametrize("shape", MIXED)
    def test_mixed_samples(self, algorithm, shape):
        """Its correlations are (N − 1)/N of ours without ε, since it divides by the unbiased deviation and by N."""
        permutation, of_views, of_mixture = self.MIXED[shape]
        views = [view.detach() for view in self._inputs(*shape)]
        terms = mixed_barlow_twins_loss(
            *views, 0.3, torch.tensor(permutation), lambd=0.0078125, eps=0.0, algorithm=algorithm, return_terms=True
        )
        share = (shape[0] - 1) / shape[0]
        assert 4 * 0.0078125 * share**2 * float(terms.mixture) == pytest.approx(of_mixture, rel=1e-12)
        diagonal = share * cross_correlation(*views[:2], eps=0.0).diagonal()
        base = (diagonal - 1).square().sum() + 0.0078125 * share**2 * terms.off_diagonal
        assert float(base) == pytest.approx(of_views, rel=1e-12)

    @pytest.mark.parametrize("shape", HSIC)
    def test_the_form_of_hsic(self, algorithm, shape):
        """It takes the unbiased deviation, and no ε."""
        *numbers, norms, elements = self.HSIC[shape]
        z1, z2, _ = self._inputs(*shape)
        settings = {"lambd": 0.0078125, "eps": 0.0, "off_diagonal_target": -1.0, "correction": 1}
        terms = barlow_twins_loss(z1, z2, algorithm=algorithm, return_terms=True, **settings)
        gradients = torch.autograd.grad(terms.off_diagonal, (z1, z2))
        assert [float(terms[k].detach()) for k in (0, 2)] == pytest.approx(numbers, rel=1e-12)
        assert [float(gradient.norm()) for gradient in gradients] == pytest.approx(norms, rel=1e-11)
        assert [float(gradient[1, 2]) for gradient in gradients] == pytest.approx(elements, rel=1e-11)


SHAPES = [(2, 1), (2, 5), (4, 9), (9, 4), (6, 6)]


class TestGradients:
    @pytest.mark.parametrize(("n", "d"), SHAPES)
    def test_gradcheck(self, relative, algorithm, n, d):
        """Of all terms; the spread is such that some hinges are open and some are closed."""

        def terms(*views):
            return tuple(relative.loss(*views, algorithm=algorithm, return_terms=True))

        assert torch.autograd.gradcheck(terms, _leaves(relative, n, d), check_undefined_grad=True)

    @pytest.mark.parametrize("of", [0, 1])
    def test_gradcheck_of_one_view(self, relative, algorithm, of):
        views = _views(relative, 4, 7)
        views[of].requires_grad_()
        assert torch.autograd.gradcheck(lambda *z: relative.loss(*z, algorithm=algorithm), views)

    @pytest.mark.parametrize(("n", "d"), [(129, 300), (257, 1100), (300, 40), (600, 300)])
    def test_where_products_go_block_by_block(self, relative, algorithm, n, d):
        for dtype, value_tol, gradient_tol in ((torch.float64, 1e-12, 1e-10), (torch.float32, 2e-6, 1e-5)):
            views = _views(relative, n, d, dtype)
            expected, got = right(relative, views), answer(relative, views, algorithm=algorithm)
            assert_near(got.loss, expected.loss, value_tol * float(expected.loss))
            for one, other in zip(got.gradients, expected.gradients, strict=True):
                assert_near(one, other, gradient_tol * float(other.norm()))

    def test_each_term_by_itself(self, relative, algorithm):
        views = _leaves(relative, 7, 11)
        for number, (got, expected) in enumerate(
            zip(relative.loss(*views, algorithm=algorithm, return_terms=True), relative.oracle(*views), strict=True)
        ):
            ours, theirs = (
                torch.autograd.grad(term, views, retain_graph=True, materialize_grads=True) for term in (got, expected)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13, msg=f"term {number}")

    def test_upstream_gradients_multiply(self, relative, algorithm, dtype):
        views = _leaves(relative, 7, 11, dtype)
        plain = torch.autograd.grad(relative.loss(*views, algorithm=algorithm), views)
        for upstream in (3.5, -2.0, 0.0):
            got = torch.autograd.grad(upstream * relative.loss(*views, algorithm=algorithm), views)
            torch.testing.assert_close(got, tuple(upstream * gradient for gradient in plain), rtol=2e-6, atol=1e-6)

    def test_a_detached_view_changes_no_bit_of_the_others(self, relative, algorithm):
        whole = answer(relative, _views(relative, 7, 30), algorithm=algorithm)
        views = _leaves(relative, 7, 30)
        views[1] = views[1].detach()
        loss = relative.loss(*views, algorithm=algorithm)
        (gradient,) = torch.autograd.grad(loss, views[0])
        assert torch.equal(loss.detach(), whole.loss)
        torch.testing.assert_close(gradient, whole.gradients[0], rtol=1e-12, atol=1e-14)

    def test_backward_twice_is_the_same(self, relative, algorithm):
        views = _leaves(relative, 5, 8)
        loss = relative.loss(*views, algorithm=algorithm)
        first = torch.autograd.grad(loss, views, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, views), strict=True))

    def test_a_second_derivative_raises(self, relative, algorithm):
        views = _leaves(relative, 5, 8)
        for of in ("all", "one"):
            asked = views if of == "all" else views[-1:]
            gradients = torch.autograd.grad(relative.loss(*views, algorithm=algorithm), asked, create_graph=True)
            with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
                sum(gradient.square().sum() for gradient in gradients).backward()

    def test_a_graph_of_the_gradient_is_harmless(self, relative, algorithm):
        views = _leaves(relative, 5, 8)
        loss = relative.loss(*views, algorithm=algorithm)
        kept = torch.autograd.grad(loss, views, create_graph=True)
        for one, other in zip(kept, torch.autograd.grad(loss, views), strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-12, atol=1e-15)

    def test_weights_that_are_tensors_have_a_gradient(self, algorithm):
        views = _views(RELATIVES["mixed"], 5, 8)
        weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (25.0, 10.0, 0.5)]
        terms = vicreg_loss(
            *views,
            **dict(zip(("invariance", "variance", "covariance"), weights, strict=True)),
            algorithm=algorithm,
            return_terms=True,
        )
        torch.testing.assert_close(torch.autograd.grad(terms.loss, weights), terms[1:])
        lambd, scale, alpha = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.1, 3.0, 0.4))

        def mixed(lambd, scale, alpha):
            permutation = permutation_of(5)
            return mixed_barlow_twins_loss(
                *views, alpha, permutation, lambd=lambd, mix_scale=scale, algorithm=algorithm
            )

        assert torch.autograd.gradcheck(mixed, (lambd, scale, alpha))

    def test_the_norm_by_itself(self, algorithm):
        """‖XᵀY‖² of any widths, several Y, and Y = X."""
        generator = torch.Generator().manual_seed(0)
        x, y1, y2 = (torch.randn(6, d, generator=generator, dtype=torch.float64) for d in (5, 9, 3))
        batch = batch_for("norm", Shards(ALONE, (6,)), algorithm, "mean", x)
        expected = (x.T @ y1).square().sum() + (x.T @ y2).square().sum()
        torch.testing.assert_close(cross_norm(batch, x, y1, y2), expected, rtol=1e-12, atol=0)
        leaves = [t.requires_grad_() for t in (x, y1, y2)]
        assert torch.autograd.gradcheck(lambda *t: cross_norm(batch, *t), leaves)
        assert torch.autograd.gradcheck(lambda t: cross_norm(batch, t, t), x)
        assert torch.autograd.gradcheck(lambda t: cross_norm(batch, x.detach(), t, y2.detach()), y1)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, relative, algorithm, dtype):
        """16-bit views are computed in float32; the gradient is rounded once, at the end."""
        views = _views(relative, 9, 40, dtype)
        got, expected = answer(relative, views, algorithm=algorithm), right(relative, views)
        assert {term.dtype for term in got.terms} == {torch.promote_types(dtype, torch.float32)}
        assert {gradient.dtype for gradient in got.gradients} == {dtype}
        assert {tuple(term.shape) for term in got.terms} == {()}
        assert_near(got.loss, expected.loss, 2e-6 * float(expected.loss))
        for one, other in zip(got.gradients, expected.gradients, strict=True):
            assert_near(one, other, (torch.finfo(dtype).eps / 2 + 1e-5) * float(other.norm()))

    @HALVES
    def test_autocast_changes_no_bit(self, relative, algorithm, half):
        views = _views(relative, dtype=torch.float32)
        plain = answer(relative, views, algorithm=algorithm)
        with torch.autocast("cpu", half):
            got = answer(relative, views, algorithm=algorithm)
        assert torch.equal(got.loss, plain.loss)
        assert all(torch.equal(one, other) for one, other in zip(got.gradients, plain.gradients, strict=True))

    def test_the_upstream_gradient_is_applied_before_rounding_to_float16(self, relative, algorithm):
        """A GradScaler's factor lifts small gradients above float16's underflow."""
        views = _leaves(relative, 256, 96, torch.float16)
        expected = right(relative, [view.detach() for view in views])
        scale = 2.0**12
        got = torch.autograd.grad(scale * relative.loss(*views, algorithm=algorithm), views)
        for one, other in zip(got, expected.gradients, strict=True):
            assert_near(one, scale * other, 2e-3 * scale * float(other.norm()))

    @pytest.mark.parametrize("size", [1e10, 1e20, 1e30])
    def test_huge_values_are_right_or_not_finite(self, relative, algorithm, size):
        views = [size * view.float() for view in _views(relative)]
        loss = relative.loss(*views, algorithm=algorithm)
        if loss.isfinite():
            assert_near(loss, right(relative, views).loss, 1e-5 * float(right(relative, views).loss))

    def test_the_loss_is_the_sum_of_its_terms(self, algorithm, dtype):
        loss, *terms = RELATIVES["vicreg"].loss(*_views(RELATIVES["vicreg"]), algorithm=algorithm, return_terms=True)
        torch.testing.assert_close(loss, 25 * terms[0] + 25 * terms[1] + terms[2])
        loss, on, off, mixture = RELATIVES["mixed"].loss(
            *_views(RELATIVES["mixed"]), lambd=0.5, mix_scale=2.0, algorithm=algorithm, return_terms=True
        )
        torch.testing.assert_close(loss, on + 0.5 * off + 2.0 * 0.5 * mixture)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class TestCost:
    def test_no_matrix_of_d_squared_in_the_dual(self, relative):
        n, d = 32, 512
        with _Largest() as largest:
            answer(relative, _views(relative, n, d, torch.float32))
        assert largest.elements <= 2 * n * d < d**2

    @pytest.mark.parametrize(("count", "n", "d"), [(2, 64, 512), (4, 64, 512)])
    def test_flops_of_vicreg(self, count, n, d):
        """4·V·N²·D in the dual and 4·V·N·D² in the primal: two products a view; forward alone one."""
        relative = RELATIVES["vicreg" if count == 2 else "vicreg of 4 views"]
        for algorithm, side in (("dual", n), ("primal", d)):
            with FlopCounterMode(display=False) as counter:
                answer(relative, _views(relative, n, d), algorithm=algorithm)
            assert counter.get_total_flops() == 4 * count * n * d * side
            with FlopCounterMode(display=False) as counter:
                relative.loss(*_views(relative, n, d), algorithm=algorithm)
            assert counter.get_total_flops() == 2 * count * n * d * side

    def test_auto_goes_by_the_shape(self, relative):
        for (n, d), chosen in {(6, 12): "dual", (7, 13): "primal"}.items():
            views = _views(relative, n, d)
            auto, explicit = (answer(relative, views, algorithm=algorithm) for algorithm in ("auto", chosen))
            assert torch.equal(auto.loss, explicit.loss)
            assert all(torch.equal(a, b) for a, b in zip(auto.gradients, explicit.gradients, strict=True))

    def test_tensors_without_data(self, relative, algorithm):
        views = [torch.randn(30, 70, device="meta").requires_grad_() for _ in range(relative.count)]
        if relative.name != "mixed":
            loss = relative.loss(*views, algorithm=algorithm)
            assert [g.shape for g in torch.autograd.grad(loss, views)] == [view.shape for view in views]
        with FakeTensorMode():
            fake = [torch.randn(30, 70).requires_grad_() for _ in range(relative.count)]
            settings = (ALPHA, torch.randperm(30)) if relative.name == "mixed" else ()
            function = mixed_barlow_twins_loss if settings else vicreg_loss
            loss = function(*fake, *settings, algorithm=algorithm)
            assert [g.shape for g in torch.autograd.grad(loss, fake)] == [view.shape for view in fake]


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_one_graph(self, relative, algorithm, backend):
        """Mean 1e4 and std 1e-2, so that a fused kernel cannot drop the pivot; with the gradient's rounding band."""
        views = _views(relative, 37, 90, torch.float32, mean=1e4, std=1e-2)
        permutation = permutation_of(37)

        @torch.compile(fullgraph=True, backend=backend, dynamic=False)
        def loss(*views):
            if relative.name == "mixed":
                return tuple(
                    mixed_barlow_twins_loss(*views, ALPHA, permutation, algorithm=algorithm, return_terms=True)
                )
            return tuple(vicreg_loss(*views, algorithm=algorithm, return_terms=True))

        leaves = [view.clone().requires_grad_() for view in views]
        terms, expected = loss(*leaves), right(relative, views)
        assert_near(terms[0].detach(), expected.loss, expected.value_budget(2e-6, torch.float32))
        for view, gradient in enumerate(torch.autograd.grad(terms[0], leaves)):
            budget = expected.gradient_budget(view, 1e-5, torch.float32)
            assert_near(gradient, expected.gradients[view], budget, f"gradient of view {view + 1}")

    def test_dynamic_shapes_and_weights_compile_once(self, algorithm):
        relative = RELATIVES["vicreg"]

        @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
        def loss(z1, z2, weight):
            return vicreg_loss(z1, z2, covariance=weight, algorithm=algorithm)

        for n, d, weight in ((40, 100, 1.0), (50, 120, 0.5), (90, 41, 2.0)):
            with torch.compiler.set_stance("default" if n == 40 else "fail_on_recompile"):
                views = _leaves(relative, n, d)
                got = loss(*views, torch.tensor(weight, dtype=torch.float64))
                expected = right(relative, views, covariance=weight)
                assert_near(got.detach(), expected.loss, 1e-11 * float(expected.loss))
                for one, other in zip(torch.autograd.grad(got, views), expected.gradients, strict=True):
                    assert_near(one, other, 1e-10 * float(other.norm()))

    def test_a_second_derivative_raises(self, algorithm):
        views = _leaves(RELATIVES["vicreg"], 5, 12)
        loss = torch.compile(vicreg_loss, fullgraph=True, backend="aot_eager")(*views, algorithm=algorithm)

        def differentiate_twice():
            gradients = torch.autograd.grad(loss, views, create_graph=True)
            sum(gradient.square().sum() for gradient in gradients).backward()

        with pytest.raises(RuntimeError):
            differentiate_twice()

    @pytest.mark.parametrize("relative", RELATIVES)
    def test_without_gradients(self, algorithm, relative):
        """There Dynamo would hand a forward with any number of views one argument more."""
        views, permutation = _views(RELATIVES[relative], 12, 30), permutation_of(12)

        def loss(*z):
            if relative == "mixed":
                return mixed_barlow_twins_loss(*z, ALPHA, permutation, algorithm=algorithm)
            return vicreg_loss(*z, algorithm=algorithm)

        torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(*views), loss(*views))

    def test_exported(self, algorithm):
        module, views = VICRegLoss(algorithm=algorithm), tuple(_views(RELATIVES["vicreg"], 12, 30))
        torch.testing.assert_close(torch.export.export(module, views).module()(*views), module(*views))


Z = torch.randn(4, 6)
PI = torch.arange(4)
REFUSED_VIEWS = [
    (ValueError, (), "at least two views, got 0"),
    (ValueError, (Z,), "at least two views, got 1"),
    (TypeError, (Z, [1.0]), "z2 to be a tensor, got list"),
    (TypeError, (Z, Z, Z.int()), r"z3.*torch\.int32"),
    (TypeError, (Z, Z.to_sparse()), "to_dense"),
    (ValueError, (Z, Z, Z[0]), r"\(N, D\), got z1 \(4, 6\) and z2 \(4, 6\) and z3 \(6,\).*z\.unsqueeze\(1\)"),
    (ValueError, (Z, Z[:3]), r"same \(N, D\).*z1 \(4, 6\) and z2 \(3, 6\)"),
    (TypeError, (Z, Z.double()), r"z1 torch\.float32 and z2 torch\.float64.*\.to\("),
    (ValueError, (Z, Z.to("meta")), r"z1 on cpu and z2 on meta.*\.to\("),
    (ValueError, (Z[:, :0], Z[:, :0]), "D ≥ 1 features.*width"),
    (ValueError, (Z[:1], Z[:1]), "N ≥ 2 samples.*drop_last=True"),
]
REFUSED_SETTINGS = {
    "vicreg": [
        (ValueError, {"invariance": -1.0}, "invariance to be finite and ≥ 0, got -1.0.*25"),
        (ValueError, {"covariance": float("inf")}, "covariance.*inf"),
        (TypeError, {"variance": "25"}, "variance.*str"),
        (TypeError, {"variance": True}, "variance.*bool"),
        (ValueError, {"covariance": torch.ones(2)}, r"covariance.*0-d tensor.*\(2,\)"),
        (ValueError, {"eps": -1.0}, "eps.*-1.0"),
        (ValueError, {"algorithm": "fast"}, "algorithm.*'fast'"),
        (ValueError, {"grad_reduction": "avg"}, "grad_reduction.*'avg'"),
    ],
    "mixed": [
        (ValueError, {"lambd": -1.0}, "lambd.*-1.0"),
        (TypeError, {"mix_scale": None}, "mix_scale.*NoneType"),
        (ValueError, {"eps": float("nan")}, "eps.*nan"),
        (ValueError, {"algorithm": "fast"}, "algorithm.*'fast'"),
        (ValueError, {"backend": "cuda"}, "backend.*'cuda'"),
        (ValueError, {"grad_reduction": "avg"}, "grad_reduction.*'avg'"),
    ],
}
REFUSED_MIXTURES = [
    (ValueError, 1.5, PI, r"alpha in \[0, 1\], got 1.5"),
    (TypeError, "half", PI, "alpha.*str"),
    (TypeError, True, PI, "alpha.*bool"),
    (ValueError, torch.ones(4), PI, r"alpha.*0-d tensor.*\(4,\)"),
    (TypeError, 0.3, [0, 1, 2, 3], r"permutation.*list.*torch\.randperm"),
    (TypeError, 0.3, PI.float(), r"permutation.*int64.*torch\.float32"),
    (ValueError, 0.3, PI[:3], r"permutation of shape \(4,\).*got \(3,\)"),
    (ValueError, 0.3, PI.to("meta"), "permutation.*meta and cpu"),
]


class TestErrors:
    @pytest.mark.parametrize(("error", "views", "text"), REFUSED_VIEWS, ids=range(len(REFUSED_VIEWS)))
    def test_views(self, error, views, text):
        with pytest.raises(error, match=f"(?s)^vicreg_loss: expected .*{text}|{text}"):
            vicreg_loss(*views)

    @pytest.mark.parametrize("name", ["z1", "z2", "z_mixed"])
    def test_mixed_views_are_named(self, name):
        views = {"z1": Z, "z2": Z, "z_mixed": Z} | {name: Z.int()}
        with pytest.raises(TypeError, match=rf"^mixed_barlow_twins_loss: expected {name} .*int32.*{name}\.float\(\)"):
            mixed_barlow_twins_loss(**views, alpha=0.3, permutation=PI)

    @pytest.mark.parametrize("name", REFUSED_SETTINGS)
    def test_settings(self, name):
        """The function refuses them when it is called, the module when it is built."""
        relative, module = RELATIVES[name], {"vicreg": VICRegLoss, "mixed": MixedBarlowTwinsLoss}[name]
        for error, setting, text in REFUSED_SETTINGS[name]:
            with pytest.raises(error, match=text):
                relative.loss(*[Z] * relative.count, **setting)
            with pytest.raises(error, match=text):
                module(**setting)

    @pytest.mark.parametrize(("error", "alpha", "permutation", "text"), REFUSED_MIXTURES, ids=range(8))
    def test_mixtures(self, error, alpha, permutation, text):
        with pytest.raises(error, match=text):
            mixed_barlow_twins_loss(Z, Z, Z, alpha, permutation)

    def test_an_index_that_is_no_row(self):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            mixed_barlow_twins_loss(Z, Z, Z, 0.3, PI + 1)

    def test_triton_is_for_gpus(self):
        with pytest.raises(ValueError, match=r"triton.*cpu tensors.*eager"):
            mixed_barlow_twins_loss(Z, Z, Z, 0.3, PI, backend="triton")


_OTHER = {
    VICRegLoss: {
        "invariance": 10.0,
        "variance": 5.0,
        "covariance": 0.5,
        "eps": 1e-3,
        "algorithm": "primal",
        "synchronize": False,
        "grad_reduction": "sum",
    },
    MixedBarlowTwinsLoss: {
        "lambd": 0.02,
        "mix_scale": 2.0,
        "eps": 1e-3,
        "algorithm": "primal",
        "backend": "eager",
        "synchronize": False,
        "grad_reduction": "sum",
    },
}


@pytest.mark.parametrize(
    ("function", "module"), [(vicreg_loss, VICRegLoss), (mixed_barlow_twins_loss, MixedBarlowTwinsLoss)]
)
class TestModules:
    def test_signature_is_that_of_the_function(self, function, module):
        """Same settings, same defaults, same annotations; the tensors and `return_terms` belong to the call."""
        of_function = dict(inspect.signature(function).parameters)
        of_module = dict(inspect.signature(module.__init__).parameters)
        of_call = dict(inspect.signature(module.forward).parameters)
        del of_module["self"], of_call["self"]
        assert list(of_function) == [name for name in of_call if name != "return_terms"] + list(of_module) + [
            "return_terms"
        ]
        for name, parameter in (of_module | of_call).items():
            assert of_function[name].default == parameter.default, name
            assert of_function[name].annotation == parameter.annotation, name

    def test_every_setting_reaches_the_function(self, function, module):
        views = [Z, Z + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]
        call = (*views, views[1].tanh(), 0.3, PI) if module is MixedBarlowTwinsLoss else tuple(views)
        for name, value in _OTHER[module].items():
            built = module(**{name: value})
            assert getattr(built, name) == value
            assert torch.equal(built(*call), function(*call, **{name: value}))

    def test_copies_and_representation(self, function, module):
        built = module(**_OTHER[module])
        rebuilt = eval(repr(built), {module.__name__: module})
        for other in (rebuilt, copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
            assert {name: getattr(other, name) for name in _OTHER[module]} == _OTHER[module]
        assert not built.state_dict()
        assert re.match(rf"{module.__name__}\(", repr(built))


def test_terms_of_vicreg_are_named():
    terms = VICRegLoss()(Z, Z, return_terms=True)
    assert isinstance(terms, VICRegTerms)
    assert terms._fields == ("loss", "invariance", "variance", "covariance")
