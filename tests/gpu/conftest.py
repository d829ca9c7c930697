"""What the tests share that need a GPU: CUDA, or ROCm, which torch calls CUDA too. Without one they are skipped."""

from pathlib import Path

import pytest
import torch
from precision import SETTINGS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", params=["triton", "eager"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="session", params=SETTINGS, ids=lambda setting: setting.name)
def setting(request):
    """Dtype of the views and of autocast."""
    return request.param
