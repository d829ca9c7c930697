"""The float16 products that GPUs take for 16-bit views and under autocast, run here on the CPU.

The features are scaled by 1/√N before they are rounded, so no product can overflow, whatever the batch.
"""

import pytest
import torch

from barlow_loss import reference
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan

LAMBD, EPS = 0.0051, 1e-5


def _views(n, d):
    generator = torch.Generator().manual_seed(n + d)
    signal, noise1, noise2 = torch.randn(3, n, d, generator=generator)
    return signal + 0.5 * noise1, signal + 0.5 * noise2


def _evaluate(loss_fn, z1, z2):
    leaves = [z.clone().requires_grad_() for z in (z1, z2)]
    loss = loss_fn(*leaves)
    return loss.detach(), torch.cat(torch.autograd.grad(loss, leaves))


def _float16(z1, z2, algorithm):
    plan = Plan(algorithm, "eager", torch.float32, torch.float16)
    return loss_and_sums((z1, z2), LAMBD, EPS, plan, Shards(ALONE, (z1.shape[0],)))[0]


def _truth(z1, z2):
    return _evaluate(
        lambda a, b: reference.barlow_twins_loss(a, b, lambd=LAMBD, eps=EPS).loss, z1.double(), z2.double()
    )


# Both sides of N = D/2, and odd sizes, which no tile divides.
@pytest.mark.parametrize(("n", "d"), [(64, 1024), (33, 129), (129, 67)])
@pytest.mark.parametrize("algorithm", ["primal", "dual"])
def test_error_is_that_of_float16_operands(algorithm, n, d):
    z1, z2 = _views(n, d)
    loss, gradient = _evaluate(lambda a, b: _float16(a, b, algorithm), z1, z2)
    right_loss, right = _truth(z1, z2)
    unit = torch.finfo(torch.float16).eps
    assert loss.dtype == gradient.dtype == torch.float32
    assert abs(loss - right_loss) <= unit * right_loss
    assert (gradient - right).norm() <= 2 * unit * right.norm()


@pytest.mark.parametrize(("algorithm", "d"), [("primal", 512), ("dual", 4096)])
def test_one_outlier_does_not_overflow(algorithm, d):
    z1, z2 = _views(64, d)
    z1[0], z2[0] = z1[0] * 1e4, z2[0] * 1e4  # K_00 is D there: 4096 scaled, 262144 unscaled
    loss, gradient = _evaluate(lambda a, b: _float16(a, b, algorithm), z1, z2)
    right_loss, _ = _truth(z1, z2)
    assert gradient.isfinite().all()
    assert abs(loss - right_loss) <= 4 * torch.finfo(torch.float16).eps * right_loss
