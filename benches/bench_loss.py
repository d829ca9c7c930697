"""Forward + backward of the loss, float32, under pytest-benchmark; the answer of each contender is checked first.

    pytest benches/bench_loss.py                                        the whole grid; FLOP and byte models: bench.py
    OMP_NUM_THREADS=2 pytest benches/bench_loss.py -k "256x8192"        one cell; else on one thread
    pytest benches/bench_loss.py --benchmark-disable                    answers only

Contenders run one after the other here, so a busy machine shifts them against each other: quote the ratios of
bench.py, which lets them take turns.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from bench import GRID, present
from contenders import build, contenders
from measure import SEED, Cell, check, error_of_own, step, truth

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # about torch.compile's own insides
]
CASES = [(cell, name) for cell in GRID for name in present(cell, contenders())]


@pytest.mark.parametrize(("cell", "name"), CASES, ids=[f"{cell.n}x{cell.d}-{name}" for cell, name in CASES])
def test_step(benchmark: BenchmarkFixture, cell: Cell, name: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.compiler.reset()
    views, contender = cell.views(), build(name, cell.d)
    torch.manual_seed(SEED)
    found = error_of_own(name, step(contender, *views), truth(*views), *views)
    check(name, cell, found)
    benchmark.group = str(cell)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "algorithm": cell.algorithm, **found._asdict()}
    benchmark(step, contender, *views)
