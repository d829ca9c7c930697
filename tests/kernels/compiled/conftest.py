"""The kernels through triton's compiler: needs no GPU, but must not run where kernels are interpreted."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fake_driver import PretendedGpu

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*.py"]


class NotCompiled(pytest.Module):
    """A test file that is not imported, since its kernels would be interpreted."""

    def collect(self) -> Any:
        pytest.skip("run without TRITON_INTERPRET", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return NotCompiled.from_parent(parent, path=module_path)
    return None


@pytest.fixture
def pretended_h100() -> Iterator["PretendedGpu"]:
    """Launches of the test are counted, not compiled and not executed."""
    from chips import CHIPS
    from fake_driver import pretended

    with pretended(CHIPS["sm_90"]) as gpu:
        yield gpu
