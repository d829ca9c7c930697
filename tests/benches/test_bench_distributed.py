"""The section "distributed": that it can see an error at all, that nothing hangs, and what it counts.

The ranks are the section's own processes, two of them at a time.
"""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

from contenders import OURS, SOLO, TEXTBOOK, VISSL
from distributed import (
    Shards,
    answers,
    exactness,
    judged,
    measure,
    preload,
    sent_by_dual,
    sent_by_textbook,
    summed,
    together,
)
from measure import Cell, truth

EVEN, UNEVEN = Shards(64, 512, (32, 32)), Shards(64, 512, (24, 40))


@pytest.fixture(scope="module", autouse=True)
def torch_imported_once():
    preload()


@pytest.fixture(scope="module")
def even():
    return exactness(EVEN, (OURS, TEXTBOOK, SOLO, VISSL))


def test_ours_is_the_loss_of_the_batch_and_has_its_gradient(even):
    assert (even["processes"], even["rows"], even["d"]) == (2, [32, 32], 512)
    found = even["contenders"][OURS]
    assert found["loss_error"] <= 2e-6
    assert found["gradient_error"] <= 1e-5
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", [SOLO, VISSL])
def test_statistics_per_rank_and_of_both_views_are_seen(even, name):
    """Half of the gradient's error is its length, as C is summed past autograd; the cosine leaves that out."""
    found = even["contenders"][name]
    assert found["loss_error"] > 1e-2
    assert found["gradient_error"] > 0.3
    assert found["gradient_cosine"] < 0.995


def test_the_published_program_has_half_the_gradient_on_two_ranks(even):
    """Its loss is right, and so is the direction."""
    found = even["contenders"][TEXTBOOK]
    assert found["loss_error"] <= 2e-6
    assert found["gradient_error"] == pytest.approx(0.5, abs=1e-5)
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-9)


def test_uneven_shards_keep_ours_and_the_published_program_right_and_no_other():
    found = exactness(UNEVEN, (OURS, TEXTBOOK, SOLO, VISSL))["contenders"]
    assert found[OURS]["loss_error"] <= 2e-6
    assert found[OURS]["gradient_error"] <= 1e-5
    assert found[TEXTBOOK]["loss_error"] <= 2e-6
    assert found[TEXTBOOK]["gradient_error"] == pytest.approx(0.5, abs=1e-5)
    for name in (SOLO, VISSL):
        assert found[name]["loss_error"] > 1e-2


def test_ours_would_be_refused_with_the_gradient_of_the_published_program():
    by_rank = together(answers, 2, EVEN, (TEXTBOOK,))
    with pytest.raises(AssertionError, match=r"barlow_loss at 64×512 as 32 \+ 32 rows: expected errors .* found"):
        judged(OURS, EVEN, [{OURS: own[TEXTBOOK]} for own in by_rank], truth(*EVEN.views()))


@pytest.mark.parametrize("rows", [(1, 31), (31, 1)], ids=str)
def test_who_refuses_is_written_down_and_the_next_one_answers(rows):
    """Batch norm takes no single row; the other rank is left alone in a collective, and raises for that later."""
    found = exactness(Shards(32, 128, rows), (SOLO, OURS))["contenders"]
    assert found[SOLO].keys() == {"refused"}
    assert found[SOLO]["refused"].startswith("Expected more than 1 value per channel when training")
    assert found[OURS]["gradient_error"] <= 1e-5


def _sleep(place, folder, raising):
    (folder / str(place.rank)).write_text(str(os.getpid()))
    if place.rank == raising:
        raise ValueError(f"rank {place.rank} gives up")
    time.sleep(60)


@pytest.mark.parametrize(
    ("raising", "limit", "error", "message"),
    [
        (1, 60, ValueError, r"rank 1 gives up"),
        (None, 3, multiprocessing.TimeoutError, None),
    ],
    ids=["raises", "hangs"],
)
@pytest.mark.usefixtures("even")  # so that the server has started
def test_a_job_that_raises_or_hangs_is_ended(tmp_path, raising, limit, error, message):
    with pytest.raises(error, match=message):
        together(_sleep, 2, tmp_path, raising, limit=limit)
    started = list(tmp_path.iterdir())
    assert started
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process.read_text()), 0)


def test_the_bytes_of_a_cell_are_those_of_the_model():
    cell = Cell(32, 256)
    record = measure(Shards.even(cell, 2), rounds=1, seconds=0.0)
    ours, textbook = (record["contenders"][name] for name in (OURS, TEXTBOOK))
    batch_norm = 2 * 4 * summed(4 * cell.d, 2)  # two views: mean and variance, forward and backward
    batch_norm += summed(4, 2)  # the number of rows
    assert ours["sent"]["collectives"] == pytest.approx(sent_by_dual(cell, 2).sent, abs=0.5)
    assert textbook["sent"]["collectives"] == sent_by_textbook(cell, 2).sent + batch_norm
    assert (record["n"], record["d"], record["processes"], record["rounds"]) == (32, 256, 2, 1)
    assert (ours["gradient_factor"], textbook["gradient_factor"]) == (1, 0.5)
    assert ours["times_ours"] == {"median": 1, "q1": 1, "q3": 1}
    assert record["floor"].keys() == {"seconds", "times_ours"}
    assert 0 < record["header"]["seconds"]["median"] < 10 * ours["seconds"]["median"]  # of which it is a part


def test_the_rows_of_the_ranks_are_the_batch():
    for views, whole in zip(zip(*(UNEVEN.of(rank) for rank in range(2)), strict=True), UNEVEN.views(), strict=True):
        assert [len(rows) for rows in views] == [24, 40]
        torch.testing.assert_close(torch.cat(views), whole, rtol=0, atol=0)


@pytest.mark.parametrize("cell", [Cell(63, 512), Cell(64, 64)], ids=str)
def test_a_cell_that_cannot_be_shared_or_counted_is_refused(cell):
    with pytest.raises(ValueError, match=f"grid: expected an N that 2 processes can share, of at most D/2, got {cell}"):
        Shards.even(cell, 2)
