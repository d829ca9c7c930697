"""P34: matrix products in 16 bits cost little, because the diagonal of C does not come from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss import reference
from comparison import LAMBD, Evaluation, evaluate, truth
from strategies import Batch

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


class BFloat16Products(TorchDispatchMode):
    """Rounds the operands of every matrix product to bfloat16, as a 16-bit kernel with a float32 accumulator does."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _PRODUCTS:
            self.count += 1
            args = [arg.bfloat16().to(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def _rounded(z1, z2, algorithm):
    with BFloat16Products() as products:
        got = evaluate(z1, z2, algorithm=algorithm)
    assert products.count >= 3, "the products escaped the rounding"
    return got


def _diagonal_from_the_product(z1, z2):
    """The textbook in float32 under the same rounding: its C_ii come out of the matrix product."""
    leaves = [view.clone().requires_grad_() for view in (z1, z2)]
    with BFloat16Products():
        terms = reference.barlow_twins_loss(*leaves)
        gradients = torch.autograd.grad(terms.loss, leaves)
    return Evaluation(*(term.detach() for term in terms), gradients)


def _worst_error(got, expected, scales):
    return max(
        float((one.double() - other).norm() / scale.norm())
        for one, other, scale in zip(got.gradients, expected.gradients, scales, strict=True)
    )


@st.composite
def untrained_views(draw):
    """D ≤ 4N, as in the paper (8192 and 2048): the off-diagonal's share of the gradient grows like λD/N."""
    n = draw(st.integers(8, 32))
    kind = draw(st.sampled_from(["gaussian", "heavy_tailed"]))
    return Batch(n, draw(st.integers(4, 4 * n)), draw(st.integers(0, 2**16)), kind)


@given(batch=untrained_views())
def test_p34_bfloat16_products_leave_the_gradient_within_1e_4(algorithm, batch):
    """Error by norm ≤ 1e-4, where the textbook under the same rounding is above it."""
    z1, z2 = batch.views(torch.float32)
    expected = truth(z1, z2)
    assert _worst_error(_rounded(z1, z2, algorithm), expected, expected.gradients) <= 1e-4
    assert _worst_error(_diagonal_from_the_product(z1, z2), expected, expected.gradients) > 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "d"), [(16, 64), (64, 256), (96, 24)])
def test_p34_on_trained_views_only_the_off_diagonal_gradient_is_rounded(algorithm, n, d, seed):
    """The error stays below two bfloat16 roundings of the gradient of λ·off; with a rounded diagonal it does not.

    Near C_ii = 1 little is left of the on-diagonal gradient, so λ·off is a large share of the whole and no 16-bit
    product can hold 1e-4 of it: 0.7e-3 to 4e-3 were measured on these views, the textbook gave 7e-3 to 13e-3.
    """
    z1, z2 = Batch(n, d, seed, "trained").views(torch.float32)
    expected = truth(z1, z2)
    leaves = [view.double().requires_grad_() for view in (z1, z2)]
    off_gradients = torch.autograd.grad(LAMBD * reference.barlow_twins_loss(*leaves).off_diagonal, leaves)
    assert _worst_error(_rounded(z1, z2, algorithm), expected, off_gradients) <= 2**-7
    assert _worst_error(_diagonal_from_the_product(z1, z2), expected, off_gradients) > 2**-7
