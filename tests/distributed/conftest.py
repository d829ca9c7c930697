"""One pool of processes for all distributed tests, which therefore run on one worker of pytest-xdist."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from pool import Pool

HERE = Path(__file__).parent
WITH_GLOO = dist.is_available() and dist.is_gloo_available()
collect_ignore_glob = [] if WITH_GLOO else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
