"""The kernels that walk over columns, each against float64: error at most twice that of the eager backend."""

import itertools

import pytest
import torch
from repaired_interpreter import poisoned, program_order

from barlow_loss._backends import eager, triton
from barlow_loss._backends.triton._input_gradients import column_dots
from barlow_loss._backends.triton._launch import column_tile
from barlow_loss._backends.triton._standardize import column_sums, fused_standardize, standardize
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._loss_terms import GradOutputs
from barlow_loss._plan import Plan
from comparison import centered

EPS = 1e-5
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# One tile and several, in rows (64 or 128, by the tile) and in features (16); N and D that no tile and no 16 divides.
SHAPES = [(2, 1), (3, 17), (16, 16), (33, 40), (130, 35), (300, 16)]
DTYPES = [(F64, F64), (F32, F32), (F32, F16), (BF16, F16), (F16, F16)]


@pytest.fixture(autouse=True)
def _poison():
    """A word that no kernel wrote is NaN."""
    with poisoned():
        yield


def views(n, d, dtype, mean=0.5, std=2.0):
    generator = torch.Generator().manual_seed(1000 * n + d)
    signal, one, other = torch.randn(3, n, d, generator=generator, dtype=F64)
    return ((mean + std * (signal + 0.5 * noise)).to(dtype) for noise in (one, other))


def error(got, right):
    return float((got.double() - right).norm())


def assert_no_worse(got, rival, right, dtype, what):
    """At most twice the rival's error, and two roundings of the result in the dtype of the arithmetic."""
    assert got.isfinite().all(), what
    allowed = 2 * error(rival, right) + torch.finfo(dtype).eps * float(right.norm())
    assert error(got, right) <= allowed, f"{what}: {error(got, right):.2e}, allowed {allowed:.2e}"


def truth(z1, z2, eps=EPS):
    """u, C_ii and ρ in float64."""
    x = torch.stack([centered(z1), centered(z2)])
    rho = (x.square().mean(1) + eps).rsqrt() / z1.shape[0] ** 0.5
    u = x * rho.unsqueeze(1)
    return u, (u[0] * u[1]).sum(0), rho


def plan_of(compute, products):
    return Plan("dual", "triton", compute, products)


def eager_standardize(z1, z2, matmul_dtype):
    plan = plan_of(torch.promote_types(z1.dtype, F32), matmul_dtype)
    u, c, rho = eager.standardize((z1, z2), EPS, plan, Shards(ALONE, (z1.shape[0],)))
    return u, c.squeeze(0), rho.squeeze(1)


@pytest.mark.parametrize(("dtype", "matmul_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_fused_standardize(n, d, dtype, matmul_dtype):
    z1, z2 = views(n, d, dtype)
    u, c, rho = fused_standardize(z1, z2, EPS, matmul_dtype)
    assert u.shape == (2, -(-n // 16) * 16, -(-d // 16) * 16)
    assert u.dtype == matmul_dtype
    assert (u[:, n:] == 0).all()
    assert (u[:, :, d:] == 0).all()
    rivals = eager_standardize(z1, z2, matmul_dtype)
    compute = torch.promote_types(dtype, F32)
    for name, got, rival, right, unit in zip(
        ("u", "C_ii", "ρ"), (u[:, :n, :d], c, rho), rivals, truth(z1, z2), (matmul_dtype, compute, compute), strict=True
    ):
        assert_no_worse(got, rival, right, unit, name)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (-1e3, 1.0), (0.0, 1e-3)])
def test_fused_standardize_far_from_zero(dtype, mean, std):
    """In bfloat16 most features are constant there: x is exactly 0, and so are u and C_ii."""
    z1, z2 = views(150, 20, dtype, mean, std)
    got = fused_standardize(z1, z2, EPS, F32)
    own = got[0][:, :150, :20], *got[1:]
    for name, one, rival, right in zip(
        ("u", "C_ii", "ρ"), own, eager_standardize(z1, z2, F32), truth(z1, z2), strict=True
    ):
        assert_no_worse(one, rival, right, F32, name)
    constant = (z1 == z1[0]).all(0) & (z2 == z2[0]).all(0)
    assert (own[0][:, :, constant] == 0).all()
    assert (own[1][constant] == 0).all()


def test_fused_standardize_meets_a_sorted_batch():
    """The pivot comes from rows of the whole batch: from the first alone the variance would lose three digits."""
    z1, z2 = (view.sort(0).values + 1e3 for view in views(512, 16, F32))
    _, c, rho = fused_standardize(z1, z2, EPS, F32)
    _, right_c, right_rho = truth(z1, z2)
    torch.testing.assert_close(rho, right_rho, rtol=3e-7, atol=0)
    torch.testing.assert_close(c, right_c, rtol=1e-6, atol=0)


LAYOUTS = {
    "transposed": lambda z: z.T.contiguous().T,
    "every other row": lambda z: torch.stack([z, z + 1], 1).flatten(0, 1)[::2],
    "every other column": lambda z: torch.stack([z, z + 1], 2).flatten(1)[:, ::2],
    "off by one element": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape),
    "a slice of wider rows": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_fused_standardize_takes_any_strides(layout, dtype):
    z1, z2 = views(35, 24, dtype)
    strided = LAYOUTS[layout](z1), LAYOUTS[layout](z2)
    assert torch.equal(strided[0], z1)
    for got, expected in zip(fused_standardize(*strided, EPS, F32), fused_standardize(z1, z2, EPS, F32), strict=True):
        assert torch.equal(got, expected)


def test_fused_standardize_takes_expanded_rows():
    """Strides of 0: every sample the same."""
    z1, z2 = (view[:1].expand(20, 24) for view in views(1, 24, F32))
    u, c, rho = fused_standardize(z1, z2, EPS, F32)
    assert (u == 0).all()
    assert (c == 0).all()
    torch.testing.assert_close(rho, torch.full_like(rho, (EPS * 20) ** -0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19])
def test_fused_standardize_does_not_hide_what_is_not_finite(bad):
    """3e19: finite, but its square is not in float32."""
    z1, z2 = views(40, 20, F32)
    z1[17, 3] = bad
    _, c, rho = fused_standardize(z1, z2, EPS, F32)
    assert rho[0, 3].isnan()
    assert c[3].isnan()
    assert c.isnan().sum() == 1


@pytest.mark.parametrize("split_at", [0, 1, 20, 50])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_the_stretches_of_a_shard(split_at, dtype):
    """`column_sums` and `standardize`, between which the processes exchange their sums; a shard may be empty."""
    n, d = 50, 37
    z1, z2 = views(n, d, dtype)
    compute = torch.promote_types(dtype, F32)
    pivot = torch.stack([z1[0], z2[0]]).to(compute)
    shards = [(z1[:split_at], z2[:split_at]), (z1[split_at:], z2[split_at:])]
    sums = [column_sums(*shard, pivot) for shard in shards]
    x = torch.stack([z1, z2]).double() - pivot.double().unsqueeze(1)
    for got, right in zip(map(sum, zip(*sums, strict=True)), (x.sum(1), x.square().sum(1)), strict=True):
        torch.testing.assert_close(
            got, right, rtol=20 * torch.finfo(compute).eps, atol=1e-5 if compute == F32 else 1e-13
        )

    u, c, rho = truth(z1, z2)
    shift = -(x.mean(1) * rho)
    parts = [standardize(*shard, pivot, rho.to(compute), shift.to(compute), compute) for shard in shards]
    assert [part.shape for part, _ in parts] == [(2, split_at, 48), (2, n - split_at, 48)]
    got = torch.cat([part for part, _ in parts], 1)
    torch.testing.assert_close(got[:, :, :d].double(), u, rtol=0, atol=8 * torch.finfo(compute).eps)
    assert (got[:, :, d:] == 0).all()
    torch.testing.assert_close(parts[0][1] + parts[1][1], c, rtol=0, atol=8 * torch.finfo(compute).eps)


def matrices(n, d, dtype):
    generator = torch.Generator().manual_seed(n + d)
    u = torch.randn(2, n, d, generator=generator, dtype=F64) / n**0.5
    p = torch.randn(2, n, d, generator=generator, dtype=F64)
    rho = 0.1 + torch.rand(2, d, generator=generator, dtype=F64)
    u = u.to(dtype)
    c = (u[0].double() * u[1].double()).sum(0)  # eager takes q and C_ii out of one sum
    return u, p.to(dtype), c, rho


def padded(matrix):
    """Filled up to multiples of 16 with zeros, as the backend's own buffers are."""
    rows, columns = (-size % 16 for size in matrix.shape[-2:])
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows))


def right_gradients(u, p, q, c, rho, a, b, includes_diagonal):
    """α P + β u_other − (α q + γ) u_own in float64, as in the head of _function.py."""
    u, p = u.double(), p.double()
    d = 2 * a * (c - 1) - (2 * b * c if includes_diagonal else 0)
    q = (u * p).sum(1) if q is None else q
    alpha, beta = 2 * b * rho, d * rho
    return [alpha[v] * p[v] + beta[v] * u[1 - v] - (alpha[v] * q[v] + beta[v] * c) * u[v] for v in (0, 1)]


@pytest.mark.parametrize(("n", "d"), [(3, 17), (33, 40), (150, 35)])
@pytest.mark.parametrize(("dtype", "out"), [(F64, F64), (F32, F32), (F16, F32), (F16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("has_q", [False, True])
@pytest.mark.parametrize("includes_diagonal", [False, True])
def test_input_gradients(n, d, dtype, out, has_q, includes_diagonal):
    u, p, c, rho = matrices(n, d, dtype)
    q = (torch.randn(2, d, dtype=F64, generator=torch.Generator().manual_seed(1))) if has_q else None
    compute = torch.promote_types(dtype, F32)
    grad_loss, grad_on, grad_off = (torch.tensor(value, dtype=compute) for value in (1.7, -0.3, 0.2))
    lambd = 0.0051
    right = right_gradients(u, p, q, c, rho, 1.7 - 0.3, lambd * 1.7 + 0.2, includes_diagonal)
    products = tuple((padded(p[v]), None, None if q is None else q[v]) for v in (0, 1))
    settings = GradOutputs(grad_loss, grad_on, grad_off, lambd), includes_diagonal, plan_of(compute, dtype), n, out
    got = triton.input_gradients(products, padded(u), c, rho, *settings)
    eager_products = tuple((p[v], None, None if q is None else q[v]) for v in (0, 1))
    rivals = eager.input_gradients(eager_products, u, c, rho, *settings)
    for own, rival, expected in zip(got, rivals, right, strict=True):
        assert error(rival, expected) <= 0.01 * float(expected.norm())
        assert own.shape == (n, d)
        assert own.dtype == out
        assert_no_worse(own, rival, expected, torch.promote_types(out, compute) if out == compute else out, "gradient")


INCOMING = [grad_outputs for grad_outputs in itertools.product([None, 0.7], repeat=3) if any(grad_outputs)]


@pytest.mark.parametrize("grad_outputs", INCOMING, ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_input_gradients_of_some_terms_and_views(grad_outputs, needed, tensor):
    """None stands for 0, and a view that needs no gradient gets none; λ as a number and as a tensor."""
    n, d, lambd = 20, 24, 0.3
    u, p, c, rho = matrices(n, d, F64)
    grad_loss, grad_on, grad_off = (value or 0.0 for value in grad_outputs)
    right = right_gradients(u, p, None, c, rho, grad_loss + grad_on, lambd * grad_loss + grad_off, True)
    given = (None if value is None else torch.tensor(value, dtype=F64) for value in grad_outputs)
    weight = torch.tensor(lambd, dtype=F64) if tensor else lambd
    products = tuple((padded(p[v]), None, None) if needed[v] else None for v in (0, 1))
    got = triton.input_gradients(
        products, padded(u), c, rho, GradOutputs(*given, weight), True, plan_of(F64, F64), n, F64
    )
    for v in (0, 1):
        if needed[v]:
            torch.testing.assert_close(got[v], right[v], rtol=1e-12, atol=1e-13)
        else:
            assert got[v] is None


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(0, 16), (5, 48), (150, 32)])
def test_column_dots(n, d, dtype):
    u, p, _, _ = (
        matrices(n, d, dtype) if n else (torch.empty(2, 0, d, dtype=dtype), *[torch.empty(2, 0, d, dtype=dtype)] * 3)
    )
    got = column_dots(u[0], p[0])
    right = (u[0].double() * p[0].double()).sum(0)
    compute = torch.promote_types(dtype, F32)
    torch.testing.assert_close(got, right, rtol=0, atol=8 * torch.finfo(compute).eps)


@pytest.mark.parametrize("order", ["reverse", 1, 2])
def test_the_order_of_the_programs_changes_nothing(order):
    z1, z2 = views(70, 90, F32)
    u, p, c, rho = matrices(70, 90, F32)
    grad_outputs = GradOutputs(torch.tensor(1.5), None, None, 0.1)

    def run():
        products = tuple((padded(p[v]), None, None) for v in (0, 1))
        return *fused_standardize(z1, z2, EPS, F32), *triton.input_gradients(
            products, padded(u), c, rho, grad_outputs, True, plan_of(F32, F32), 70, F32
        )

    expected = run()
    with program_order(order):
        for got, right in zip(run(), expected, strict=True):
            assert torch.equal(got, right)


def test_wide_features_take_wide_tiles():
    """D from 4096 on: tiles of 32 features, a ragged last one."""
    assert column_tile(4096, F32).block_d != column_tile(4095, F32).block_d
    z1, z2 = views(40, 4100, F32)
    got = fused_standardize(z1, z2, EPS, F32)
    for own, right in zip((got[0][:, :40, :4100], *got[1:]), truth(z1, z2), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-5, atol=1e-6)
    u, p, c, rho = matrices(40, 4100, F32)
    products = tuple((padded(p[v]), None, None) for v in (0, 1))
    got = triton.input_gradients(
        products, padded(u), c, rho, GradOutputs(torch.ones(()), None, None, 0.1), True, plan_of(F32, F32), 40, F32
    )
    for own, right in zip(got, right_gradients(u, p, None, c, rho, 1.0, 0.1, True), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-5)


def reserved(elements, dtype):
    """Memory that is hardly touched, and so hardly there."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(elements, dtype=dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


class TestBeyondTwoToThe31:
    """Offsets of more than 2³¹ elements."""

    def test_of_views(self):
        n, d = 3, 20
        row = 2**30 + 8
        z1, z2 = views(n, d, BF16)
        far = reserved(2 * row + d, BF16).as_strided((n, d), (row, 1))
        far.copy_(z1)
        for got, right in zip(fused_standardize(far, z2, EPS, F32), fused_standardize(z1, z2, EPS, F32), strict=True):
            assert torch.equal(got, right)

    def test_of_columns(self):
        n, d = 3, 17
        column = 2**27 + 1
        z1, z2 = views(n, d, BF16)
        far = reserved(16 * column + n, BF16).as_strided((n, d), (1, column))
        far.copy_(z1)
        for got, right in zip(fused_standardize(far, z2, EPS, F32), fused_standardize(z1, z2, EPS, F32), strict=True):
            assert torch.equal(got, right)

    def test_of_the_second_view_of_u(self):
        n, d = 4, 16
        u, p, c, rho = matrices(n, d, F16)
        rows = 2**27 + 16
        far = reserved(2 * rows * d, F16).view(2, rows, d)
        far[:, :n] = u
        products = tuple((p[v], None, None) for v in (0, 1))
        settings = c, rho, GradOutputs(torch.ones(()), None, None, 0.1), True, plan_of(F32, F16), n, F32
        for got, right in zip(
            triton.input_gradients(products, far, *settings),
            triton.input_gradients(products, u, *settings),
            strict=True,
        ):
            assert torch.equal(got, right)
