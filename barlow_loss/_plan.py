"""Which algorithm, which backend, which precision: pure functions of shapes, dtype, device and availability.

Nothing here looks at data, so every process decides alike and no device is waited for.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from barlow_loss._pairs import TWO_VIEWS, Weights

__all__ = [
    "ALGORITHMS",
    "BACKENDS",
    "Algorithm",
    "Backend",
    "Plan",
    "applied",
    "autocast_disabled",
    "autocast_enabled",
    "choose_algorithm",
    "choose_backend",
    "is_batched",
    "is_traced",
    "is_transformed",
    "make_plan",
    "plan_for",
    "vector_dtype",
    "without_tangent",
]

Algorithm = Literal["auto", "primal", "dual"]
Backend = Literal["auto", "eager", "triton"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
BACKENDS: tuple[str, ...] = get_args(Backend)

# |K| ≤ D, and float16 ends at 65504.
_FLOAT16_MAX_FEATURES = 65504
_FLOAT16_MATMUL_DEVICES = ("cuda", "xpu", "mps")
_TRITON_DEVICES = ("cuda", "xpu")  # torch calls ROCm "cuda" too

_LEAST_NVIDIA_CAPABILITY = (8, 0)  # bfloat16 and the tensor cores that the kernels are compiled for in the tests
_AMD_CHIPS_OF_AUTO = ("gfx942", "gfx950")  # likewise


_AS_IT_IS = nullcontext()


class Plan(NamedTuple):
    """Everything that is decided before the first number is read."""

    algorithm: str  # "primal" or "dual"
    backend: str  # "eager" or "triton"
    compute_dtype: torch.dtype  # elementwise work, the diagonal, the returned loss
    matmul_dtype: torch.dtype  # operands of the matrix products, and what is gathered over processes
    grad_reduction: str = "mean"  # or "sum"
    on_host: bool = False  # CPU tensors in plain eager mode: numbers may be read, work may go by blocks
    weights: Weights = TWO_VIEWS  # of the pairs of views
    off_diagonal_target: float = 0.0
    diagonal_target: float = 1.0


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
    on_host: bool = False,
    weights: Weights = TWO_VIEWS,
    off_diagonal_target: float = 0.0,
    diagonal_target: float = 1.0,
) -> Plan:
    """Resolve what depends on the batch. An explicit choice is kept as it is.

    Args:
        algorithm: "auto", "primal" or "dual".
        backend: "eager" or "triton", from ``choose_backend``.
        n: samples in the global batch.
        d: features.
        dtype: dtype of the views.
        device_type: such as "cpu" or "cuda".
        autocast: whether the caller runs under autocast on that device.
        grad_reduction: "mean" or "sum", kept as it is.
        on_host: kept as it is.
        weights: kept as they are.
        off_diagonal_target: kept as it is.
        diagonal_target: kept as it is.
    """
    matmul_dtype = _matmul_dtype(dtype, d, device_type, autocast)
    compute = _compute_dtype(dtype)
    if algorithm == "auto":
        algorithm = choose_algorithm(n, d, len(weights), matmul_dtype == compute)
    precision = compute, matmul_dtype
    targets = off_diagonal_target, diagonal_target
    return Plan(algorithm, backend, *precision, grad_reduction, on_host, weights, *targets)


_remembered = functools.lru_cache(maxsize=256)(make_plan)


def plan_for(
    caller: str,
    algorithm: str,
    backend: str,
    grad_reduction: str,
    weights: Weights,
    n: int,
    views: tuple[Tensor, ...],
    off_diagonal_target: float = 0.0,
    diagonal_target: float = 1.0,
) -> Plan:
    """``make_plan`` for the views of a global batch of n rows, remembered; raises as ``choose_backend`` does."""
    z = views[0]
    traced, device = is_traced(*views), z.device
    return (make_plan if traced else _remembered)(
        algorithm=algorithm,
        backend=choose_backend(caller, backend, device),
        n=n,
        d=z.shape[1],
        dtype=z.dtype,
        device_type=device.type,
        autocast=autocast_enabled(device.type),
        grad_reduction=grad_reduction,
        on_host=z.is_cpu and not traced,
        weights=weights,
        off_diagonal_target=off_diagonal_target,
        diagonal_target=diagonal_target,
    )


def is_traced(*tensors: Tensor) -> bool:
    """Whether operations on them are followed, not done: by a compiler, torch.func, make_fx, for fake tensors."""
    return (
        torch.compiler.is_compiling()
        or _functorch()
        or not _PLAIN.issuperset(map(type, tensors))
        or (_modes() > 0 and any(_mode(number).is_infra_mode() for number in range(_modes())))
        or _keyed(_PRE_DISPATCH)
        or _jit_trace() is not None
        or _forward_mode._current_level >= 0
    )


def is_transformed(*tensors: Tensor) -> bool:
    """Whether the operation has to be taken apart: by torch.func, torch.jit.trace, or a forward-mode derivative."""
    if torch.compiler.is_compiling() or _functorch():
        return bool(_functorch())
    return _jit_trace() is not None or any(_forward_mode.unpack_dual(t).tangent is not None for t in tensors)


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether one of them stands for several, as torch.vmap and is_grads_batched make them."""
    return not torch.compiler.is_compiling() and any(
        t is not None and (_legacy_batched(t) or _batched(t)) for t in tensors
    )


def without_tangent(t: Tensor) -> Tensor:
    """What is kept from one call to the next has no part in a forward-mode derivative."""
    return _forward_mode.unpack_dual(t).primal if _forward_mode._current_level >= 0 and not _functorch() else t


def applied(operation: Any, differentiated: bool, *inputs: Any) -> tuple[Tensor, ...]:
    """``operation.apply``; in a graph that needs no gradient its forward alone.

    There Dynamo (torch 2.14.1) hands a forward with any number of arguments its context as one more.
    """
    if torch.compiler.is_compiling() and not differentiated:
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = operation.forward(*inputs)
    else:
        outputs = operation.apply(*inputs)
    return outputs


_PLAIN = {Tensor, torch.nn.Parameter}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # pyright: ignore[reportPrivateUsage]
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_forward_mode: Any = forward_ad
_jit_trace: Any = _C._get_tracing_state
_batched, _legacy_batched = _C._functorch.is_batchedtensor, _C._functorch.is_legacy_batchedtensor
_functorch = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
_modes = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_mode = torch._C._get_dispatch_stack_at  # pyright: ignore[reportPrivateUsage]
_keyed = torch._C._dispatch_tls_is_dispatch_key_included  # pyright: ignore[reportPrivateUsage]


def choose_algorithm(n: int, d: int, views: int = 2, full_precision: bool = True) -> str:
    """The dual for N ≤ D/2, and of more than two views for N ≤ D where the products have full precision.

    Of two views the FLOPs of the two cross at N ≈ 0.75 D (6 N D² against 8 N² D), but the dual subtracts the diagonal
    from ‖C‖², and the condition number of that subtraction is bounded by 2 only up to N ≈ D/2 (equal diagonal).

    Of V views they cross at N ≈ 0.75 (V − 1) D. Float32 stands the subtraction up to N = D: at 768×768 both algorithms
    have the same errors, and on one thread the dual is 2.2 times as fast for V = 4 and 5.6 times for V = 8, but 0.94
    times for V = 2. Near the optimum the off-diagonal sum is off by 1.2e-7 there (V = 8), and by 2.7e-7 at N = 4 D.

    Over W processes of n = N/W rows the rule decides by bytes as well: a rank sends and receives 2 N D elements for the
    dual and 2 D² for the primal (each times (W − 1)/W), and computes 8 n N D against 6 n D² FLOPs. For N ≤ D/2 the dual
    has less of both at any W.
    """
    most = 2 * d if views > 2 and full_precision else d
    return "dual" if 2 * n <= most else "primal"


def choose_backend(caller: str, backend: str, device: torch.device) -> str:
    """Resolve "auto": Triton on the GPUs that its kernels are compiled for in the tests, else plain torch.

    Raises:
        ValueError: "triton" was asked for, and Triton does not support the device.
        RuntimeError: "triton" was asked for, and it is not installed or does not work with this GPU.
    """
    if backend == "eager" or (backend == "auto" and device.type != "cuda"):
        return "eager"
    if device.type not in _TRITON_DEVICES:
        raise ValueError(
            f"{caller}: backend='triton' expected CUDA, ROCm or XPU tensors, got {device.type} tensors. "
            "Move the views to a GPU, or use backend='auto' or 'eager'."
        )
    obstacle, proven = _triton_on(device.type, device.index)
    if backend == "auto":
        return "triton" if proven and obstacle is None else "eager"
    if obstacle is not None:
        raise RuntimeError(f"{caller}: backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'eager'.")
    return "triton"


def _triton_on(device_type: str, index: int | None) -> tuple[str | None, bool]:
    """Why Triton cannot be used on a device, or None; and whether its chip is one that the tests compile for."""
    return _asked_once(device_type, index)


# What torch.compiler.assume_constant_result does, without loading the compiler, which takes a second: a compiled graph
# takes the answer as it is. It knows plain functions only.
_triton_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _asked_once(device_type: str, index: int | None) -> tuple[str | None, bool]:
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); a CUDA or ROCm build of torch brings it", False
    if device_type == "xpu":
        return None, False
    if not torch.cuda.is_available():  # tensors without data: fake ones
        return "torch finds no GPU here", False
    try:
        _ = triton.runtime.driver.active.utils  # built at its first use, which wants a C compiler and Python's headers
    except Exception as error:  # of whatever kind: "auto" must not fail for it
        return f"triton cannot build its launcher ({error}); it needs a C compiler and Python's headers", False
    if torch.version.hip is not None:
        properties = cast("Any", torch.cuda.get_device_properties(index))  # pyright: ignore[reportUnknownMemberType]
        return None, properties.gcnArchName.partition(":")[0] in _AMD_CHIPS_OF_AUTO
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_NVIDIA_CAPABILITY:
        least = ".".join(map(str, _LEAST_NVIDIA_CAPABILITY))
        return f"it expects compute capability {least} or newer, got {capability[0]}.{capability[1]}", False
    return None, True


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
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else _AS_IT_IS


def vector_dtype(device: torch.device) -> torch.dtype:
    """Per-feature vectors are float64: D numbers cost nothing and survive large means. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
