"""torch.compile and torch.export: one graph, the same numbers, forward and backward."""

import functools
import importlib

import pytest
import torch

from barlow_loss import BarlowTwinsLoss, _plan, barlow_twins_loss
from barlow_loss._plan import choose_backend
from comparison import Evaluation, assert_near, truth
from inductor import needs_compiler
from strategies import Batch

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]


def _evaluate(loss, z1, z2):
    leaves = [view.clone().requires_grad_() for view in (z1, z2)]
    terms = loss(*leaves)
    return Evaluation(*(term.detach() for term in terms), torch.autograd.grad(terms[0], leaves))


def _assert_true(got, z1, z2):
    """Within the tolerances of P1 and P2, like the eager loss."""
    expected = truth(z1, z2)
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    value_tol, gradient_tol = (1e-12, 1e-10) if dtype == torch.float64 else (2e-6, 1e-5)
    if z1.dtype.itemsize == 2:
        gradient_tol += torch.finfo(z1.dtype).eps / 2
    assert_near(got.loss, expected.loss, expected.value_budget(value_tol, dtype))
    for view in (0, 1):
        budget = expected.gradient_budget(view, gradient_tol, dtype)
        assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")


def _compiled(backend, dynamic=False, **settings):
    @torch.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    def loss(z1, z2):
        return tuple(barlow_twins_loss(z1, z2, return_terms=True, **settings))

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend, algorithm):
    """One graph, forward and backward; mean 1e4 and std 1e-2, so that a fused kernel cannot drop the pivot."""
    z1, z2 = Batch(37, 90, 1, "trained", mean=1e4, std=1e-2).views(torch.float32)
    _assert_true(_evaluate(_compiled(backend, algorithm=algorithm), z1, z2), z1, z2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_compiled_in_other_dtypes(algorithm, dtype):
    z1, z2 = Batch(12, 30, 1, "gaussian").views(dtype)
    _assert_true(_evaluate(_compiled("aot_eager", algorithm=algorithm), z1, z2), z1, z2)


@needs_compiler
def test_compiled_training_step():
    """A projector and the loss in one inductor graph with a changing learning signal: gradients as in eager."""
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 64))
    loss_fn = BarlowTwinsLoss()
    x1, x2 = Batch(16, 10, 1, "trained").views(torch.float32)

    def step(a, b):
        return loss_fn(projector(a), projector(b))

    expected = torch.autograd.grad(step(x1, x2), list(projector.parameters()))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(x1, x2), list(projector.parameters()))
    for one, other in zip(got, expected, strict=True):
        # A bias before a batch statistic has a gradient of 0 but for rounding.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_compiled_under_autocast(algorithm):
    z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
    loss = _compiled("aot_eager", algorithm=algorithm)
    with torch.autocast("cpu", torch.bfloat16):
        _assert_true(_evaluate(loss, z1, z2), z1, z2)


def test_dynamic_shapes_compile_once(algorithm):
    """dynamic=True: other N and D are served by the first graph."""
    loss = _compiled("aot_eager", dynamic=True, algorithm=algorithm)
    for n, d in ((40, 100), (50, 120), (90, 41)):
        with torch.compiler.set_stance("default" if n == 40 else "fail_on_recompile"):
            z1, z2 = Batch(n, d, 1, "trained").views(torch.float32)
            _assert_true(_evaluate(loss, z1, z2), z1, z2)


@needs_compiler
@pytest.mark.slow
def test_dynamic_shapes_under_inductor():
    """The same with "auto", which adds one guard: on which side of N = D/2 the shape lies."""
    loss = _compiled("inductor", dynamic=True)
    for n, d in ((40, 100), (50, 120)):
        with torch.compiler.set_stance("default" if n == 40 else "fail_on_recompile"):
            z1, z2 = Batch(n, d, 1, "trained").views(torch.float32)
            _assert_true(_evaluate(loss, z1, z2), z1, z2)


def test_auto_turns_to_the_primal_by_itself():
    """A shape beyond N = D/2 is a new graph, not a wrong one."""
    loss = _compiled("aot_eager", dynamic=True)
    for n, d in ((20, 60), (60, 20), (30, 60)):
        z1, z2 = Batch(n, d, 1, "trained").views(torch.float32)
        _assert_true(_evaluate(loss, z1, z2), z1, z2)


def test_a_tensor_lambd_does_not_recompile():
    """A schedule of λ passes a 0-d tensor."""
    z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
    loss = torch.compile(
        lambda *views, lambd: barlow_twins_loss(*views, lambd=lambd), fullgraph=True, backend="aot_eager"
    )
    for step, lambd in enumerate((0.001, 0.01, 0.5)):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            got = loss(z1, z2, lambd=torch.tensor(lambd))
        assert_near(got, truth(z1, z2, lambd).loss, 2e-6 * float(truth(z1, z2, lambd).loss))


def test_one_view_without_gradient(algorithm):
    z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
    leaf = z1.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_compiled("aot_eager", algorithm=algorithm)(leaf, z2)[0], leaf)
    expected = truth(z1, z2)
    assert_near(gradient, expected.gradients[0], expected.gradient_budget(0, 1e-5, torch.float32))


@pytest.mark.parametrize("term", [1, 2], ids=["on_diagonal", "off_diagonal"])
def test_a_single_term(algorithm, term):
    """A compiled graph in which only one of the results is differentiated."""
    views = [view.requires_grad_() for view in Batch(12, 30, 1, "trained").views()]
    expected = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)[term], views)
    got = torch.autograd.grad(_compiled("aot_eager", algorithm=algorithm)(*views)[term], views)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_second_derivatives_raise_when_compiled(algorithm):
    views = [view.requires_grad_() for view in Batch(5, 12, 1, "trained").views()]
    loss = _compiled("aot_eager", algorithm=algorithm)(*views)[0]

    def differentiate_twice():
        gradients = torch.autograd.grad(loss, views, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()

    with pytest.raises(RuntimeError):
        differentiate_twice()


def test_nan_survives_compilation(algorithm):
    z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
    z1[3, 4] = float("inf")
    assert _compiled("aot_eager", algorithm=algorithm)(z1, z2)[0].isnan()


def test_errors_reach_the_user_from_a_compiled_function():
    """The message of a wrong shape is not lost in the tracer."""
    loss = torch.compile(barlow_twins_loss, backend="aot_eager")
    with pytest.raises(Exception, match=r"\(4, 3\).*\(5, 3\)"):
        loss(torch.randn(4, 3), torch.randn(5, 3))


class TestExport:
    def test_exported_loss_is_the_loss(self, algorithm):
        z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
        module = BarlowTwinsLoss(algorithm=algorithm)
        exported = torch.export.export(module, (z1, z2))
        assert_near(exported.module()(z1, z2), module(z1, z2), 1e-6 * float(module(z1, z2)))

    def test_exported_loss_refuses_a_gradient_aloud(self, algorithm):
        z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
        exported = torch.export.export(BarlowTwinsLoss(algorithm=algorithm), (z1, z2))
        loss = exported.module()(z1.requires_grad_(), z2)
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()

    def test_with_a_dynamic_batch(self, algorithm):
        z1, z2 = Batch(12, 30, 1, "trained").views(torch.float32)
        batch = torch.export.Dim("batch", min=2, max=1024)
        module = BarlowTwinsLoss(algorithm=algorithm)
        exported = torch.export.export(module, (z1, z2), dynamic_shapes={"views": ({0: batch}, {0: batch})})
        other = Batch(33, 30, 2, "trained").views(torch.float32)
        assert_near(exported.module()(*other), module(*other), 1e-6 * float(module(*other)))

    def test_of_a_model_that_ends_in_the_loss(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.projector = torch.nn.Linear(10, 30)
                self.loss_fn = BarlowTwinsLoss()

            def forward(self, x1, x2):
                return self.loss_fn(self.projector(x1), self.projector(x2))

        torch.manual_seed(0)
        model, inputs = Model(), Batch(12, 10, 1, "trained").views(torch.float32)
        exported = torch.export.export(model, inputs)
        torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_a_graph_takes_the_choice_of_the_backend_as_it_is(monkeypatch):
    """What is asked about the GPU, and that triton is imported, is no part of the graph, which could not hold it."""

    @functools.cache
    def asked(device_type, index):
        importlib.import_module("json")
        return None, True

    monkeypatch.setattr(_plan, "_asked_once", asked)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (choose_backend("f", "auto", torch.device("cuda", 0)) == "triton")

    assert chosen(torch.zeros(())) == 1


@needs_compiler
@pytest.mark.slow
def test_reduce_overhead_without_a_gpu(algorithm):
    """The mode that captures CUDA graphs is plain inductor on a CPU, so one line serves both."""
    z1, z2 = Batch(24, 70, 1, "trained").views(torch.float32)
    loss_fn = torch.compile(BarlowTwinsLoss(algorithm=algorithm), mode="reduce-overhead")
    _assert_true(_evaluate(lambda *views: tuple(loss_fn(*views, return_terms=True)), z1, z2), z1, z2)
