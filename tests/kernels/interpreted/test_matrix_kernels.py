"""The kernels that walk over matrices of our own, and the end of the forward, each against float64."""

import pytest
import torch
from repaired_interpreter import poisoned, program_order

from barlow_loss._backends import eager, triton
from barlow_loss._backends.triton import _frobenius
from barlow_loss._backends.triton._frobenius import frobenius
from barlow_loss._plan import Plan

F64, F32, F16 = torch.float64, torch.float32, torch.float16


@pytest.fixture(autouse=True)
def _poison():
    """A word that no kernel wrote is NaN."""
    with poisoned():
        yield


def plan_of(dtype):
    return Plan("dual", "triton", dtype, dtype)


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(0, 16), (1, 2), (16, 16), (64, 64), (65, 127), (113, 300)])
def test_frobenius(n, m, dtype):
    """From no element to nine blocks, the last one ragged."""
    a, b = random(2, n, m, dtype=dtype)
    right = (a.double() * b.double()).sum()
    size = (a.double() * b.double()).abs().sum()
    parts = frobenius(a, b)
    assert parts.dtype == torch.promote_types(dtype, F32)
    assert len(parts) == max(2, -(-n * m // 4096))
    assert abs(parts.double().sum() - right) <= 2 * torch.finfo(parts.dtype).eps * size


@pytest.mark.parametrize("most", [2, 3, 9])
@pytest.mark.parametrize("order", ["forward", "reverse", 5])
def test_frobenius_of_more_blocks_than_programs(monkeypatch, most, order):
    monkeypatch.setattr(_frobenius, "_MOST_PROGRAMS", most)
    a, b = random(2, 113, 301, dtype=F64)
    with program_order(order):
        parts = frobenius(a, b)
    assert len(parts) == most
    torch.testing.assert_close(parts.sum(), (a * b).sum())


SIZES = [(1, 1), (5, 3), (1024, 1024), (1025, 2), (2, 1025), (3000, 1500)]


def right_terms(c, parts, lambd, includes_diagonal):
    on, off = (c - 1).square().sum(), parts.double().sum()
    if includes_diagonal:
        off = off - c.square().sum()
    return on + lambd * off, on, off


@pytest.mark.parametrize(("d", "n_parts"), SIZES)
@pytest.mark.parametrize("includes_diagonal", [False, True])
@pytest.mark.parametrize(("parts_dtype", "dtype"), [(F64, F64), (F32, F32), (F64, F32)], ids=str)
@pytest.mark.parametrize("lambd", [0.0051, torch.tensor(0.0051)], ids=["number", "tensor"])
def test_penalties(d, n_parts, includes_diagonal, parts_dtype, dtype, lambd):
    c = 0.5 + 0.1 * random(d, dtype=F64)
    parts = (random(n_parts, dtype=F64, seed=1).abs() + 2 * d / n_parts).to(parts_dtype)
    lambd = lambd.to(dtype) if isinstance(lambd, torch.Tensor) else lambd
    got = triton.loss_terms(c, parts, lambd, includes_diagonal, plan_of(dtype))
    # In float64 the right terms have a rounding of their own.
    for one, right in zip(got, right_terms(c, parts, float(lambd), includes_diagonal), strict=True):
        assert one.shape == ()
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), right, rtol=8 * torch.finfo(dtype).eps, atol=0)
    loss, on, off = got
    assert loss == on + lambd * off, "the loss is not what its terms add up to, bit by bit"


@pytest.mark.parametrize("lambd", [0.0, 1e-300, 0.1, 1 / 3, 1e300])
def test_a_number_lambd_keeps_its_digits(lambd):
    """A float argument of a kernel is float32 unless it says otherwise."""
    c, parts = torch.full((4,), 0.25, dtype=F64), torch.full((2,), 3.0, dtype=F64)
    loss, on, off = triton.loss_terms(c, parts, lambd, False, plan_of(F64))
    assert loss == on + lambd * off


def test_penalties_clamp_what_rounding_left_below_zero():
    c = torch.ones(3, dtype=F64)
    _, on, off = triton.loss_terms(c, torch.tensor([3.0 - 1e-12], dtype=F64), 0.1, True, plan_of(F64))
    assert (on, off) == (0, 0)
    _, _, off = triton.loss_terms(c, torch.tensor([-1.0], dtype=F64), 0.1, False, plan_of(F64))
    assert off == -1, "nothing is subtracted here, so nothing is clamped"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["C_ii", "parts"])
def test_penalties_keep_nan(bad, where):
    c, parts = torch.ones(5, dtype=F64), torch.ones(5, dtype=F64)
    (c if where == "C_ii" else parts)[2] = bad
    loss, _, off = triton.loss_terms(c, parts, 0.1, True, plan_of(F64))
    assert not loss.isfinite()
    assert off.isnan() if bad != bad else not (off == 0 and where == "parts")


def test_grams_of_a_shard():
    """This process's rows against those of all."""
    u = (random(2, 40, 32, dtype=F64)).to(F32)
    own = u[:, 10:25].contiguous()
    k, parts = triton.grams(own, (u[0], u[1]), plan_of(F32))
    expected, whole = eager.grams(own, (u[0], u[1]), plan_of(F32))
    assert all(map(torch.equal, k, expected))
    torch.testing.assert_close(parts.sum(), whole.sum())
