"""The loss through the Triton backend, as CUDA tensors take it, in the interpreter: against float64 and eager.

The laws themselves, tests/test_laws_*.py, run with `--backend triton` beside this folder.
"""

import itertools

import pytest
import torch
from repaired_interpreter import poisoned, program_order, recorded_launches
from torch import library
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from barlow_loss import BarlowTwinsLoss, _plan, barlow_twins_loss, reference
from barlow_loss._backends.triton import _frobenius, _input_gradients, _loss_terms, _standardize
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan
from comparison import Evaluation, assert_near, truth
from strategies import Batch

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAMBD, EPS = 0.0051, 1e-5


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """CPU tensors are served as CUDA tensors are, 16-bit products included; unwritten memory is NaN."""
    monkeypatch.setattr(_plan, "choose_backend", lambda caller, backend, device: "triton")
    monkeypatch.setattr(_plan, "_FLOAT16_MATMUL_DEVICES", ("cpu",))
    _plan._remembered.cache_clear()
    with poisoned():
        yield
    _plan._remembered.cache_clear()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def evaluate(loss_fn, z1, z2, seed=1.0):
    leaves = [view.detach().clone().requires_grad_() for view in (z1, z2)]
    terms = loss_fn(*leaves)
    return Evaluation(*(term.detach() for term in terms), torch.autograd.grad(seed * terms[0], leaves))


def through(backend, algorithm, z, products):
    def loss_fn(z1, z2):
        plan = Plan(algorithm, backend, torch.promote_types(z, F32), products)
        return loss_and_sums((z1, z2), LAMBD, EPS, plan, Shards(ALONE, (z1.shape[0],)))

    return loss_fn


@pytest.mark.parametrize(("n", "d"), [(2, 3), (33, 129), (64, 256), (100, 70)])
@pytest.mark.parametrize(("z", "products"), [(F64, F64), (F32, F32), (F32, F16), (BF16, F16), (F16, F16)], ids=str)
def test_no_worse_than_eager(algorithm, n, d, z, products):
    """Loss and gradients: at most twice the error of eager in the same dtypes, and the band of a few roundings."""
    z1, z2 = Batch(n, d, 5, "trained", mean=1.0).views(z)
    expected = truth(z1, z2)
    got = evaluate(through("triton", algorithm, z, products), z1, z2, 1.7)
    rival = evaluate(through("eager", algorithm, z, products), z1, z2, 1.7)
    compute = torch.promote_types(z, F32)
    for name in ("loss", "on_diagonal", "off_diagonal"):
        right = getattr(expected, name)
        squares = float(expected.correlation.square().sum())  # the dual takes the off-diagonal sum out of it
        band = expected.value_budget(0, compute) + torch.finfo(products).eps * squares
        assert_near(getattr(got, name), right, 2 * float(abs(getattr(rival, name) - right)) + band, name)
    for view in (0, 1):
        right = 1.7 * expected.gradients[view]
        assert got.gradients[view].dtype == z
        rounding = torch.finfo(z).eps if z.itemsize == 2 else 0
        band = 1.7 * expected.gradient_budget(view, 0, compute) + rounding * float(right.norm())
        allowed = 2 * float((rival.gradients[view].double() - right).norm()) + band
        assert_near(got.gradients[view], right, allowed, f"gradient of z{view + 1}")


def test_the_face_under_autocast(algorithm):
    """float32 views, float16 products, float32 gradients; gradients are finite and near float64's."""
    z1, z2 = Batch(48, 200, 3, "trained").views(F32)
    with torch.autocast("cpu", BF16), recorded_launches() as launches:
        got = evaluate(lambda a, b: barlow_twins_loss(a, b, algorithm=algorithm, return_terms=True), z1, z2)
    expected = truth(z1, z2)
    assert {"fused_standardize_kernel", "loss_terms_kernel", "input_gradients_kernel"} <= {
        launch.kernel for launch in launches
    }
    assert_near(got.loss, expected.loss, 2e-3 * float(expected.loss))
    for view in (0, 1):
        assert got.gradients[view].dtype == F32
        assert_near(got.gradients[view], expected.gradients[view], 2e-3 * float(expected.gradients[view].norm()))


def test_one_outlier_does_not_overflow_float16(algorithm):
    z1, z2 = Batch(32, 2048, 3, "trained").views(F32)
    z1[0], z2[0] = z1[0] * 1e4, z2[0] * 1e4
    got = evaluate(through("triton", algorithm, F32, F16), z1, z2)
    right = truth(z1, z2).loss
    assert abs(got.loss - right) <= 4 * torch.finfo(F16).eps * right
    assert all(gradient.isfinite().all() for gradient in got.gradients)


def test_the_order_of_the_programs_changes_no_bit(algorithm):
    z1, z2 = Batch(70, 90, 3, "trained").views(F32)
    loss_fn = through("triton", algorithm, F32, F32)
    expected = evaluate(loss_fn, z1, z2)
    with program_order(7):
        got = evaluate(loss_fn, z1, z2)
    assert torch.equal(got.loss, expected.loss)
    assert all(map(torch.equal, got.gradients, expected.gradients))


def test_a_tensor_lambd_is_read_when_the_kernel_runs(algorithm):
    """Its gradient is the off-diagonal sum, and its value at the time of the backward is the one of the forward."""
    z1, z2 = (view.requires_grad_() for view in Batch(12, 30, 1, "trained").views(F64))
    lambd = torch.tensor(0.3, dtype=F64, requires_grad=True)
    loss, on, off = barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm, return_terms=True)
    assert loss == on + lambd * off
    slope, *gradients = torch.autograd.grad(loss, (lambd, z1, z2))
    assert slope == off
    number = torch.autograd.grad(barlow_twins_loss(z1, z2, lambd=0.3, algorithm=algorithm), (z1, z2))
    assert all(map(torch.equal, gradients, number))


class TestDerivatives:
    @pytest.mark.parametrize("count", [2, 3])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_second_one_is_that_of_the_plain_formula(self, algorithm, count, frozen):
        """From the views, and of one without a gradient from u, which is padded here."""

        def penalty(loss_fn):
            z = [view.requires_grad_() for view in Batch(8, 20, 1, "trained").more_views(count, F64)]
            z[1].requires_grad_(not frozen)
            asked = [view for view in z if view.requires_grad]
            gradients = torch.autograd.grad(loss_fn(*z), asked, create_graph=True)
            return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), asked)

        def mean(*z):
            pairs = list(itertools.combinations(z, 2))
            return sum(reference.barlow_twins_loss(*pair).loss for pair in pairs) / len(pairs)

        found = penalty(lambda *z: barlow_twins_loss(*z, algorithm=algorithm)), penalty(mean)
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    def test_twice_through_one_graph_is_the_same(self, algorithm):
        """The backward leaves what was saved alone."""
        views = [view.requires_grad_() for view in Batch(8, 20, 1, "trained").views(F32)]
        loss = barlow_twins_loss(*views, algorithm=algorithm)
        first = torch.autograd.grad(loss, views, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, views)))

    def test_gradcheck(self, algorithm):
        views = [view.requires_grad_() for view in Batch(5, 7, 1, "gaussian").views(F64)]
        assert torch.autograd.gradcheck(
            lambda *z: tuple(barlow_twins_loss(*z, algorithm=algorithm, return_terms=True)), views, fast_mode=True
        )

    def test_checkpointing(self, algorithm):
        views = [view.requires_grad_() for view in Batch(8, 20, 1, "trained").views(F32)]
        plain = torch.autograd.grad(barlow_twins_loss(*views, algorithm=algorithm), views)
        for reentrant in (False, True):
            again = checkpoint(BarlowTwinsLoss(algorithm=algorithm), *views, use_reentrant=reentrant)
            again.backward()
            for view, right in zip(views, plain, strict=True):
                assert torch.equal(view.grad, right)
                view.grad = None


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("z", [F64, F32, BF16], ids=str)
    def test_in_one_graph(self, algorithm, z):
        z1, z2 = Batch(20, 50, 1, "trained").views(z)

        def loss_fn(a, b):
            return tuple(barlow_twins_loss(a, b, algorithm=algorithm, return_terms=True))

        expected = evaluate(loss_fn, z1, z2)
        got = evaluate(torch.compile(loss_fn, fullgraph=True, backend="aot_eager"), z1, z2)
        assert torch.equal(got.loss, expected.loss)
        assert all(map(torch.equal, got.gradients, expected.gradients))

    def test_one_graph_for_all_sizes(self, algorithm):
        @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
        def loss_fn(a, b):
            return tuple(barlow_twins_loss(a, b, algorithm=algorithm, return_terms=True))

        for n, d in ((40, 100), (50, 120), (90, 41)):
            with torch.compiler.set_stance("default" if n == 40 else "fail_on_recompile"):
                z1, z2 = Batch(n, d, 1, "trained").views(F64)
                assert_near(evaluate(loss_fn, z1, z2).loss, truth(z1, z2).loss, 1e-10)

    def test_exports(self, algorithm):
        views = Batch(12, 30, 1, "trained").views(F32)
        program = torch.export.export(BarlowTwinsLoss(algorithm=algorithm), views)
        torch.testing.assert_close(program.module()(*views), barlow_twins_loss(*views, algorithm=algorithm))


def _opcheck_cases():
    u = torch.randn(2, 16, 32)
    k = u[0] @ u[0].T
    c, rho = torch.rand(20, dtype=F64), torch.rand(2, 20, dtype=F64)
    z, one = torch.randn(2, 10, 20), torch.ones(())
    pivot = z[:, 0].contiguous()
    return {
        "fused_standardize": (_standardize.fused_standardize, (z[0], z[1], EPS, F16)),
        "column_sums": (_standardize.column_sums, (z[0], z[1], pivot)),
        "standardize": (_standardize.standardize, (z[0], z[1], pivot, pivot, pivot, F32)),
        "frobenius": (_frobenius.frobenius, (k, k)),
        "loss_terms": (_loss_terms.loss_terms, (c, k.flatten(), None, 0.1, 1.0, None, True, F32)),
        "loss terms of a tensor": (_loss_terms.loss_terms, (c, k.flatten(), one, 0.0, 1.1, None, False, F32)),
        "input_gradients": (
            _input_gradients.input_gradients,
            (u, u[0], u[1], None, None, c, rho, one, None, None, None, 0.1, 1.0, True, 10, BF16),
        ),
        "input gradients of one": (
            _input_gradients.input_gradients,
            (u, None, u[1], None, c, c, rho, None, one, one, one, 0.0, 1.1, False, 10, F32),
        ),
        "column_dots": (_input_gradients.column_dots, (u[0], u[1])),
    }


@pytest.mark.parametrize("case", _opcheck_cases())
def test_opcheck(case):
    """Schema, fake and dispatch of each operation."""
    operation, arguments = _opcheck_cases()[case]
    library.opcheck(operation.operation, arguments)


def test_flops_are_counted(algorithm):
    """8·N²·D in the dual, and 6·N·D² in the primal."""
    n, d = 256, 512
    views = [view.requires_grad_() for view in Batch(n, d, 1, "trained").views(BF16)]

    def flops():
        with FlopCounterMode(display=False) as counter:
            barlow_twins_loss(*views, algorithm=algorithm).backward()
        return counter.get_total_flops()

    assert flops() == (8 * n**2 * d if algorithm == "dual" else 6 * n * d**2)


def test_nan_is_not_hidden(algorithm):
    z1, z2 = Batch(20, 40, 1, "trained").views(F32)
    for bad in (float("nan"), float("inf"), 3e19):
        broken = z1.clone()
        broken[3, 7] = bad
        assert barlow_twins_loss(broken, z2, algorithm=algorithm).isnan()
