"""The option ``--threads`` of the benches."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")


@pytest.fixture(scope="session", autouse=True)
def threads(pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(pytestconfig.getoption("--threads"))
