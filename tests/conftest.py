"""What every test shares: one thread, deterministic property tests, both algorithms, both dtypes.

`--device cuda` and `--backend triton` send the laws to a GPU and through a backend: what asks for "auto" gets that
backend. With TRITON_INTERPRET=1 in the environment, `--backend triton` runs them on the CPU, in triton's interpreter.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import strategies
from barlow_loss import _plan

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, print_blob=True)
# Another seed on every run and ten times the examples: pytest tests/test_laws_*.py --hypothesis-profile=search
settings.register_profile(
    "search", deadline=None, max_examples=250, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
# In triton's interpreter an example takes a tenth of a second: pytest … --hypothesis-profile=interpreted
settings.register_profile("interpreted", deadline=None, derandomize=True, max_examples=1, print_blob=True)
settings.register_profile("interpreted-more", deadline=None, derandomize=True, max_examples=4, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the views that the laws draw")
    parser.addoption("--backend", choices=("eager", "triton"), help='the backend that "auto" is to take')


def pytest_configure(config: pytest.Config) -> None:
    # The bits of a sum depend on the number of threads; the laws P10, P24, P25 and P27 are bitwise.
    torch.set_num_threads(1)
    strategies.DEVICE = config.getoption("--device")
    if backend := config.getoption("--backend"):
        if backend == "triton" and strategies.DEVICE == "cpu":
            interpret(config)
        take_for_auto(backend)


def interpret(config: pytest.Config) -> None:
    """Kernels on CPU tensors, by triton's interpreter, with the repairs of tests/kernels/interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("--backend triton: expected --device cuda, or TRITON_INTERPRET=1 in the environment")
    sys.path.append(str(Path(__file__).parent / "kernels" / "interpreted"))
    from repaired_interpreter import repaired

    repairs = repaired()
    repairs.__enter__()
    config.add_cleanup(lambda: repairs.__exit__(None, None, None))


def take_for_auto(backend: str) -> None:
    """Make "auto" that backend, for tensors on the device of the laws."""
    choose, laws_device = _plan.choose_backend, torch.device(strategies.DEVICE)
    _plan.choose_backend = lambda caller, asked, device: (
        backend if asked == "auto" and device.type == laws_device.type else choose(caller, asked, device)
    )


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
    gc.freeze()
    yield
    torch.compiler.reset()


def pytest_collection_finish() -> None:
    """No collection of garbage, of which torch.compiler.reset() makes many, searches what has been imported."""
    gc.freeze()
