"""The repairs of triton's interpreter, each with a kernel that shows the fault."""

# ruff: noqa: N803  the constants of a kernel are in capitals

from unittest import mock

import numpy as np
import pytest
import repaired_interpreter
import torch
import triton
import triton.language as tl
from launch_memory import LaunchMemory, OutOfBounds, Race
from repaired_interpreter import Launch, poisoned, program_order, recorded_launches, repaired
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

# Halfway between two bfloat16 numbers (→ even, down and up), just above halfway, a carry into the exponent, the largest
# float32 (→ ∞), the smallest subnormal, and what is no number.
ROUNDING = [
    1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, 2 - 2**-10, 3.4e38, 1e-45, -1 - 2**-8, 0.0, -0.0,
    float("inf"), float("-inf"), float("nan"), 0.1, 1e-40, 65504.0, -3.4028235e38,
]  # fmt: skip


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + n + i, a * b)
    tl.store(out + 2 * n + i, -a)
    tl.store(out + 3 * n + i, tl.where(a < b, a, 0.5))
    tl.store(out + 4 * n + i, a * 0.1)
    tl.store(out + 5 * n + i, tl.fma(a, b, a))
    tl.store(out + 6 * n + i, tl.maximum(a, b))
    tl.store(out + 7 * n + i, tl.clamp(a, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def sum_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(out + columns, tl.sum(block, 0))
    tl.store(out + COLUMNS + rows, tl.sum(block, 1))
    tl.store(out + COLUMNS + ROWS, tl.sum(block))


@triton.jit
def gram_kernel(x, out, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    block = tl.load(x + rows[:, None] * D + columns[None, :])
    gram = tl.dot(block, tl.trans(block), tl.zeros((N, N), tl.float32), input_precision=PRECISION)
    tl.store(out + rows[:, None] * N + rows[None, :], gram)


@triton.jit
def mean_loop_kernel(x, out, weights, scale, n, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, n, BLOCK):
        i = start.to(tl.int64) + tl.arange(0, BLOCK)
        values = tl.load(x + i, mask=i < n, other=0.0).to(tl.float64)
        if WEIGHTED:
            values *= tl.load(weights + i, mask=i < n, other=0.0)
        total += values
    tl.store(out, tl.sqrt(tl.sum(total, 0)) * scale.to(tl.float64))


@triton.jit
def _shifted(pointer, by):
    return pointer + by


@triton.jit
def offset_kernel(x, y, load_by, store_by, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(_shifted(y, store_by) + i, tl.load(_shifted(x, load_by) + i))


@triton.jit
def winding_pointer_kernel(x, y, offset):
    """Loads x + offset by way of every operation that a pointer may go through."""
    rows, columns = tl.arange(0, 4), tl.arange(0, 4)
    pointers = tl.broadcast_to((x + rows * 4)[:, None], (4, 4)) + columns[None, :] + offset
    pointers = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(y + rows[:, None] * 4 + columns[None, :], tl.load(pointers).to(tl.float32, bitcast=True))


@triton.jit
def race_kernel(x, load_stride, store_stride, LOAD: tl.constexpr, STORE: tl.constexpr):
    p = tl.program_id(0)
    value = p * 1.0
    if LOAD:
        value += tl.load(x + p * load_stride)
    if STORE:
        tl.store(x + p * store_stride, value)


@triton.jit
def broadcast_store_kernel(x, scale):
    i = tl.arange(0, 8)
    tl.store(x + i // 2, i * scale)


@triton.jit
def first_to_last_kernel(turns, x):
    p = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(x + p, p * 1.0)
    tl.device_print("turn", p)


@triton.jit
def last_row_kernel(x, out, rows, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = rows - 1
    if WIDE:
        row = row.to(tl.int64)
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + row * stride + i))


@triton.jit
def half_written_kernel(y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit(do_not_specialize=["n"])
def scalar_kernel(out, n, eps, flag, precise: tl.float64, count: tl.int64):
    tl.store(out, eps)
    tl.store(out + 1, precise)
    tl.store(out + 2, count * n)
    tl.store(out + 3, tl.where(flag, 1.0, 0.0))


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x + tl.arange(0, 8), 1.0)


class TestBfloat16:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_casts_round_to_nearest_even(self, dtype: torch.dtype) -> None:
        x = torch.tensor(ROUNDING, dtype=torch.float64).to(dtype)
        y = torch.empty(len(x), dtype=torch.bfloat16)
        copy_kernel[(1,)](x, y, len(x), BLOCK=16)
        torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_no_nan_rounds_to_a_number(self) -> None:
        x = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
        y = torch.empty(2, dtype=torch.bfloat16)
        copy_kernel[(1,)](x, y, 2, BLOCK=2)
        assert y.isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
    def test_widens_exactly(self, dtype: torch.dtype) -> None:
        x = torch.arange(-8, 8).mul(0.75).bfloat16()
        y = torch.empty(len(x), dtype=dtype)
        copy_kernel[(1,)](x, y, len(x), BLOCK=16)
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0)

    def test_arithmetic_rounds_once(self) -> None:
        x, y = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        out = torch.empty(8, 32, dtype=torch.bfloat16)
        arithmetic_kernel[(1,)](x, y, out, 32, BLOCK=32)
        scaled = x * torch.tensor(0.1, dtype=torch.bfloat16)
        fused = (x.double() * y.double() + x.double()).bfloat16()
        chosen = torch.where(x < y, x, 0.5), torch.maximum(x, y), x.clamp(-0.5, 0.5)
        expected = torch.stack([x + y, x * y, -x, chosen[0], scaled, fused, *chosen[1:]])
        torch.testing.assert_close(out, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_sums_over_both_axes_and_all(self, dtype: torch.dtype) -> None:
        x = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = torch.empty(49, dtype=dtype)
        sum_kernel[(1,)](x, out, ROWS=16, COLUMNS=32)
        exact = x.double()
        expected = torch.cat([exact.sum(0), exact.sum(1), exact.sum().reshape(1)])
        # Nine halvings of 512 elements, half a unit in the last place each.
        torch.testing.assert_close(out.double(), expected, rtol=9 * torch.finfo(dtype).eps / 2 + 1e-15, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_sum_in_16_bits_loses_what_one_in_float32_keeps(self, dtype: torch.dtype) -> None:
        large = 2 / torch.finfo(dtype).eps  # large + 1 is halfway to the next number
        x = torch.zeros(1, 16, dtype=dtype)
        x[0, 0], x[0, [1, 2, 4, 8]] = large, 1  # those that meet element 0, one after the other
        out = torch.empty(18, dtype=dtype)
        sum_kernel[(1,)](x, out, ROWS=1, COLUMNS=16)
        assert (out[16].item(), x.float().sum().item()) == (large, large + 4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dot_against_float64(self, dtype: torch.dtype) -> None:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = torch.empty(16, 16)
        gram_kernel[(1,)](x, out, N=16, D=64, PRECISION="tf32")  # no TF32 with 16-bit operands
        torch.testing.assert_close(out.double(), x.double() @ x.double().T, rtol=1e-5, atol=1e-5)


class TestFloat32:
    def test_tf32_truncates_the_operands(self) -> None:
        x = torch.full((16, 16), 1 + 2**-10 + 2**-11)  # the last bit kept, the first bit dropped
        out = torch.empty(2, 16, 16)
        gram_kernel[(1,)](x, out[0], N=16, D=16, PRECISION="tf32")
        gram_kernel[(1,)](x, out[1], N=16, D=16, PRECISION="ieee")
        assert (out[0] == 16 * (1 + 2**-10) ** 2).all()
        torch.testing.assert_close(out[1].double(), x.double() @ x.double().T, rtol=1e-6, atol=0)

    def test_scalars_arrive_in_the_launchers_types(self) -> None:
        out = torch.empty(4, dtype=torch.float64)
        options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
        scalar_kernel[(1,)](out, 2**20, 0.1, True, precise=0.1, count=2**20, **options)
        assert out.tolist() == [torch.tensor(0.1).item(), 0.1, 2.0**40, 1.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_float64_loops_and_absent_pointers(weighted: bool) -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1)) if weighted else None
    out = torch.empty((), dtype=torch.float64)
    mean_loop_kernel[(1,)](x, out, weights, 2.0, 50, BLOCK=16, WEIGHTED=weighted)
    summed = x.double() * weights.double() if weighted else x.double()
    torch.testing.assert_close(out, 2 * summed.sum().sqrt(), rtol=1e-14, atol=0)


class TestBounds:
    def test_all_is_well_inside(self) -> None:
        x = torch.arange(32.0)
        y = torch.empty(32)
        offset_kernel[(1,)](x[16:], y, 0, 16, BLOCK=16)
        assert torch.equal(y[16:], x[16:])

    @pytest.mark.parametrize(("load_by", "lanes"), [(1, 1), (5, 5), (16, 16), (-3, 3), (2**31 - 20, 16)])
    def test_loads(self, load_by: int, lanes: int) -> None:
        x, y = torch.zeros(16), torch.empty(16)
        with pytest.raises(IndexError, match=f"offset_kernel: program 0 loads out of bounds in {lanes} of 16 lanes"):
            offset_kernel[(1,)](x, y, load_by, 0, BLOCK=16)

    def test_stores(self) -> None:
        x, y = torch.zeros(16), torch.empty(16)
        with pytest.raises(OutOfBounds, match=r"stores out of bounds in 2 of 16 lanes, the first at byte 64 of .* 64 "):
            offset_kernel[(1,)](x, y, 0, 2, BLOCK=16)

    def test_the_neighbour_is_out_of_bounds_too(self) -> None:
        """An address that runs from one tensor of the launch into another is an error, though memory is there."""
        x, y = torch.zeros(16), torch.empty(16)
        with pytest.raises(OutOfBounds, match="in 16 of 16 lanes"):
            offset_kernel[(1,)](x, y, (y.data_ptr() - x.data_ptr()) // 4, 0, BLOCK=16)

    def test_a_pointer_keeps_its_tensor_through_every_operation(self) -> None:
        x, y = torch.arange(16.0), torch.empty(16)
        winding_pointer_kernel[(1,)](x, y, 0)
        assert torch.equal(x, y)
        with pytest.raises(OutOfBounds, match="in 16 of 16 lanes, the first at byte"):
            winding_pointer_kernel[(1,)](x, y, (y.data_ptr() - x.data_ptr()) // 4)

    def test_the_full_width_counts(self) -> None:
        storage = torch.zeros(30, dtype=torch.int8)
        y = torch.empty(8)
        with pytest.raises(OutOfBounds, match="in 1 of 8 lanes, the first at byte 28 of a storage of 30"):
            offset_kernel[(1,)](torch.tensor([]).set_(storage.untyped_storage(), 0, (7,), (1,)), y, 0, 0, BLOCK=8)

    def test_masked_lanes_do_not_count(self) -> None:
        x, y = torch.zeros(10), torch.empty(10)
        copy_kernel[(2,)](x, y, 10, BLOCK=8)
        assert torch.equal(x, y)


class TestHugeStorages:
    @pytest.fixture
    def huge(self) -> torch.Tensor:
        """Two rows 2³¹ elements apart; the system gives the memory between them to nobody."""
        x = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))
        x[1] = torch.arange(64)
        return x

    def test_int64_offsets_arrive(self, huge: torch.Tensor) -> None:
        out = torch.empty(64)
        last_row_kernel[(1,)](huge, out, 2, huge.stride(0), BLOCK=64, WIDE=True)
        assert torch.equal(out, torch.arange(64.0))

    def test_int32_offsets_wrap_around(self) -> None:
        x = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 64), (2**30, 1))
        with pytest.raises(OutOfBounds, match=r"loads out of bounds in 64 of 64 lanes, the first at byte -"):
            last_row_kernel[(1,)](x, torch.empty(64), 3, x.stride(0), BLOCK=64, WIDE=False)

    def test_races_are_seen_there_too(self, huge: torch.Tensor) -> None:
        with pytest.raises(Race):
            race_kernel[(2,)](huge[1], 0, 0, LOAD=False, STORE=True)


class TestRaces:
    def test_programs_apart_do_not_race(self) -> None:
        x = torch.zeros(4)
        race_kernel[(4,)](x, 1, 1, LOAD=True, STORE=True)
        assert x.tolist() == [0, 1, 2, 3]

    def test_programs_may_load_alike(self) -> None:
        race_kernel[(4,)](torch.zeros(4), 0, 0, LOAD=True, STORE=False)

    def test_store_store(self) -> None:
        with pytest.raises(Race, match="race_kernel: program 1 stores what program 0 stored"):
            race_kernel[(4,)](torch.zeros(4), 0, 0, LOAD=False, STORE=True)

    def test_a_load_after_another_programs_store(self) -> None:
        """Program p loads element 0, program 0 has stored it."""
        with pytest.raises(Race, match="program 1 loads what program 0 stored"):
            race_kernel[(4,)](torch.zeros(4), 0, 1, LOAD=True, STORE=True)

    def test_a_store_after_another_programs_load(self) -> None:
        """Program p loads element 2p and stores element p."""
        with pytest.raises(Race, match="program 2 stores what program 1 loaded"):
            race_kernel[(4,)](torch.zeros(8), 2, 1, LOAD=True, STORE=True)

    def test_a_store_after_many_loads(self) -> None:
        with (
            program_order("reverse"),
            pytest.raises(Race, match="program 0 stores what more than one other program loaded"),
        ):
            race_kernel[(4,)](torch.zeros(16), 0, 5, LOAD=True, STORE=True)

    def test_the_record_ends_with_the_launch(self) -> None:
        x = torch.zeros(1)
        for _ in range(2):
            race_kernel[(1,)](x, 0, 0, LOAD=True, STORE=True)

    @pytest.mark.parametrize("wide_first", [True, False])
    def test_views_of_one_storage_share_a_record(self, wide_first: bool) -> None:
        """Program 0 stores the second half of a float32 that program 1 loads."""
        x = torch.zeros(4)
        views = [x, x.view(torch.bfloat16)]
        memory = LaunchMemory("kernel", views if wide_first else views[::-1])
        memory.access(np.array([x.data_ptr() + 2], np.uint64), 2, program=1, store=True, home=None)
        memory.access(np.array([x.data_ptr() + 4], np.uint64), 4, program=2, store=False, home=None)
        with pytest.raises(Race, match="program 1 loads what program 0 stored"):
            memory.access(np.array([x.data_ptr()], np.uint64), 4, program=2, store=False, home=None)

    def test_lanes_of_one_store_agree(self) -> None:
        x = torch.zeros(4)
        broadcast_store_kernel[(1,)](x, 0)
        with pytest.raises(Race, match="4 lanes of a store lose"):
            broadcast_store_kernel[(1,)](x, 1)


class TestProgramOrder:
    def turns(self, capsys: pytest.CaptureFixture[str]) -> list[str]:
        x = torch.empty(12)
        first_to_last_kernel[(2, 3, 2)](None, x)
        assert x.tolist() == list(range(12))
        return [line.split(" turn")[0] for line in capsys.readouterr().out.splitlines()]

    def test_reverse_and_random(self, capsys: pytest.CaptureFixture[str]) -> None:
        forward = self.turns(capsys)
        with program_order("reverse"):
            assert self.turns(capsys) == forward[::-1]
        with program_order(0):
            shuffled = self.turns(capsys)
        assert shuffled != forward
        assert sorted(shuffled) == sorted(forward)
        assert self.turns(capsys) == forward


def test_launches_are_recorded() -> None:
    x, y = torch.zeros(16), torch.empty(16)
    with recorded_launches() as launches:
        copy_kernel[(2,)](x, y, 16, BLOCK=8, num_warps=8)
        offset_kernel[(1,)](x, y, 0, 0, BLOCK=16)
    copy_kernel[(2,)](x, y, 16, BLOCK=8)
    assert launches == [Launch("copy_kernel", (2, 1, 1), {"num_warps": 8}), Launch("offset_kernel", (1, 1, 1), {})]


class TestPoison:
    @pytest.mark.parametrize("make", ["empty", "empty_strided", "empty_like", "new_empty"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_an_element_that_no_program_writes_shows(self, make: str, dtype: torch.dtype) -> None:
        with poisoned():
            y = {
                "empty": lambda: torch.empty(8, dtype=dtype),
                "empty_strided": lambda: torch.empty_strided((8,), (1,), dtype=dtype),
                "empty_like": lambda: torch.empty_like(torch.zeros(8, dtype=dtype)),
                "new_empty": lambda: torch.zeros(8, dtype=dtype).new_empty(8),
            }[make]()
        half_written_kernel[(1,)](y, BLOCK=4)
        assert torch.isnan(y).tolist() == [False] * 4 + [True] * 4

    def test_the_settings_are_as_before(self) -> None:
        with poisoned():
            assert torch.are_deterministic_algorithms_enabled()
        assert not torch.are_deterministic_algorithms_enabled()


class TestRepaired:
    def test_atomics_are_refused(self) -> None:
        with pytest.raises(InterpreterError, match="checks no atomics"):
            atomic_kernel[(1,)](torch.zeros(8))

    def test_an_unknown_triton_is_noticed(self) -> None:
        with mock.patch.object(triton, "__version__", "9.9.0"), pytest.raises(RuntimeError, match=r"this is 9\.9\.0"):
            repaired().__enter__()

    def test_nothing_is_left_behind(self) -> None:
        """Nested in the session's own repair, which is what it must come back to."""
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in repaired_interpreter._replacements()]
        with repaired():
            pass
        assert all(getattr(owner, name) is value for owner, name, value in before)
        assert interpreter.interpreter_builder.__class__ is repaired_interpreter._FaithfulBuilder
