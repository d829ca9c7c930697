"""Forward + backward of the loss, float32, under pytest-benchmark; the answer of each contender is checked first.

FLOP and byte models: bench.py.

    pytest benches/bench_loss.py                                        the whole grid
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
from measure import SEED, Answer, Cell, check, error_of_own, step, truth

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # about torch.compile's own insides
]


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="module", params=GRID, ids=lambda cell: f"{cell.n}x{cell.d}")
def cell(request: pytest.FixtureRequest) -> Cell:
    chosen: Cell = request.param
    return chosen


@pytest.fixture(scope="module")
def views(cell: Cell) -> tuple[torch.Tensor, ...]:
    return cell.views()


@pytest.fixture(scope="module")
def right(views: tuple[torch.Tensor, ...]) -> Answer:
    return truth(*views)


@pytest.mark.parametrize("name", contenders())
def test_step(
    benchmark: BenchmarkFixture, name: str, cell: Cell, views: tuple[torch.Tensor, ...], right: Answer
) -> None:
    if name not in present(cell, (name,)):
        pytest.skip(f"{name} takes too long at {cell}")
    torch.compiler.reset()
    contender = build(name, cell.d)
    torch.manual_seed(SEED)
    found = error_of_own(name, step(contender, *views), right, *views)
    check(name, cell, found)
    benchmark.group = str(cell)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "algorithm": cell.algorithm, **found._asdict()}
    benchmark(step, contender, *views)
