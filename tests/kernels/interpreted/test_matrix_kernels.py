"""The kernels that walk over matrices of our own, and the end of the forward, each against float64."""

import pytest
import torch
from repaired_interpreter import poisoned, program_order, recorded_launches

from barlow_loss._backends import eager, triton
from barlow_loss._backends.triton import _frobenius
from barlow_loss._backends.triton._frobenius import frobenius
from barlow_loss._backends.triton._symmetric_gram import symmetric_grams

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _poison():
    """A word that no kernel wrote is NaN."""
    with poisoned():
        yield


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


def right_terms(c, parts, lambd, holds_diagonal):
    on, off = (c - 1).square().sum(), parts.double().sum()
    if holds_diagonal:
        off = off - c.square().sum()
    return on + lambd * off, on, off


@pytest.mark.parametrize(("d", "n_parts"), SIZES)
@pytest.mark.parametrize("holds_diagonal", [False, True])
@pytest.mark.parametrize(("parts_dtype", "dtype"), [(F64, F64), (F32, F32), (F64, F32)], ids=str)
@pytest.mark.parametrize("lambd", [0.0051, torch.tensor(0.0051)], ids=["number", "tensor"])
def test_penalties(d, n_parts, holds_diagonal, parts_dtype, dtype, lambd):
    c = 0.5 + 0.1 * random(d, dtype=F64)
    parts = (random(n_parts, dtype=F64, seed=1).abs() + 2 * d / n_parts).to(parts_dtype)
    lambd = lambd.to(dtype) if isinstance(lambd, torch.Tensor) else lambd
    got = triton.penalties(c, parts, lambd, holds_diagonal, dtype)
    # In float64 the right terms have a rounding of their own.
    for one, right in zip(got, right_terms(c, parts, float(lambd), holds_diagonal), strict=True):
        assert one.shape == ()
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), right, rtol=8 * torch.finfo(dtype).eps, atol=0)
    loss, on, off = got
    assert loss == on + lambd * off, "the loss is not what its terms add up to, bit by bit"


@pytest.mark.parametrize("lambd", [0.0, 1e-300, 0.1, 1 / 3, 1e300])
def test_a_number_lambd_keeps_its_digits(lambd):
    """A float argument of a kernel is float32 unless it says otherwise."""
    c, parts = torch.full((4,), 0.25, dtype=F64), torch.full((2,), 3.0, dtype=F64)
    loss, on, off = triton.penalties(c, parts, lambd, False, F64)
    assert loss == on + lambd * off


def test_penalties_clamp_what_rounding_left_below_zero():
    c = torch.ones(3, dtype=F64)
    _, on, off = triton.penalties(c, torch.tensor([3.0 - 1e-12], dtype=F64), 0.1, True, F64)
    assert (on, off) == (0, 0)
    _, _, off = triton.penalties(c, torch.tensor([-1.0], dtype=F64), 0.1, False, F64)
    assert off == -1, "nothing is subtracted here, so nothing is clamped"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["C_ii", "parts"])
def test_penalties_keep_nan(bad, where):
    c, parts = torch.ones(5, dtype=F64), torch.ones(5, dtype=F64)
    (c if where == "C_ii" else parts)[2] = bad
    loss, _, off = triton.penalties(c, parts, 0.1, True, F64)
    assert not loss.isfinite()
    assert off.isnan() if bad != bad else not (off == 0 and where == "parts")


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(16, 16), (48, 80), (64, 64), (80, 144), (208, 32)])
@pytest.mark.parametrize("order", ["forward", "reverse", 3])
def test_symmetric_grams(n, d, dtype, order):
    """One tile and several, the last ones ragged; no worse than torch.mm; what is mirrored is the same to the bit."""
    u = (random(2, n, d, dtype=F64) / n**0.5).to(dtype)
    with program_order(order):
        got = symmetric_grams(u)
    for view in (0, 1):
        right = u[view].double() @ u[view].double().T
        rival = float(((u[view] @ u[view].T).double() - right).norm())
        assert float((got[view].double() - right).norm()) <= 2 * rival
        mirrored = torch.tril(got[view], -64).T
        assert torch.equal(torch.triu(got[view], 64), mirrored)


def test_every_tile_of_the_triangle_is_found():
    """The tile's place comes from a root in float32: right for all tiles of 20,000 rows and more."""
    n_tiles = 320 * 321 // 2
    tile = torch.arange(n_tiles)
    i = (((8 * tile.float() + 1).sqrt() - 1) * 0.5).int()
    i = torch.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    i = torch.where(i * (i + 1) // 2 > tile, i - 1, i)
    assert torch.equal(torch.stack([i, tile - i * (i + 1) // 2]), torch.tril_indices(320, 320))


@pytest.mark.parametrize("least", [None, 16, 64])
def test_the_symmetric_kernel_is_an_option(monkeypatch, least):
    """It is off until it is asked for, and for 16-bit features alone."""
    assert triton.SYMMETRIC_GRAM_FROM is None
    u = (random(2, 32, 48, dtype=F64) / 6).to(F16)
    expected = triton.grams(u, None)
    monkeypatch.setattr(triton, "SYMMETRIC_GRAM_FROM", least)
    with recorded_launches() as launches:
        got = triton.grams(u, None)
        triton.grams(u.float(), None)
        triton.grams(u, (u[0], u[1]))
    used = [launch.kernel for launch in launches].count("symmetric_grams_kernel")
    assert used == (least == 16)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)


def test_grams_of_a_shard():
    """This process's rows against those of all."""
    u = (random(2, 40, 32, dtype=F64)).to(F32)
    own = u[:, 10:25].contiguous()
    k1, k2, parts = triton.grams(own, (u[0], u[1]))
    e1, e2, whole = eager.grams(own, (u[0], u[1]))
    assert torch.equal(k1, e1)
    assert torch.equal(k2, e2)
    torch.testing.assert_close(parts.sum(), whole)
