"""The kernels in triton's interpreter: needs no GPU, but TRITON_INTERPRET=1 before triton is imported."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*.py"]


class NotInterpreted(pytest.Module):
    """A test file that is not imported, since a kernel that is compiled cannot be interpreted in the same process."""

    def collect(self) -> Any:
        pytest.skip("run with TRITON_INTERPRET=1; make test does", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return NotInterpreted.from_parent(parent, path=module_path)


@pytest.fixture(scope="session", autouse=True)
def faithful_interpreter() -> Iterator[None]:
    """Every launch of the session is checked; see repaired_interpreter.py."""
    from repaired_interpreter import repaired

    with repaired():
        yield
