"""More than two views beyond the laws: sizes above one block, weights that make no sense, graphs, 16 bits."""

import pytest
import torch

from barlow_loss import BarlowTwinsLoss, barlow_twins_loss
from comparison import assert_near
from inductor import needs_compiler
from strategies import Batch
from test_laws_views import Mean, evaluate, random_weights

BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]


@pytest.mark.parametrize("n", [70, 600])
def test_sizes_above_one_block(algorithm, dtype, n):
    """The CPU works by blocks of rows: several of them, the last one shorter."""
    z, weights = Batch(n, 1000, 5, "trained", mean=1.0).more_views(4, dtype), random_weights(4, 2)
    Mean(z, weights).assert_holds(*evaluate(z, algorithm=algorithm, pair_weights=weights), dtype)


def test_the_module_keeps_its_weights(algorithm):
    z, weights = Batch(9, 24, 1, "trained").more_views(3), [[0, 1, 2], [1, 0, 0], [2, 0, 0]]
    loss_fn = BarlowTwinsLoss(algorithm=algorithm, pair_weights=torch.tensor(weights))
    assert "pair_weights=((0.0, 1.0, 2.0), (1.0, 0.0, 0.0), (2.0, 0.0, 0.0))" in repr(loss_fn)
    assert loss_fn(*z) == barlow_twins_loss(*z, algorithm=algorithm, pair_weights=weights)


def test_lambd_alone_may_need_a_gradient(algorithm):
    lambd = torch.tensor(0.1, requires_grad=True)
    terms = barlow_twins_loss(
        *Batch(9, 24, 1, "trained").more_views(3, torch.float32), lambd=lambd, algorithm=algorithm, return_terms=True
    )
    (gradient,) = torch.autograd.grad(terms.loss, lambd)
    assert gradient == terms.off_diagonal


ONES = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
REFUSED = {
    "not a matrix": (3, TypeError, ["square tensor or a sequence of rows of numbers", "int"]),
    "text": ([["a", "b"]], TypeError, ["rows of numbers"]),
    "one row too few": (ONES[:2], ValueError, ["shape (V, V)"]),
    "ragged": ([[0, 1], [1, 0, 1], [1, 1, 0]], ValueError, ["shape (V, V)"]),
    "of two views": ([[0, 1], [1, 0]], ValueError, ["(3, 3) for 3 views", "got 2 rows"]),
    "negative": ([[0, -1, 1], [-1, 0, 1], [1, 1, 0]], ValueError, ["finite and ≥ 0"]),
    "nan": ([[0, float("nan"), 1], [1, 0, 1], [1, 1, 0]], ValueError, ["finite and ≥ 0"]),
    "diagonal": ([[1, 1, 1], [1, 0, 1], [1, 1, 0]], ValueError, ["diagonal of 0"]),
    "not symmetric": ([[0, 1, 1], [2, 0, 1], [1, 1, 0]], ValueError, ["symmetric", "(w + w.T) / 2"]),
    "nothing": ([[0, 0, 0]] * 3, ValueError, ["a positive weight"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_make_no_sense_are_refused(case):
    """By the function, and by the module already when it is made, but for their number."""
    weights, error, words = REFUSED[case]
    with pytest.raises(error) as raised:
        barlow_twins_loss(*Batch(4, 6, 1, "gaussian").more_views(3), pair_weights=weights)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    if case != "of two views":
        with pytest.raises(error, match="BarlowTwinsLoss"):
            BarlowTwinsLoss(pair_weights=weights)


def test_views_of_other_shapes_are_named():
    z1, z2, z3 = Batch(4, 6, 1, "gaussian").more_views(3)
    with pytest.raises(ValueError, match=r"\(N, D\) for all 3 views, got z1 \(4, 6\) and z2 \(4, 6\) and z3 \(3, 6\)"):
        barlow_twins_loss(z1, z2, z3[:3])
    with pytest.raises(ValueError, match=r"z3 \(4, 5\).*Row n of every view"):
        barlow_twins_loss(z1, z2, z3[:, :5])
    with pytest.raises(TypeError, match=r"one dtype for all 3 views.*z3\.to\(z1\.dtype\)"):
        barlow_twins_loss(z1, z2, z3.float())
    with pytest.raises(ValueError, match="at least two views, got 1"):
        barlow_twins_loss(z1)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("definition", [{}, {"target": -1.0, "correction": 1}], ids=str)
    def test_in_one_graph(self, algorithm, dtype, backend, definition):
        z = Batch(20, 50, 1, "trained").more_views(4, dtype)
        settings = {"algorithm": algorithm, "pair_weights": random_weights(4, 1)}
        if definition:
            settings |= {"off_diagonal_target": definition["target"], "correction": definition["correction"]}

        def loss_fn(*views):
            return tuple(barlow_twins_loss(*views, return_terms=True, **settings))

        compiled = torch.compile(loss_fn, fullgraph=True, backend=backend)
        leaves = [view.detach().requires_grad_() for view in z]
        terms = compiled(*leaves)
        gradients = torch.autograd.grad(terms[0], leaves)
        expected = Mean(z, settings["pair_weights"], **definition)
        expected.assert_holds([term.detach() for term in terms], gradients, dtype)

    def test_without_gradients(self, algorithm):
        """There Dynamo would hand a forward with any number of views one argument more."""
        z = Batch(20, 50, 1, "trained").more_views(4)
        compiled = torch.compile(barlow_twins_loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*z, algorithm=algorithm), barlow_twins_loss(*z, algorithm=algorithm))

    def test_exports(self, algorithm):
        z = Batch(12, 30, 1, "trained").more_views(3, torch.float32)
        program = torch.export.export(BarlowTwinsLoss(algorithm=algorithm), z)
        torch.testing.assert_close(program.module()(*z), barlow_twins_loss(*z, algorithm=algorithm))


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_autocast_and_16_bits(algorithm, products):
    """float32 out, gradients in the dtype of the views."""
    z = Batch(16, 60, 1, "trained").more_views(3, products)
    with torch.autocast(z[0].device.type, torch.bfloat16):
        terms, gradients = evaluate(z, algorithm=algorithm)
    assert terms[0].dtype == torch.float32
    assert {gradient.dtype for gradient in gradients} == {products}
    expected = Mean(z)
    assert_near(terms[0], expected.loss, 2e-3 * float(expected.loss))
