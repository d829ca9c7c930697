"""More than two views through the Triton backend, in the interpreter, against float64; their operations by opcheck.

The laws themselves, tests/test_laws_views.py, run with `--backend triton` beside this folder.
"""

import pytest
import torch
from repaired_interpreter import poisoned, program_order
from torch import library

from barlow_loss._backends.triton import _views
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._pairs import all_alike, normalized
from barlow_loss._plan import Plan
from comparison import assert_near
from strategies import Batch
from test_laws_views import Mean, random_weights

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def evaluate(views, algorithm, products, weights, lambd=0.0051, target=0.0):
    leaves = [view.detach().clone().requires_grad_() for view in views]
    compute = torch.promote_types(leaves[0].dtype, F32)
    plan = Plan(algorithm, "triton", compute, products, weights=weights, off_diagonal_target=target)
    with poisoned():
        terms = loss_and_sums(leaves, lambd, 1e-5, plan, Shards(ALONE, (len(leaves[0]),)))
        gradients = torch.autograd.grad(terms[0], leaves)
    return [term.detach() for term in terms], gradients


@pytest.mark.parametrize("views", [3, 4, 5])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (33, 129), (40, 16)])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_the_weighted_mean_over_pairs(algorithm, views, n, d, dtype):
    """Odd numbers of views, ragged sizes, weights of 0."""
    z, rows = Batch(n, d, 5, "trained", mean=1.0).more_views(views, dtype), random_weights(views, n)
    weights = normalized(tuple(map(tuple, rows)))
    Mean(z, rows).assert_holds(*evaluate(z, algorithm, dtype, weights), dtype)


@pytest.mark.parametrize("z", [F32, BF16], ids=str)
@pytest.mark.parametrize(("count", "target"), [(3, 0.0), (3, -1.0), (2, -1.0)])
def test_float16_products(algorithm, z, count, target):
    """The diagonals are summed before u is rounded: the terms at float16's accuracy, gradients in the views' dtype."""
    views = Batch(64, 256, 5, "trained", mean=1.0).more_views(count, z)
    (loss, on, _), gradients = evaluate(views, algorithm, F16, all_alike(count), target=target)
    expected = Mean(views, target=target)
    assert_near(loss, expected.loss, 2e-3 * float(expected.loss))
    right = sum(found.on_diagonal for found in expected.truths.values()) / len(expected.truths)
    assert_near(on, right, 3e-6 * float(right))
    for gradient, wanted in zip(gradients, expected.gradients, strict=True):
        assert gradient.dtype == z
        assert_near(gradient, wanted, 5e-3 * float(wanted.norm()))


def test_the_order_of_the_programs_changes_no_bit(algorithm):
    views = Batch(70, 90, 3, "trained").more_views(3, F32)
    expected = evaluate(views, algorithm, F32, all_alike(3))
    with program_order(7):
        got = evaluate(views, algorithm, F32, all_alike(3))
    for one, other in zip(got, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_view_without_pairs_has_a_gradient_of_0(algorithm):
    views = Batch(12, 30, 3, "trained").more_views(3, F64)
    _, gradients = evaluate(views, algorithm, F64, normalized(((0, 0, 1), (0, 0, 0), (1, 0, 0))))
    assert torch.equal(gradients[1], torch.zeros_like(views[1]))


def _opcheck_cases():
    u = torch.randn(3, 16, 32)
    k = [own @ own.T for own in u]
    c, rho, one = torch.rand(20, dtype=F64), torch.rand(20, dtype=F64), torch.ones(())
    first, *others = u.unbind()
    pairs = [others, [c, c], [0.25, 0.75], rho]
    return {
        "pair_dots": (_views.pair_dots, (first, others, 10, 20, F32)),
        "pair_dots that rounds": (_views.pair_dots, (first, others, 10, 20, F16)),
        "mix": (_views.mix, (k[0], k[1:], [0.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0])),
        "view_gradient": (
            _views.view_gradient,
            (first, None, first, *pairs, one, None, None, None, 0.1, 1.0, True, 10, BF16),
        ),
        "view_gradient with q": (
            _views.view_gradient,
            (first, c, first, *pairs, None, one, one, one, 0.0, 1.1, False, 10, F32),
        ),
    }


@pytest.mark.parametrize("case", _opcheck_cases())
def test_opcheck(case):
    """Schema, fake and dispatch of each operation."""
    operation, arguments = _opcheck_cases()[case]
    library.opcheck(operation.operation, arguments)
