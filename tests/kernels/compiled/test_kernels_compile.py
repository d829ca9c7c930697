"""Every kernel, aligned and ragged, compiled for six chips: it fits, does not spill, and uses the tensor cores.

The registers and the shared memory of each stand in figures.md. `python tests/kernels/compiled/test_kernels_compile.py`
writes them anew.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from chips import CHIPS, Chip, Report, compiled
from figures_table import Table, changes

from barlow_loss._backends.triton import _frobenius, _input_gradients, _loss_terms, _standardize
from barlow_loss._backends.triton._launch import TL_DTYPES, column_tile, compute_dtype

FIGURES = Path(__file__).parent / "figures.md"
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TYPES = {F64: "fp64", F32: "fp32", F16: "fp16", BF16: "bf16"}
OF_VIEWS = ("z1", "z2", "dz1", "dz2")
OF_PRODUCTS = ("u", "p1", "p2", "a", "b", "k1", "k2")
OF_COMPUTE = ("pivot", "scale", "shift", "parts", "loss", "on_diagonal", "off_diagonal", "grad_loss")
OF_FLOAT64 = ("c", "rho", "s1", "s2", "q", "q1", "q2")
ABSENT = {"grad_on": None, "grad_off": None, "weight": None}


class Case(NamedTuple):
    """A kernel as it is launched for views of dtype z whose products are of dtype u."""

    kernel: Any
    z: torch.dtype
    u: torch.dtype
    aligned: bool
    constants: dict[str, Any]
    warps: int
    note: str = ""

    @property
    def label(self) -> str:
        kind = "aligned" if self.aligned else "ragged"
        return ", ".join(filter(None, [f"{TYPES[self.z]}, products {TYPES[self.u]}", self.note, kind]))

    @property
    def signature(self) -> dict[str, str]:
        compute = TYPES[compute_dtype(self.z)]
        types = dict.fromkeys(self.kernel.arg_names, "i32") | {"eps": "fp64", "lambd": "fp64", "target": "fp64"}
        for names, kind in (
            (OF_VIEWS, TYPES[self.z]),
            (OF_PRODUCTS, TYPES[self.u]),
            (OF_COMPUTE, compute),
            (OF_FLOAT64, "fp64"),
        ):
            types |= dict.fromkeys(names, f"*{kind}")
        return {name: types[name] for name in self.kernel.arg_names if name not in self.constants}

    def on(self, chip: Chip, **options: Any) -> Report:
        options = {"num_warps": self.warps} | options
        return compiled(self.kernel, chip, self.signature, self.constants, aligned=self.aligned, **options)


def _column_case(
    kernel: Any, z: torch.dtype, u: torch.dtype, d: int, aligned: bool, note: str = "", **constants: Any
) -> Case:
    tile = column_tile(d, z if "z1" in kernel.arg_names else u)
    constants |= {"BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d, "COMPUTE": TL_DTYPES[compute_dtype(z)]}
    return Case(kernel, z, u, aligned, constants, tile.warps, ", ".join(filter(None, [f"D = {d}", note])))


def _cases() -> list[Case]:
    found = []
    dual = {**ABSENT, "q1": None, "q2": None, "INCLUDES_DIAGONAL": True, "HAS_Q": False}
    primal = {**ABSENT, "INCLUDES_DIAGONAL": False, "HAS_Q": True}
    for z, u, d in ((BF16, F16, 8192), (F32, F16, 8192), (F32, F32, 8192), (F64, F64, 8192), (BF16, F16, 2048)):
        for aligned in (True, False) if d == 8192 else (True,):
            found.append(_column_case(_standardize.fused_standardize_kernel, z, u, d, aligned))
            found.append(_column_case(_input_gradients.input_gradients_kernel, z, u, d, aligned, **dual))
    for aligned in (True, False):
        found.append(_column_case(_standardize.column_sums_kernel, BF16, F16, 8192, aligned))
        found.append(_column_case(_standardize.standardize_kernel, BF16, F16, 8192, aligned))
        found.append(_column_case(_input_gradients.column_dots_kernel, BF16, F16, 8192, aligned))
        found.append(
            _column_case(_input_gradients.input_gradients_kernel, BF16, F16, 8192, aligned, "q given", **primal)
        )
        for u in (F16, F32, F64):
            block = {"BLOCK": _frobenius._BLOCK, "COMPUTE": TL_DTYPES[compute_dtype(u)]}
            found.append(Case(_frobenius.frobenius_kernel, u, u, aligned, block, 8))
        for z in (F32, F64):
            terms = {"BLOCK": _loss_terms._BLOCK, "COMPUTE": TL_DTYPES[z], "INCLUDES_DIAGONAL": True, "weight": None}
            terms |= {"WEIGHTS": (1.0,), "PAIRS": 1}
            found.append(Case(_loss_terms.loss_terms_kernel, z, z, aligned, terms, 4))
    return found


CASES = _cases()


def _options(case: Case) -> dict[str, Any]:
    return {"enable_fp_fusion": False} if case.kernel is _loss_terms.loss_terms_kernel else {}


def _faults(label: tuple[str, str], report: Report) -> list[str]:
    """A ragged case, whose loads are narrow, may spill: 8 bytes at most by triton 3.8, 268 by 3.6 (sm_80)."""
    return report.faults(spills=300 if label[1].endswith("ragged") else 0)


def _reports(chip: Chip) -> dict[tuple[str, str], Report]:
    reports = {(case.kernel.__name__, case.label): case.on(chip, **_options(case)) for case in CASES}
    assert len(reports) == len(CASES), "two cases have one label"
    return reports


def _chips(prefix: str = "") -> list[Any]:
    """All, or those whose names begin so; but for one, which stands for them, they are left to make test-all."""
    marks = {name: () if name == "sm_90" else pytest.mark.slow for name in CHIPS if name.startswith(prefix)}
    return [pytest.param(CHIPS[name], id=name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("chip", _chips())
def test_compiles_fits_and_does_not_spill(chip):
    reports = _reports(chip)
    faults = {label: _faults(label, report) for label, report in reports.items()}
    assert not {label: found for label, found in faults.items() if found}

    committed = Table.read(FIGURES.read_text(encoding="utf-8"))
    if reason := committed.reason_to_skip():
        pytest.skip(reason)
    rows = {row: figures for row, figures in committed.rows.items() if row.chip == chip.name}
    found = changes(committed._replace(rows=rows), Table.of({label: [report] for label, report in reports.items()}))
    assert not found.regressions
    assert not found.others, "not worse, but other figures: write the table anew, see the head of this file"


@pytest.mark.parametrize("chip", _chips("sm_"))
def test_aligned_matrices_move_by_16_bytes(chip):
    """A thread loads and stores 128 bits at once wherever features are 16 bits or 32 and all is aligned."""
    for case in CASES:
        if case.aligned and case.z != F64 and case.kernel is not _loss_terms.loss_terms_kernel:
            report = case.on(chip, **_options(case))
            assert report.loads[128] > 0, case.label
            assert report.loads[16] == 0, case.label
            assert report.stores[16] == 0, case.label
            if case.kernel in (_standardize.fused_standardize_kernel, _input_gradients.input_gradients_kernel):
                assert report.stores[128] + report.stores[64] > 0, case.label  # triton 3.6 stores 64 on sm_120


def _write() -> None:
    reports: dict[tuple[str, str], list[Report]] = {}
    for chip in CHIPS.values():
        for label, report in _reports(chip).items():
            reports.setdefault(label, []).append(report)
    FIGURES.write_text(Table.of(reports).written(), encoding="utf-8")


if __name__ == "__main__":
    _write()
