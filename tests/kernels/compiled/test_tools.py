"""The tools of this folder: the pretended GPU, the reports on machine code, and the table of their figures."""

# ruff: noqa: N803  the constants of a kernel are in capitals

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from chips import CHIPS, Report, compiled
from fake_driver import PretendedGpu, pretended
from figures_table import Figures, Row, Table, changes
from triton.runtime.errors import OutOfResources


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr, SUBTRACT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    tl.store(out + i, a - b if SUBTRACT else a + b, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, weight, n, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) * factor
    if weight is not None:
        value *= tl.load(weight)
    tl.store(x + i, value, mask=i < n)


@triton.jit
def gram_kernel(x, out, n, stride, N: tl.constexpr, K: tl.constexpr):
    rows, depth = tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((N, N), tl.float32)
    for start in tl.range(0, n, K):
        block = tl.load(x + rows.to(tl.int64)[:, None] * stride + start + depth[None, :])
        total = tl.dot(block, tl.trans(block), total)
    tl.store(out + rows[:, None] * N + rows[None, :], total)


@triton.jit
def greedy_kernel(x, out, n, BLOCK: tl.constexpr):
    """Holds BLOCK numbers in the registers of one warp, from one end of the loop to the other."""
    i = tl.arange(0, BLOCK)
    total = tl.load(x + i)
    for start in tl.range(1, n):
        total = total * tl.load(x + start * BLOCK + i) + total
    tl.store(out + i, total)


ADD = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "n": "i32"}
GRAM = {"x": "*bf16", "out": "*fp32", "n": "i32", "stride": "i64"}


def add(x: torch.Tensor, y: torch.Tensor, *, block: int = 128, subtract: bool = False) -> None:
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, torch.empty_like(x), x.numel(), block, subtract, num_warps=2)


class TestReports:
    @pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
    def test_wide_accesses_where_all_is_aligned(self, chip: str) -> None:
        report = compiled(add_kernel, CHIPS[chip], ADD, {"BLOCK": 2048, "SUBTRACT": False}, num_warps=2)
        assert report.faults() == []
        assert report.faults(tensor_cores=True) == ["no tensor-core instruction"]
        assert report.registers > 0
        assert report.loads[128] >= 2
        assert report.stores[128] >= 1
        assert report.loads[16] == report.stores[16] == 0

    @pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
    def test_narrow_accesses_where_something_is_not(self, chip: str) -> None:
        constants = {"BLOCK": 2048, "SUBTRACT": False}
        ragged = compiled(add_kernel, CHIPS[chip], ADD, constants, aligned=False)
        assert ragged.loads[128] == 0
        shifted = compiled(add_kernel, CHIPS[chip], ADD, constants, unaligned={"x"})
        assert shifted.loads[16] > 0
        assert shifted.loads[128] > 0
        assert shifted.stores[128] > 0

    @pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
    def test_a_dot_has_tensor_cores(self, chip: str) -> None:
        report = compiled(gram_kernel, CHIPS[chip], GRAM, {"N": 64, "K": 64}, num_warps=4, num_stages=2)
        assert report.faults(tensor_cores=True) == []
        assert report.tensor_cores > 0

    def test_too_much_shared_memory_is_reported(self) -> None:
        constants = {"N": 128, "K": 256}
        report = compiled(gram_kernel, CHIPS["sm_90"], GRAM, constants, num_warps=8, num_stages=5)
        assert report.faults(tensor_cores=True) == [f"{report.shared} bytes of shared memory of 232448"]

    @pytest.mark.parametrize(("chip", "block"), [("sm_90", 8192), ("gfx942", 32768)])
    def test_spills_are_reported(self, chip: str, block: int) -> None:
        signature = {"x": "*fp32", "out": "*fp32", "n": "i32"}
        report = compiled(greedy_kernel, CHIPS[chip], signature, {"BLOCK": block}, num_warps=1)
        assert report.faults()[0] == f"{report.spills} spills"
        assert report.faults(spills=report.spills) == []

    def test_absent_pointers_and_float64_scalars(self) -> None:
        signature = {"x": "*fp64", "n": "i32", "factor": "fp64"}
        report = compiled(scale_kernel, CHIPS["sm_90"], signature, {"weight": None, "BLOCK": 128})
        assert report.faults() == []

    def test_one_compilation_is_made_once(self) -> None:
        arguments = add_kernel, CHIPS["sm_90"], ADD, {"BLOCK": 2048, "SUBTRACT": False}
        assert compiled(*arguments, num_warps=2) is compiled(*arguments, num_warps=2)

    def test_every_argument_is_named_once(self) -> None:
        with pytest.raises(ValueError, match="SUBTRACT"):
            compiled(add_kernel, CHIPS["sm_90"], ADD, {"BLOCK": 2048})


class TestPretendedGpu:
    def test_launches_and_specialisations_are_counted(self, pretended_h100: PretendedGpu) -> None:
        x, y = torch.zeros(2, 1024, dtype=torch.bfloat16)
        for n in (1024, 512, 100, 99):  # the first two are multiples of 16, the last two are not
            add(x[:n], y[:n])
        assert [launch.grid for launch in pretended_h100.launches] == [(8, 1, 1), (4, 1, 1), (1, 1, 1), (1, 1, 1)]
        assert len(pretended_h100.compilations) == len(set(pretended_h100.compilations)) == 2
        add(x[1:], y)  # not at 16 bytes
        add(x, y, subtract=True)
        add(x.float(), y.float())
        assert len(pretended_h100.compilations) == len(set(pretended_h100.compilations)) == 5
        assert {launch.specialization for launch in pretended_h100.launches} == set(pretended_h100.compilations)
        assert pretended_h100.count("add_kernel") == 7

    def test_what_a_launch_says(self, pretended_h100: PretendedGpu) -> None:
        x = torch.zeros(64)
        scale_kernel[2, 3](x, None, 64, 0.5, BLOCK=64, num_warps=8, num_stages=2, enable_fp_fusion=False)
        scale_kernel[2, 3](x, x, 65, 0.5, BLOCK=64)
        first, second = pretended_h100.launches
        assert first[:5] == ("scale_kernel", (2, 3, 1), 8, 2, 0)
        assert first.arguments == {"x": x, "weight": None, "n": 64, "factor": 0.5, "BLOCK": 64}
        expected = ("x:*fp32 tt.divisibility=16", "weight=None", "n:i32", "factor:fp32", "BLOCK=64")
        assert first.specialization.arguments == expected
        assert dict(first.specialization.options)["enable_fp_fusion"] is False
        assert second.specialization.arguments[1:3] == ("weight:*fp32 tt.divisibility=16", "n:i32")

    @pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
    def test_compiles_in_earnest(self, chip: str) -> None:
        x = torch.zeros(128, 512, dtype=torch.bfloat16)
        with pretended(CHIPS[chip], compiled=True) as gpu:
            gram_kernel[(1,)](x[:64], torch.empty(64, 64), 512, x.stride(0), 64, 64, num_stages=2)
        assert gpu.launches[0].shared > 0
        assert gpu.launches[0].specialization == gpu.compilations[0]

    def test_refuses_what_does_not_fit(self) -> None:
        x = torch.zeros(128, 512, dtype=torch.bfloat16)
        options = {"num_warps": 8, "num_stages": 5}
        with pretended(CHIPS["sm_90"], compiled=True), pytest.raises(OutOfResources, match="shared memory"):
            gram_kernel[(1,)](x, torch.empty(128, 128), 512, x.stride(0), 128, 256, **options)

    def test_leaves_the_driver_as_it_was(self) -> None:
        driver, compile_kernel = triton.runtime.driver._active, triton.compiler.compile
        caches = dict(add_kernel.device_caches)
        with pretended(CHIPS["sm_80"]), contextlib.suppress(ZeroDivisionError):
            add(torch.zeros(8), torch.zeros(8))
            assert add_kernel.device_caches != caches
            _ = 1 / 0
        assert triton.runtime.driver._active is driver
        assert triton.compiler.compile is add_kernel.compile is compile_kernel
        assert add_kernel.device_caches == caches

    def test_one_chip_after_the_other(self) -> None:
        for name in ("sm_90", "gfx942", "sm_90"):
            with pretended(CHIPS[name]) as gpu:
                add(torch.zeros(8), torch.zeros(8))
            assert len(gpu.compilations) == 1

    def test_an_unknown_triton_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "__version__", "9.9.0")
        with pytest.raises(RuntimeError, match=r"this is 9\.9\.0"):
            pretended(CHIPS["sm_90"]).__enter__()


class TestTable:
    def table(self, **figures: tuple[int, int, int]) -> Table:
        rows = {Row(kernel, "aligned", "sm_90"): Figures(*numbers) for kernel, numbers in figures.items()}
        return Table(triton.__version__, rows)

    def test_comes_back_from_its_text(self) -> None:
        report = Report("sm_90", 40, 0, 1024, 0, 8, False, {}, {})
        table = Table.of({("fused_standardize", "bf16, ragged"): [report, report._replace(chip="sm_80")]})
        assert Table.read(table.written()) == table
        assert "| fused_standardize | bf16, ragged | sm_90 | 40 | 1024 | 0 |\n" in table.written()

    @pytest.mark.parametrize(
        ("now", "regression"),
        [((44, 512, 0), False), ((45, 512, 0), True), ((30, 0, 0), False), ((40, 513, 0), True), ((40, 512, 4), True)],
    )
    def test_says_what_changed(self, now: tuple[int, int, int], regression: bool) -> None:
        found = changes(
            self.table(fused_standardize=(40, 512, 0), same=(1, 1, 1)),
            self.table(fused_standardize=now, same=(1, 1, 1)),
        )
        line = (
            "fused_standardize aligned sm_90: 40 registers, 512 bytes shared, 0 spills →"
            f" {now[0]} registers, {now[1]} bytes shared, {now[2]} spills"
        )
        assert found == (([line], []) if regression else ([], [line]))

    def test_says_what_came_and_went(self) -> None:
        found = changes(self.table(old=(1, 2, 0)), self.table(new=(1, 2, 0)))
        assert found.regressions == []
        assert [line.split(":")[0] for line in found.others] == ["new aligned sm_90", "old aligned sm_90"]

    def test_holds_for_one_version(self) -> None:
        assert self.table().reason_to_skip() is None
        assert "triton 0.1" in str(self.table()._replace(version="0.1").reason_to_skip())
