"""One pool of processes for the distributed tests of a worker."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from pool import Pool

WITH_GLOO = dist.is_available() and dist.is_gloo_available()
collect_ignore_glob = [] if WITH_GLOO else ["test_*.py"]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
