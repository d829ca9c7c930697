"""What "auto" chooses, as a table: algorithm, backend and precision, from shapes and availability alone."""

import inspect

import pytest
import torch

from barlow_loss._plan import Plan, make_plan

CASE = {
    "algorithm": "auto",
    "backend": "auto",
    "n": 256,
    "d": 8192,
    "dtype": torch.float32,
    "device_type": "cpu",
    "autocast": False,
    "grad_reduction": "mean",
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


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_backend_is_eager(backend, device_type):
    assert plan(backend=backend, device_type=device_type).backend == "eager"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_triton_is_refused_with_the_remedy(device_type):
    with pytest.raises(NotImplementedError, match=r"triton.*auto.*eager"):
        plan(backend="triton", device_type=device_type)


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
