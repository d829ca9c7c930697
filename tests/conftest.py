"""What every test shares: one thread, deterministic property tests, both algorithms, both dtypes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, print_blob=True)
# Another seed on every run and ten times the examples: pytest tests/test_laws_*.py --hypothesis-profile=search
settings.register_profile(
    "search", deadline=None, max_examples=250, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def pytest_configure() -> None:
    # The bits of a sum depend on the number of threads; the laws P10, P24, P25 and P27 are bitwise.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["primal", "dual"])
def algorithm(request: pytest.FixtureRequest) -> str:
    """Both exact algorithms, whatever "auto" would choose at the size at hand."""
    return request.param


@pytest.fixture(scope="session", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The two dtypes for which the laws state a tolerance."""
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled graph of another test is reused, and none is left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
