"""What the tests share that need a GPU, CUDA or ROCm, which torch calls CUDA too. Without one none is collected."""

import pytest
import torch
from precision import SETTINGS

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


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
