"""What "auto" chooses, as a table: algorithm, backend and precision, from shapes and availability alone."""

import inspect
import re
import subprocess
import sys
import types

import pytest
import torch

from barlow_loss import _plan
from barlow_loss._pairs import TWO_VIEWS, all_alike
from barlow_loss._plan import Plan, choose_backend, make_plan

CASE = {
    "algorithm": "auto",
    "backend": "eager",
    "n": 256,
    "d": 8192,
    "dtype": torch.float32,
    "device_type": "cpu",
    "autocast": False,
    "grad_reduction": "mean",
    "on_host": False,
    "weights": TWO_VIEWS,
    "off_diagonal_target": 0.0,
    "diagonal_target": 1.0,
}


def plan(**changes):
    return make_plan(**{**CASE, **changes})


@pytest.mark.parametrize(
    ("n", "d", "expected"),
    [
        (64, 2048, "dual"),
        (128, 8192, "dual"),
        (256, 2048, "dual"),
        (1024, 2048, "dual"),  # N = D/2 exactly
        (1025, 2048, "primal"),
        (2048, 2048, "primal"),
        (2048, 8192, "dual"),
        (4096, 8192, "dual"),
        (4097, 8192, "primal"),
        (4096, 512, "primal"),
        (2, 1, "primal"),
        (2, 3, "primal"),  # 2 > 3/2: an odd D is not rounded up
        (2, 4, "dual"),
        (2, 5, "dual"),
        (3, 5, "primal"),
    ],
)
def test_auto_takes_the_dual_for_n_up_to_half_of_d(n, d, expected):
    assert plan(n=n, d=d).algorithm == expected


@pytest.mark.parametrize("algorithm", ["primal", "dual"])
@pytest.mark.parametrize(("n", "d"), [(2, 10_000), (10_000, 2)])
def test_an_explicit_algorithm_is_kept(algorithm, n, d):
    assert plan(algorithm=algorithm, n=n, d=d).algorithm == algorithm


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps", "xpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_algorithm_depends_on_the_shape_alone(device_type, dtype, autocast):
    """So that every process of a group decides alike."""
    for n, d in ((256, 8192), (4096, 512)):
        changed = plan(n=n, d=d, device_type=device_type, dtype=dtype, autocast=autocast)
        assert changed.algorithm == plan(n=n, d=d).algorithm


@pytest.fixture
def chip(monkeypatch):
    """Pretends that the GPU is another; returns how to say which: its obstacle and whether the tests compile for it."""

    def pretend(obstacle, proven):
        monkeypatch.setattr(_plan, "_triton_on", lambda device_type, index: (obstacle, proven))

    return pretend


OBSTACLE = "triton cannot be imported (No module named 'triton')"


@pytest.mark.parametrize(
    ("backend", "device", "obstacle", "proven", "expected"),
    [
        ("auto", "cpu", None, True, "eager"),
        ("auto", "mps", None, True, "eager"),
        ("auto", "xpu", None, True, "eager"),  # the kernels are not compiled for it in the tests
        ("auto", "cuda", None, True, "triton"),
        ("auto", "cuda", None, False, "eager"),
        ("auto", "cuda", OBSTACLE, True, "eager"),
        ("eager", "cpu", None, True, "eager"),
        ("eager", "cuda", None, True, "eager"),
        ("triton", "cuda", None, True, "triton"),
        ("triton", "cuda", None, False, "triton"),
        ("triton", "xpu", None, False, "triton"),
    ],
)
def test_backend(chip, backend, device, obstacle, proven, expected):
    chip(obstacle, proven)
    assert choose_backend("f", backend, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("views", "n", "dtype", "device", "expected"),
    [
        (2, 385, torch.float32, "cpu", "primal"),
        (3, 385, torch.float32, "cpu", "dual"),
        (8, 768, torch.float64, "cpu", "dual"),
        (8, 768, torch.float32, "cuda", "dual"),
        (8, 769, torch.float32, "cpu", "primal"),
        (8, 384, torch.bfloat16, "cuda", "dual"),
        (8, 385, torch.bfloat16, "cuda", "primal"),  # float16 products lose the digits that the subtraction costs
    ],
)
def test_more_views_take_the_dual_longer(views, n, dtype, device, expected):
    found = plan(n=n, d=768, dtype=dtype, device_type=device, weights=all_alike(views))
    assert found.algorithm == expected


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_triton_refuses_devices_that_it_does_not_serve(device):
    with pytest.raises(ValueError, match=rf"f: backend='triton' expected CUDA.* got {device} tensors.*GPU.*'eager'"):
        choose_backend("f", "triton", torch.device(device))


def test_triton_refuses_to_run_where_it_cannot(chip):
    chip(OBSTACLE, False)
    with pytest.raises(RuntimeError, match=r"f: backend='triton' cannot run here: triton.*import.*'auto' or 'eager'"):
        choose_backend("f", "triton", torch.device("cuda", 0))


@pytest.fixture
def fresh_answers():
    _plan._asked_once.cache_clear()
    yield
    _plan._asked_once.cache_clear()


def pretend_a_driver(monkeypatch, **utils):
    """A GPU that torch finds and a launcher that triton has built, or fails to build."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    triton = types.SimpleNamespace(runtime=types.SimpleNamespace(driver=types.SimpleNamespace(active=Driver(**utils))))
    monkeypatch.setitem(sys.modules, "triton", triton)


class Driver:
    def __init__(self, failure=None):
        self.failure = failure

    @property
    def utils(self):
        if self.failure:
            raise self.failure


@pytest.mark.usefixtures("fresh_answers")
@pytest.mark.parametrize(
    "failure",
    [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc"), OSError("libcuda.so.1")],
    ids=repr,
)
def test_auto_lives_without_a_compiler(monkeypatch, failure):
    """Triton builds its launcher on the machine; a slim container has no compiler, and eager needs none."""
    pretend_a_driver(monkeypatch, failure=failure)
    gpu = torch.device("cuda", 0)
    assert choose_backend("f", "auto", gpu) == "eager"
    with pytest.raises(RuntimeError, match=r"cannot build its launcher.*C compiler.*headers.*'auto' or 'eager'"):
        choose_backend("f", "triton", gpu)


@pytest.mark.usefixtures("fresh_answers")
@pytest.mark.parametrize(
    ("capability", "obstacle", "proven"),
    [
        ((7, 5), r"expects compute capability 8\.0 or newer, got 7\.5", False),
        ((8, 0), None, True),
        ((12, 0), None, True),
    ],
)
def test_nvidia_gpus_from_ampere_on(monkeypatch, capability, obstacle, proven):
    pretend_a_driver(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found, really = _plan._triton_on("cuda", 0)
    assert really == proven
    assert (found is None) if obstacle is None else re.search(obstacle, found)


@pytest.mark.usefixtures("fresh_answers")
@pytest.mark.parametrize(
    ("chip_name", "proven"), [("gfx942:sramecc+:xnack-", True), ("gfx950", True), ("gfx1100", False)]
)
def test_amd_gpus_that_the_tests_compile_for(monkeypatch, chip_name, proven):
    pretend_a_driver(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = types.SimpleNamespace(gcnArchName=chip_name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert _plan._triton_on("cuda", 0) == (None, proven)


@pytest.mark.usefixtures("fresh_answers")
def test_without_a_gpu(monkeypatch):
    """Fake CUDA tensors, on a machine that has none."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _plan._triton_on("cuda", 0) == ("torch finds no GPU here", False)


@pytest.mark.usefixtures("fresh_answers")
def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    obstacle, proven = _plan._triton_on("cuda", 0)
    assert "cannot be imported" in obstacle
    assert not proven


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "device_type", "autocast", "d", "compute", "products"),
    [
        (F64, "cpu", False, 8192, F64, F64),
        (F64, "cuda", True, 8192, F64, F64),  # float64 throughout, autocast or not
        (F32, "cpu", False, 8192, F32, F32),
        (F32, "cuda", False, 8192, F32, F32),  # what fp32 products are is torch.get_float32_matmul_precision()'s affair
        (F32, "cpu", True, 8192, F32, F32),  # no fast 16-bit products on CPU
        (F32, "cuda", True, 8192, F32, F16),
        (BF16, "cpu", False, 8192, F32, F32),
        (F16, "cpu", True, 8192, F32, F32),
        (BF16, "cuda", False, 8192, F32, F16),  # float16 of features scaled by 1/√N errs 8 times less than bfloat16
        (F16, "cuda", False, 8192, F32, F16),
        (F16, "cuda", False, 65504, F32, F16),  # |K| ≤ D, and float16 ends at 65504
        (F16, "cuda", False, 65505, F32, F32),
    ],
)
def test_precision(dtype, device_type, autocast, d, compute, products):
    chosen = plan(dtype=dtype, device_type=device_type, autocast=autocast, d=d)
    assert (chosen.compute_dtype, chosen.matmul_dtype) == (compute, products)


def test_over_processes_the_dual_costs_less_of_everything_where_auto_takes_it():
    """Per rank: FLOPs of the products, and elements sent by a ring all-gather of û against a ring all-reduce of C."""
    for world_size in (2, 8, 1024):
        for n, d in ((256, 8192), (2048, 8192), (4096, 8192), (1024, 2048)):
            assert plan(n=n, d=d).algorithm == "dual"
            assert 8 * (n / world_size) * n * d < 6 * (n / world_size) * d**2
            assert 2 * n * d < 2 * d**2


def test_the_plan_sees_no_data():
    """Its arguments are numbers, names and a dtype; nothing it could wait for a device for."""
    assert set(inspect.signature(make_plan).parameters) == set(CASE)
    assert isinstance(plan(), Plan)
    assert plan() == plan()
