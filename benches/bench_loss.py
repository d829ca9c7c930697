"""Forward + backward of the loss, float32, under pytest-benchmark; the answer of each contender is checked first.

FLOP model: dual 8·N²·D, primal and the textbook formula 6·N·D². Byte model: dozens of passes over N×D matrices,
4·N·D bytes each; the textbook formula and lightly read or write a D×D matrix 39 times besides, 4·D² bytes each.

    pytest benches/bench_loss.py                                        the whole grid
    pytest benches/bench_loss.py -k "256x8192" --threads 2              one cell
    pytest benches/bench_loss.py --benchmark-disable                    answers only

Contenders run one after the other here, so a busy machine shifts them against each other: quote the ratios of
compare.py, which lets them take turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from baselines import build, contenders
from workload import GRID, Answer, Cell, check, errors, step, truth

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),  # about torch.compile's own insides
]


@pytest.fixture(scope="module", params=GRID, ids=lambda cell: f"{cell.n}x{cell.d}")
def cell(request: pytest.FixtureRequest) -> Cell:
    chosen: Cell = request.param
    return chosen


@pytest.fixture(scope="module")
def views(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    return cell.views()


@pytest.fixture(scope="module")
def right(views: tuple[torch.Tensor, torch.Tensor]) -> Answer:
    return truth(*views)


@pytest.mark.parametrize("name", contenders())
def test_step(
    benchmark: BenchmarkFixture, name: str, cell: Cell, views: tuple[torch.Tensor, torch.Tensor], right: Answer
) -> None:
    torch.compiler.reset()
    contender = build(name, cell.d)
    found = errors(step(contender, *views), right)
    check(name, cell, found)
    benchmark.group = str(cell)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "algorithm": cell.algorithm, **found._asdict()}
    benchmark(step, contender, *views)
