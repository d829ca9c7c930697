"""The numerical contract: what is accepted, in which precision it is computed, and how the rest is refused."""

import copy
import inspect
import io
import pickle
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from barlow_loss import BarlowTwinsLoss, BarlowTwinsTerms, barlow_twins_loss, standardize
from comparison import assert_bitwise, assert_near, evaluate, truth
from strategies import Batch

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def _views(n=12, d=20, dtype=torch.float32, kind="trained", **batch):
    return Batch(n, d, 7, kind, **batch).views(dtype)


TWO = torch.randn(4, 2)


class TestRefusedViews:
    @pytest.mark.parametrize(
        ("shape1", "shape2", "remedy"),
        [
            ((4,), (4,), "unsqueeze"),
            ((8, 16, 4, 4), (8, 16, 4, 4), "mean(2)"),
            ((8, 5, 16), (8, 5, 16), "flatten(0, 1)"),
            ((4, 3), (4, 3, 1), "flatten"),
            ((4, 3), (4, 5), "same"),
            ((4, 3), (5, 3), "same"),
            ((4, 0), (4, 0), "width"),
            ((1, 3), (1, 3), "drop_last=True"),
            ((0, 3), (0, 3), "drop_last=True"),
        ],
    )
    def test_wrong_shapes_are_named_with_the_remedy(self, algorithm, shape1, shape2, remedy):
        with pytest.raises(ValueError, match=re.escape(remedy)) as error:
            barlow_twins_loss(torch.zeros(shape1), torch.zeros(shape2), algorithm=algorithm)
        assert str(shape1) in str(error.value)
        assert str(shape2) in str(error.value)

    @pytest.mark.parametrize(
        ("shape", "remedies"),
        [
            ((8,), ["z.unsqueeze(1)"]),
            ((8, 5, 16), ["z.mean(dim=1)", "z.flatten(1)", "z.flatten(0, 1)"]),
            ((8, 16, 4, 4), ["z.flatten(2).mean(2)", "z.flatten(1)", "z.movedim(1, -1).flatten(0, -2)"]),
            ((8, 16, 2, 4, 4), ["z.flatten(2).mean(2)", "z.flatten(1)", "z.movedim(1, -1).flatten(0, -2)"]),
        ],
        ids=str,
    )
    def test_the_remedies_for_shapes_work(self, shape, remedies):
        """What the message says is done to the views, and the loss takes them."""
        z = torch.randn(shape)
        for loss_fn in (lambda z: barlow_twins_loss(z, z), standardize):
            with pytest.raises(ValueError, match=r"\(N, D\)") as error:
                loss_fn(z)
            for remedy in remedies:
                assert remedy in str(error.value)
                loss_fn(eval(remedy, {"z": z}))

    @pytest.mark.parametrize(
        ("views", "error", "words"),
        [
            (
                (TWO, TWO, 0.005),
                TypeError,
                "z3 to be a tensor, got float. Settings go by name, for example lambd=0.005",
            ),
            (((TWO, TWO),), ValueError, "got one tuple. Write loss(*views)"),
            (([TWO, TWO],), ValueError, "got one list. Write loss(*views)"),
            ((torch.stack([TWO, TWO]),), ValueError, "loss(*z.unbind())"),
            ((TWO, [TWO, TWO]), TypeError, "z2 to be a tensor, got list. Pass the tensors in it one by one"),
            ((TWO, [[1.0, 2.0]]), TypeError, "Use torch.as_tensor"),
            ((TWO, None), TypeError, "z2 to be a tensor, got NoneType. Pass the embeddings that the projector returns"),
            ((TWO, "z"), TypeError, "got str. Pass the embeddings"),
            ((TWO, {"features": TWO}), TypeError, "got dict. Pass a tensor in it: features"),
            ((TWO, SimpleNamespace(last_hidden_state=TWO)), TypeError, "Pass a tensor in it: last_hidden_state"),
            ((TWO, torch.nested.nested_tensor([TWO, TWO])), TypeError, "z2 to be a dense tensor, got a nested one"),
        ],
    )
    def test_what_is_no_view_is_told_with_its_remedy(self, views, error, words):
        with pytest.raises(error, match=re.escape(words)):
            barlow_twins_loss(*views)

    def test_views_by_name(self):
        z1, z2 = _views()
        expected = barlow_twins_loss(z1, z2)
        for loss_fn in (barlow_twins_loss, BarlowTwinsLoss()):
            assert loss_fn(z1=z1, z2=z2) == loss_fn(z2=z2, z1=z1) == loss_fn(z1, z2=z2) == expected
            for views, named in (((z1,), {"z1": z2}), ((z1, z2), {"z2": z2}), ((), {"z2": z2})):
                with pytest.raises(TypeError, match="each view once"):
                    loss_fn(*views, **named)

    @pytest.mark.parametrize("count", [0, 1])
    def test_another_number_of_views(self, count):
        with pytest.raises(ValueError, match=rf"two views.*{count}"):
            barlow_twins_loss(*[torch.randn(4, 3)] * count)

    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
    )
    def test_a_dtype_that_is_not_real_floating_point(self, dtype):
        z = torch.ones(4, 3).to(dtype)
        remedy = r"view_as_real\(z1\)" if dtype.is_complex else r"float\(\)"
        with pytest.raises(TypeError, match=rf"z1.*{dtype}.*{remedy}"):
            barlow_twins_loss(z, z)

    def test_the_second_view_is_checked_too(self):
        with pytest.raises(TypeError, match=r"z2.*torch\.int64"):
            barlow_twins_loss(torch.randn(4, 3), torch.ones(4, 3, dtype=torch.int64))

    @pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_two_dtypes_are_both_named(self, other):
        with pytest.raises((TypeError, ValueError), match=rf"torch\.float32.*{other}.*\.to\("):
            barlow_twins_loss(torch.randn(4, 3), torch.randn(4, 3).to(other))

    def test_two_devices_are_both_named(self):
        with pytest.raises((TypeError, ValueError), match=r"cpu.*meta.*\.to\("):
            barlow_twins_loss(torch.randn(4, 3), torch.randn(4, 3, device="meta"))

    @pytest.mark.parametrize("view", [[[1.0, 2.0], [3.0, 4.0]], None, 1.0, "z"], ids=str)
    def test_not_a_tensor(self, view):
        with pytest.raises(TypeError, match=rf"z1.*{type(view).__name__}"):
            barlow_twins_loss(view, view)

    def test_sparse(self):
        z = torch.randn(4, 3)
        with pytest.raises(TypeError, match="to_dense"):
            barlow_twins_loss(z, z.to_sparse())


# The function refuses a setting when it is called, the module when it is built.
_REFUSED = [
    (ValueError, {"algorithm": "fast"}, ["algorithm", "'fast'", "auto", "primal", "dual"]),
    (ValueError, {"algorithm": None}, ["algorithm", "None"]),
    (ValueError, {"backend": "cuda"}, ["backend", "'cuda'", "auto", "eager"]),
    (ValueError, {"grad_reduction": "avg"}, ["grad_reduction", "'avg'", "mean", "sum"]),
    (ValueError, {"eps": -1e-5}, ["eps", "-1e-05"]),
    (ValueError, {"eps": float("nan")}, ["eps", "nan"]),
    (ValueError, {"eps": float("inf")}, ["eps", "inf"]),
    (TypeError, {"eps": "small"}, ["eps", "str"]),
    (TypeError, {"eps": True}, ["eps", "bool"]),
    (TypeError, {"eps": None}, ["eps", "NoneType"]),
    (ValueError, {"lambd": -0.1}, ["lambd", "-0.1"]),
    (ValueError, {"lambd": float("nan")}, ["lambd", "nan"]),
    (TypeError, {"lambd": "0.0051"}, ["lambd", "str"]),
    (TypeError, {"lambd": True}, ["lambd", "bool"]),
    (TypeError, {"synchronize": "no"}, ["synchronize", "True or False", "'no'"]),
    (TypeError, {"process_group": 3}, ["process_group", "int", "new_group"]),
    (TypeError, {"lambd": None}, ["lambd", "NoneType"]),
    (ValueError, {"lambd": torch.tensor([0.1])}, ["lambd", "(1,)"]),
    (ValueError, {"lambd": torch.tensor(1j)}, ["lambd", "complex64"]),
]


@pytest.mark.parametrize("face", [BarlowTwinsLoss, lambda **settings: barlow_twins_loss(*_views(), **settings)])
@pytest.mark.parametrize(("error", "setting", "pieces"), _REFUSED, ids=[str(setting) for _, setting, _ in _REFUSED])
def test_refused_settings_name_argument_expectation_and_value(face, error, setting, pieces):
    with pytest.raises(error) as raised:
        face(**setting)
    for piece in pieces:
        assert piece in str(raised.value)


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(ValueError, match=r"triton.*cpu tensors.*eager"):
        barlow_twins_loss(*_views(), backend="triton")
    with pytest.raises(ValueError, match=r"triton.*cpu tensors.*eager"):
        BarlowTwinsLoss(backend="triton")(*_views())


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "loss_dtype"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
        ids=str,
    )
    def test_dtypes(self, algorithm, dtype, loss_dtype):
        """float64 throughout; else float32, with the gradient in the dtype of the views."""
        got = evaluate(*_views(dtype=dtype), algorithm=algorithm)
        assert {got.loss.dtype, got.on_diagonal.dtype, got.off_diagonal.dtype} == {loss_dtype}
        assert {gradient.dtype for gradient in got.gradients} == {dtype}
        assert got.loss.shape == got.on_diagonal.shape == got.off_diagonal.shape == ()

    @HALVES
    @pytest.mark.parametrize("kind", ["gaussian", "trained", "heavy_tailed", "dead_features"])
    @pytest.mark.parametrize(("n", "d"), [(9, 40), (40, 9)])
    def test_16_bit_views_are_computed_in_float32(self, algorithm, half, kind, n, d):
        """The loss is exact for the 16-bit numbers given; the gradient is rounded once, at the end."""
        z1, z2 = _views(n, d, half, kind)
        expected, got = truth(z1, z2), evaluate(z1, z2, algorithm=algorithm)
        assert_near(got.loss, expected.loss, expected.value_budget(2e-6, torch.float32))
        for view in (0, 1):
            budget = (torch.finfo(half).eps / 2 + 1e-5) * float(expected.gradients[view].norm())
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    @HALVES
    def test_float32_views_under_autocast_change_no_bit(self, algorithm, half):
        """Autocast is switched off inside, in forward and in backward."""
        z1, z2 = _views()
        plain = evaluate(z1, z2, algorithm=algorithm)
        with torch.autocast("cpu", half):
            under_autocast = evaluate(z1, z2, algorithm=algorithm)
        assert_bitwise(under_autocast, plain)

    @HALVES
    def test_a_projector_under_autocast(self, algorithm, half):
        """The usual loop: forward under autocast, backward outside it."""
        torch.manual_seed(0)
        projector = torch.nn.Linear(16, 24)
        x1, x2 = _views(12, 16)
        with torch.autocast("cpu", half):
            z1, z2 = projector(x1), projector(x2)
            loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
        assert z1.dtype == half
        assert loss.dtype == torch.float32
        assert_near(loss.detach(), truth(z1.detach(), z2.detach()).loss, 2e-6 * float(loss))
        loss.backward()
        assert projector.weight.grad.isfinite().all()
        assert projector.weight.grad.any()

    @HALVES
    def test_16_bit_autocast_does_not_overflow(self, algorithm, half):
        """At D = 2048 and N = 64 a float16 product of unscaled features overflows: the textbook returns inf."""
        z1, z2 = _views(64, 2048)
        with torch.autocast("cpu", half):
            loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
        assert_near(loss, truth(z1, z2).loss, 2e-6 * float(loss))

    def test_lambd_of_another_dtype_does_not_promote(self, algorithm):
        z1, z2 = _views()
        lambd = torch.tensor(0.0051, dtype=torch.float64)
        loss = barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, barlow_twins_loss(z1, z2, lambd=0.0051, algorithm=algorithm))

    @pytest.mark.parametrize("lambd", [1, 0, torch.tensor(1)], ids=str)
    def test_lambd_may_be_an_integer(self, algorithm, lambd):
        z1, z2 = _views()
        loss = barlow_twins_loss(z1, z2, lambd=lambd, algorithm=algorithm)
        assert torch.equal(loss, barlow_twins_loss(z1, z2, lambd=float(lambd), algorithm=algorithm))

    def test_lambd_gets_its_gradient_in_its_own_dtype(self, algorithm):
        lambd = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        terms = barlow_twins_loss(*_views(), lambd=lambd, algorithm=algorithm, return_terms=True)
        terms.loss.backward()
        assert lambd.grad.dtype == torch.float64
        assert float(lambd.grad) == float(terms.off_diagonal)


class TestExtremes:
    @pytest.mark.parametrize("size", [1e10, 1e18, 1e20, 1e30, 3e38], ids=str)
    @pytest.mark.parametrize("spread", ["everywhere", "one element", "one feature"])
    def test_huge_values_are_correct_or_nan(self, algorithm, dtype, size, spread):
        """Never a silent D with a zero gradient, which is what r = 1/√inf = 0 gives."""
        z1, z2 = _views(dtype=torch.float64)
        where = {"everywhere": (...,), "one element": (3, 5), "one feature": (slice(None), 5)}[spread]
        z1[where] *= size / float(z1.abs().max())
        z1, z2 = z1.to(dtype), z2.to(dtype)
        expected, got = truth(z1, z2), evaluate(z1, z2, algorithm=algorithm)
        if got.loss.isnan():
            return
        assert_near(got.loss, expected.loss, expected.value_budget(2e-6, dtype))
        for view in (0, 1):
            budget = expected.gradient_budget(view, 1e-5, dtype)
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    @pytest.mark.parametrize("size", [1e10, 1e18])
    def test_large_values_whose_squares_fit_are_correct(self, algorithm, dtype, size):
        """NaN is for numbers whose squares overflow, not for these."""
        z1, z2 = (size * view for view in _views(dtype=dtype))
        assert_near(
            barlow_twins_loss(z1, z2, algorithm=algorithm), truth(z1, z2).loss, 2e-6 * float(truth(z1, z2).loss)
        )

    @pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-30, 1e-40], ids=str)
    def test_tiny_values_are_a_collapse(self, algorithm, dtype, size):
        """A spread far below √ε: L = D, and the gradient is that of the equation, not NaN."""
        z1, z2 = (size * view for view in _views(dtype=dtype))
        got, expected = evaluate(z1, z2, algorithm=algorithm), truth(z1, z2)
        assert_near(got.loss, 20.0, 1e-5)
        for view in (0, 1):
            # Below the normal range a float keeps fewer digits.
            budget = expected.gradient_budget(view, 1e-5, dtype) + 1e-38
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    @pytest.mark.parametrize(
        "order", ["shuffled", "sorted", "two far clusters", "first row far away", "last row far away"]
    )
    def test_large_means_in_any_order_of_the_samples(self, algorithm, order):
        """Mean 1e4, std 1e-2, float32: accurate wherever in the batch a shift estimate would look."""
        z1, z2 = _views(200, 24, mean=1e4, std=1e-2)
        if order == "sorted":
            z1, z2 = (view.sort(dim=0).values for view in (z1, z2))
        elif order == "two far clusters":
            z1[::2] *= -1
            z2[::2] *= -1
        elif order != "shuffled":
            row = 0 if order.startswith("first") else -1
            z1[row], z2[row] = -z1[row], -z2[row]
        expected, got = truth(z1, z2), evaluate(z1, z2, algorithm=algorithm)
        # One row far away holds the whole variance; the products of the other rows are below the last bit of a float32
        # accumulator, so torch.mm itself, given exact operands, misses the off-diagonal sum by 2.0e-6 here.
        value_tol = 1e-5 if "row" in order else 2e-6
        assert_near(got.loss, expected.loss, expected.value_budget(value_tol, torch.float32))
        for view in (0, 1):
            budget = expected.gradient_budget(view, 1e-5, torch.float32)
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    def test_far_rows_at_the_front_of_a_large_batch(self):
        """A shift estimated from the first rows alone would miss the mean by 22 standard deviations."""
        z1, z2 = _views(16384, 6)
        z1[:32] += 100
        z2[:32] += 100
        expected, got = truth(z1, z2), evaluate(z1, z2)
        for view in (0, 1):
            budget = expected.gradient_budget(view, 1e-5, torch.float32)
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    def test_rounding_does_not_shift_the_diagonal(self, algorithm):
        """Near the optimum a shift of every C_ii by 6e-8, as from M₂ + N ε in float32, is 1 % of Σ (C_ii − 1)²."""
        shifts = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            signal, *noise = torch.randn(3, 300, 40, generator=generator, dtype=torch.float64)
            signal = (signal - signal.mean(0)) / signal.std(0, unbiased=False)
            views = [(signal + 1e-3 * part).float() for part in noise]
            got = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True).on_diagonal
            shifts.append(float(got / truth(*views).on_diagonal) - 1)
        assert abs(sum(shifts) / 8) < 2e-3

    def test_any_finite_eps_has_its_loss(self, algorithm, dtype):
        """N ε may overflow: every feature is constant beside it, and L = D."""
        for eps in (1e300, 1e307, 1.7e308):
            assert barlow_twins_loss(*_views(64, 4, dtype), eps=eps, algorithm=algorithm) == 4

    def test_a_million_features_add_up(self):
        """Σ (C_ii − 1)² in float32 would be off by 2e-6."""
        generator = torch.Generator().manual_seed(0)
        z1, z2 = (torch.randn(4, 2**20, generator=generator) for _ in range(2))
        got = barlow_twins_loss(z1, z2, lambd=0.0)
        right = barlow_twins_loss(z1.double(), z2.double(), lambd=0.0)
        assert_near(got, right, 3e-7 * float(right))

    @pytest.mark.parametrize("row", [0, -1])
    def test_one_row_far_away_in_a_large_batch(self, algorithm, row):
        """Its distance is the spread of every feature; the gradients of the others keep their digits."""
        z1, z2 = _views(256, 600)
        z1[row], z2[row] = z1[row] + 1000, z2[row] + 1000
        expected, got = truth(z1, z2), evaluate(z1, z2, algorithm=algorithm)
        for view in (0, 1):
            budget = 2.5e-5 * float(expected.gradients[view].norm())
            assert_near(got.gradients[view], expected.gradients[view], budget, f"gradient of z{view + 1}")

    def test_eps_zero_is_allowed_and_a_dead_feature_is_then_nan(self, algorithm):
        """0/0 has no value; it is not turned into one."""
        assert barlow_twins_loss(*_views(kind="gaussian"), eps=0, algorithm=algorithm).isfinite()
        assert barlow_twins_loss(*_views(kind="dead_features"), eps=0.0, algorithm=algorithm).isnan()


class TestModes:
    def test_train_and_eval_are_the_same(self, algorithm):
        """There are no running statistics."""
        loss_fn = BarlowTwinsLoss(algorithm=algorithm)
        z1, z2 = _views()
        assert torch.equal(loss_fn.train()(z1, z2), loss_fn.eval()(z1, z2))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_autograd(self, algorithm, mode):
        z1, z2 = (view.requires_grad_() for view in _views())
        expected = barlow_twins_loss(z1, z2, algorithm=algorithm)
        with mode():
            loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
            inference_views = [view * 1 for view in (z1, z2)]
        assert not loss.requires_grad
        assert torch.equal(loss, expected.detach())
        assert torch.equal(barlow_twins_loss(*inference_views, algorithm=algorithm), expected.detach())

    @pytest.mark.parametrize("lambd", [0.0051, 1 / 3, 0, 7, 1e-12, 1e6, torch.tensor(0.0051)], ids=str)
    def test_the_loss_is_the_sum_of_its_terms_to_the_bit(self, algorithm, dtype, lambd):
        """As a tensor would add them up, whether or not it was one that did."""
        for n in range(3, 43):
            loss, on, off = barlow_twins_loss(
                *_views(n, dtype=dtype), lambd=lambd, algorithm=algorithm, return_terms=True
            )
            weight = lambd.to(dtype) if isinstance(lambd, torch.Tensor) else lambd
            assert torch.equal(loss, on + weight * off)

    def test_under_a_default_device_the_loss_stays_with_its_views(self, algorithm):
        z1, z2 = _views()
        expected = barlow_twins_loss(z1, z2, algorithm=algorithm)
        for lambd in (0.0051, torch.tensor(0.0051)):
            with torch.device("meta"):
                loss = barlow_twins_loss(z1.requires_grad_(), z2, lambd=lambd, algorithm=algorithm)
                loss.backward()
            torch.testing.assert_close(loss.detach(), expected)

    def test_needs_no_grad_when_no_view_does(self, algorithm):
        assert not barlow_twins_loss(*_views(), algorithm=algorithm).requires_grad

    def test_under_deterministic_algorithms(self, algorithm, dtype):
        """There new memory is filled with NaN: every element is written before it is read."""
        z1, z2 = _views(300, 600, dtype)
        expected = evaluate(z1, z2, algorithm=algorithm)
        torch.use_deterministic_algorithms(True)
        try:
            got = evaluate(z1, z2, algorithm=algorithm)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_bitwise(got, expected)

    def test_default_dtype_does_not_matter(self, algorithm):
        z1, z2 = _views()
        expected = evaluate(z1, z2, algorithm=algorithm)
        torch.set_default_dtype(torch.float64)
        try:
            got = evaluate(z1, z2, algorithm=algorithm)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.loss.dtype == torch.float32
        assert_bitwise(got, expected)

    def test_anomaly_detection(self, algorithm):
        z1, z2 = _views()
        expected = evaluate(z1, z2, algorithm=algorithm)
        with torch.autograd.detect_anomaly(check_nan=True):
            assert_bitwise(evaluate(z1, z2, algorithm=algorithm), expected)

    def test_threads_do_not_disturb_each_other(self, algorithm):
        batches = [Batch(32, 48, seed, "trained").views(torch.float32) for seed in range(4)]
        expected = [evaluate(*views, algorithm=algorithm) for views in batches]
        results = {}

        def work(index):
            torch.set_num_threads(1)
            results[index] = [evaluate(*batches[index], algorithm=algorithm) for _ in range(10)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, once in enumerate(expected):
            for got in results[index]:
                assert_bitwise(got, once)

    def test_parameters_may_be_views(self, algorithm):
        z1, z2 = (torch.nn.Parameter(view) for view in _views())
        barlow_twins_loss(z1, z2, algorithm=algorithm).backward()
        assert type(z1.grad) is torch.Tensor

    @HALVES
    def test_meta_tensors(self, algorithm, half):
        for dtype, loss_dtype in (
            (half, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ):
            z1, z2 = torch.randn(2, 300, 700, dtype=dtype, device="meta").requires_grad_()
            loss = barlow_twins_loss(z1, z2, algorithm=algorithm)
            assert (loss.shape, loss.dtype, loss.device.type) == ((), loss_dtype, "meta")
            gradients = torch.autograd.grad(loss, (z1, z2))
            assert {(tuple(g.shape), g.dtype, g.device.type) for g in gradients} == {((300, 700), dtype, "meta")}

    def test_fake_tensors(self, algorithm):
        with FakeTensorMode():
            z1, z2 = torch.randn(2, 30, 70).requires_grad_()
            terms = barlow_twins_loss(z1, z2, algorithm=algorithm, return_terms=True)
            gradients = torch.autograd.grad(terms.loss, (z1, z2))
        assert {tuple(term.shape) for term in terms} == {()}
        assert {tuple(gradient.shape) for gradient in gradients} == {(30, 70)}


# None of them the default.
_OTHER_SETTINGS = {"lambd": 0.02, "eps": 1e-3, "algorithm": "primal", "backend": "eager", "synchronize": False}


class TestModule:
    def test_signature_is_that_of_the_function(self):
        """Same settings, same defaults, same annotations; only the views and `return_terms` belong to the call."""
        function = dict(inspect.signature(barlow_twins_loss).parameters)
        constructor = dict(inspect.signature(BarlowTwinsLoss.__init__).parameters)
        forward = dict(inspect.signature(BarlowTwinsLoss.forward).parameters)
        del constructor["self"], forward["self"]
        assert {name: function.pop(name) for name in ("views", "return_terms", "z1", "z2")} == forward
        assert list(function) == list(constructor)
        for name, parameter in function.items():
            assert constructor[name].default == parameter.default, name
            assert constructor[name].annotation == parameter.annotation, name
        assert constructor["lambd"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert {constructor[name].kind for name in constructor if name != "lambd"} == {inspect.Parameter.KEYWORD_ONLY}

    @pytest.mark.parametrize("name", ["lambd", "eps", "algorithm"])
    def test_every_setting_reaches_the_function(self, name):
        """Each of these settings changes the bits or the graph of this result."""
        z1, z2 = _views(8, 9)
        value = _OTHER_SETTINGS[name]
        module, function = BarlowTwinsLoss(**{name: value}), barlow_twins_loss(z1, z2, **{name: value})
        assert torch.equal(module(z1, z2), function)
        assert getattr(module, name) == value

    def test_terms(self, algorithm):
        terms = BarlowTwinsLoss(0.5, algorithm=algorithm)(*_views(), return_terms=True)
        assert isinstance(terms, BarlowTwinsTerms)
        assert terms._fields == ("loss", "on_diagonal", "off_diagonal")
        assert torch.equal(terms.loss, terms.on_diagonal + 0.5 * terms.off_diagonal)

    def test_holds_no_state(self):
        loss_fn = BarlowTwinsLoss()
        assert not loss_fn.state_dict()
        assert not list(loss_fn.parameters())
        assert not list(loss_fn.buffers())
        loss_fn.load_state_dict({})

    def test_lambd_as_a_tensor_goes_to_the_device_and_keeps_its_dtype(self):
        """It is not saved, and a schedule may set a number in its place."""
        loss_fn = BarlowTwinsLoss(torch.tensor(1e-8)).half()
        assert loss_fn.lambd == torch.tensor(1e-8)
        assert not loss_fn.state_dict()
        assert loss_fn.to("meta").lambd.is_meta
        loss_fn.lambd = 0.01
        assert loss_fn.lambd == 0.01
        learned = BarlowTwinsLoss(torch.nn.Parameter(torch.tensor(0.5)))
        assert list(learned.parameters()) == [learned.lambd]

    def test_numbers_of_numpy(self):
        numpy, views = pytest.importorskip("numpy"), _views()
        for number in (numpy.float32, numpy.float64, numpy.int64):
            given, expected = {"lambd": number(2), "eps": number(1)}, {"lambd": 2.0, "eps": 1.0}
            assert barlow_twins_loss(*views, **given) == barlow_twins_loss(*views, **expected)
            assert BarlowTwinsLoss(**given)(*views) == barlow_twins_loss(*views, **expected)

    def test_return_terms_is_true_or_false(self):
        with pytest.raises(TypeError, match="return_terms to be True or False, got 'yes'"):
            barlow_twins_loss(*_views(), return_terms="yes")

    def test_repr_builds_the_same_module(self):
        loss_fn = BarlowTwinsLoss(**_OTHER_SETTINGS)
        rebuilt = eval(repr(loss_fn), {"BarlowTwinsLoss": BarlowTwinsLoss})
        assert {name: getattr(rebuilt, name) for name in _OTHER_SETTINGS} == _OTHER_SETTINGS

    @pytest.mark.parametrize("copied", ["pickle", "deepcopy", "torch.save"])
    def test_copies_are_equal(self, copied):
        loss_fn = BarlowTwinsLoss(**_OTHER_SETTINGS)
        if copied == "torch.save":
            buffer = io.BytesIO()
            torch.save(loss_fn, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = copy.deepcopy(loss_fn) if copied == "deepcopy" else pickle.loads(pickle.dumps(loss_fn))
        assert {name: getattr(other, name) for name in _OTHER_SETTINGS} == _OTHER_SETTINGS
        z1, z2 = _views()
        assert torch.equal(other(z1, z2), loss_fn(z1, z2))

    def test_half_and_double_do_not_change_the_loss(self):
        """Module casts reach parameters and buffers; there are none."""
        z1, z2 = _views()
        assert torch.equal(BarlowTwinsLoss().half()(z1, z2), BarlowTwinsLoss()(z1, z2))
