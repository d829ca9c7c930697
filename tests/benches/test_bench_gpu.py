"""The bench of a GPU on a CPU and on a pretended GPU, and the page of what was measured on one."""

import itertools
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

import gpu
from gpu import AUTOCAST, COMPILED, EAGER, FLOAT32, TEXTBOOK, TRITON, Events
from measure import RESULTS, Cell, Errors, load


@pytest.fixture
def stored() -> dict[str, Any]:
    return load(RESULTS / "gpu.json")


def test_one_that_is_no_contender_any_more_keeps_what_was_measured(stored: dict[str, Any]) -> None:
    record = stored["cells"][0]
    found = record["contenders"][TEXTBOOK]
    record["contenders"]["a former one"] = found
    page = gpu.markdown(stored)
    (row,) = (line for line in page.splitlines() if "| a former one |" in line)
    head = next(line for line in page.splitlines() if line.startswith("| N × D | contender |"))
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["ms"].startswith(f"{1e3 * found['seconds']['median']:.4g} (")
    assert cells["loss error"] == f"{found['loss_error']:.3g}"
    assert gpu.failures(stored) == []


def test_a_measurement_becomes_the_rows_of_the_page(stored: dict[str, Any]) -> None:
    """On the CPU, where the two that need a GPU are left out, and without time for what is compiled."""
    record = gpu.measured(Cell(16, 64), AUTOCAST, gpu.Wall(), rounds=2, deadline=0.0)
    timed = {name: found for name, found in record["contenders"].items() if "seconds" in found}
    assert timed.keys() >= {TEXTBOOK, EAGER}
    assert record["contenders"][TRITON] == {"left_out": "needs a GPU"}
    assert record["contenders"][COMPILED] == {"left_out": "the budget was spent"}
    assert timed[TEXTBOOK]["times"][EAGER]["median"] > 0
    page = gpu.markdown({**stored, "cells": [record], "left_out": ["the rest: left out, the budget was spent"]})
    assert f"| 16 × 64 | {EAGER} | " in page
    assert "- the rest: left out" in page


def test_a_wrong_answer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any]) -> None:
    monkeypatch.setattr(gpu, "allowed", lambda name, setting: Errors(0.0, 0.0))
    record = gpu.measured(Cell(16, 64), AUTOCAST, gpu.Wall(), rounds=1, deadline=0.0)
    assert record["contenders"][EAGER]["failed"].startswith(
        f"AssertionError: {EAGER} at 16×64: expected errors of at most"
    )
    assert "seconds" not in record["contenders"][EAGER]
    assert len(gpu.failures({"cells": [record]})) == 1
    (row,) = (r for r in gpu.markdown({**stored, "cells": [record]}).splitlines() if f"| {EAGER} | " in r)
    assert f"{record['contenders'][EAGER]['loss_error']:.3g}" in row
    assert "expected errors of at most" in row


def test_it_needs_nothing_that_a_bare_machine_lacks() -> None:
    """A machine with a GPU has torch and triton, and often neither a network nor a package that draws."""
    program = "import sys, gpu; print(*sys.modules)"
    path = os.pathsep.join([str(RESULTS.parent), str(RESULTS.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"PIL", "lightly", "matplotlib", "pandas", "stable_pretraining", "torchvision"})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """torch.cuda of a GPU that is not there: its clock ticks at every event, and a step takes 250 bytes."""
    pretended, clock = mock.MagicMock(), itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.tick = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.tick - self.tick)

    pretended.Event = Event
    pretended.get_device_properties.return_value.L2_cache_size = 8
    pretended.memory_allocated.return_value, pretended.max_memory_allocated.return_value = 100, 350
    monkeypatch.setattr(torch, "cuda", pretended)
    monkeypatch.setattr(Events, "LEAST_FLUSH", 16)
    return pretended


def test_a_gpu_is_timed_by_events_with_its_cache_overwritten(cuda: mock.MagicMock) -> None:
    events, calls = Events(torch.device("cpu")), []
    events._other.fill_(1)
    assert len(events._other) == 32  # four times the cache
    assert events(lambda: calls.append(int(events._other.sum())), 1000) == 1e-3  # a tick is a millisecond
    assert calls == [0] * Events.MOST_CALLS
    assert events.in_a_row(lambda: calls.append(1), 4) == 0.25e-3
    assert cuda.synchronize.called


def test_a_graph_is_captured_once_and_replayed(cuda: mock.MagicMock) -> None:
    steps: list[int] = []
    answer = (torch.ones(()), torch.ones(2), torch.ones(2))

    def turn() -> tuple[torch.Tensor, ...]:
        steps.append(1)
        return answer

    graphed = gpu.Graphed(turn)
    assert len(steps) == gpu.WARM_UPS + 1
    assert graphed() is answer
    assert len(steps) == gpu.WARM_UPS + 1
    assert cuda.CUDAGraph.return_value.replay.call_count == 1
    assert graphed.peak == gpu.rise(turn) == 250


@pytest.mark.usefixtures("cuda")
def test_the_floor_is_the_ceilings_products_or_bytes() -> None:
    clock = mock.MagicMock(device=torch.device("meta"), in_a_row=lambda turn, calls: float(turn() is None) + 1)
    found = gpu.ceilings(clock)
    assert found["copy_bytes_per_second"] == 2 * gpu.COPIED_BYTES
    assert found["float16_flops"] == found["float32_flops"] == 2 * gpu.SQUARE**3
    least = 4 * 16 * 64 / (2 * gpu.COPIED_BYTES)  # elements: of views read, of gradients written
    assert gpu.floor(Cell(16, 64), AUTOCAST, found) == 2 * least
    assert gpu.floor(Cell(16, 64), FLOAT32, found) == 4 * least
    assert gpu.floor(Cell(2**20, 64), AUTOCAST, found) == 8 * 2**40 * 64 / (2 * gpu.SQUARE**3)
