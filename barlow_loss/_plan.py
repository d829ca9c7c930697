"""Which algorithm, which backend, which precision: pure functions of shapes, dtype, device and availability.

Nothing here looks at data, so every process decides alike and no device is waited for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch

__all__ = [
    "ALGORITHMS",
    "BACKENDS",
    "Algorithm",
    "Backend",
    "Plan",
    "autocast_disabled",
    "autocast_enabled",
    "make_plan",
    "vector_dtype",
]

Algorithm = Literal["auto", "primal", "dual"]
Backend = Literal["auto", "eager", "triton"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
BACKENDS: tuple[str, ...] = get_args(Backend)

# |K| ≤ D, and float16 ends at 65504.
_FLOAT16_MAX_FEATURES = 65504
_FLOAT16_MATMUL_DEVICES = ("cuda", "xpu", "mps")


class Plan(NamedTuple):
    """Everything that is decided before the first number is read."""

    algorithm: str  # "primal" or "dual"
    backend: str  # "eager"
    compute_dtype: torch.dtype  # elementwise work, the diagonal, the returned loss
    matmul_dtype: torch.dtype  # operands of the matrix products, and what is gathered over processes
    grad_reduction: str = "mean"  # or "sum"


def make_plan(
    *,
    algorithm: str,
    backend: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    device_type: str,
    autocast: bool,
    grad_reduction: str = "mean",
) -> Plan:
    """Resolve every "auto". An explicit choice is kept as it is, or raises where it cannot be served.

    Args:
        algorithm: "auto", "primal" or "dual".
        backend: "auto", "eager" or "triton".
        n: samples in the global batch.
        d: features.
        dtype: dtype of the views.
        device_type: such as "cpu" or "cuda".
        autocast: whether the caller runs under autocast on that device.
        grad_reduction: "mean" or "sum", kept as it is.
    """
    return Plan(
        _choose_algorithm(algorithm, n, d),
        _choose_backend(backend),
        _compute_dtype(dtype),
        _matmul_dtype(dtype, d, device_type, autocast),
        grad_reduction,
    )


def _choose_algorithm(algorithm: str, n: int, d: int) -> str:
    """The dual for N ≤ D/2.

    The FLOPs of the two cross at N ≈ 0.75 D (6 N D² against 8 N² D), but the dual subtracts the diagonal from ‖C‖²,
    and the condition number of that subtraction is bounded by 2 only up to N ≈ D/2 (equal diagonal).

    Over W processes of n = N/W rows the rule decides by bytes as well: a rank sends and receives 2 N D elements for the
    dual and 2 D² for the primal (each times (W − 1)/W), and computes 8 n N D against 6 n D² FLOPs. For N ≤ D/2 the dual
    has less of both at any W.
    """
    if algorithm != "auto":
        return algorithm
    return "dual" if 2 * n <= d else "primal"


def _choose_backend(backend: str) -> str:
    if backend == "triton":
        raise NotImplementedError(
            "barlow_twins_loss: backend='triton' is not implemented in this version. Use backend='auto' or 'eager'."
        )
    return "eager"


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul_dtype(dtype: torch.dtype, d: int, device_type: str, autocast: bool) -> torch.dtype:
    """16-bit products where the caller allowed them and the hardware has them.

    float16 of features scaled by 1/√N has 8 times less gradient error than bfloat16, and cannot overflow.
    """
    allowed = dtype in (torch.float16, torch.bfloat16) or (autocast and dtype == torch.float32)
    if allowed and device_type in _FLOAT16_MATMUL_DEVICES and d <= _FLOAT16_MAX_FEATURES:
        return torch.float16
    return _compute_dtype(dtype)


def autocast_enabled(device_type: str) -> bool:
    """Whether the caller runs under autocast. The meta device has none, and asking for it raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_disabled(device_type: str) -> AbstractContextManager[Any]:
    """Inside, every operation keeps the dtype that it was given."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def vector_dtype(device: torch.device) -> torch.dtype:
    """Per-feature vectors are float64: D numbers cost nothing and survive large means. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
