"""Triton's CPU interpreter, made faithful to a GPU in the places where it is not.

Under TRITON_INTERPRET=1 the stock interpreter of triton 3.6 and 3.8 truncates casts to bfloat16, computes with the bit
patterns of bfloat16 as if they were integers, keeps all bits of TF32 operands, passes a Python float to a kernel in
double precision, and sees neither an address outside the tensors nor two programs that meet at one address.
`repaired()` mends that for as long as it is open. It replaces private names of triton, therefore it insists on the
versions that it was tested with.

Not mended: whether the kernel compiles; the order of additions inside tl.dot; a load of what the
same program stored (a GPU needs a barrier in between); atomics, which are refused.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from launch_memory import LaunchMemory, OutOfBounds, Race, tensors_among
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle
from triton.runtime.jit import KernelParam

KNOWN_TRITON = ("3.6", "3.8")
Handle = Any  # TensorHandle; triton is untyped


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid on three axes, and the launch options (num_warps, ...)."""

    kernel: str
    grid: tuple[int, int, int]
    options: Mapping[str, Any]


@dataclass
class _Running:
    """The launch at work."""

    kernel: str
    options: Mapping[str, Any]
    memory: LaunchMemory
    order: np.ndarray = field(default_factory=lambda: np.arange(0))
    program: int = 0


@dataclass
class _Settings:
    """What the context managers of this file set."""

    order: Callable[[int], np.ndarray] = np.arange
    listeners: list[list[Launch]] = field(default_factory=list)
    running: _Running | None = None


_SETTINGS = _Settings()


# ---------------------------------------------------------------------------------------------------------- the face


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """The interpreter is faithful inside.

    Raises (from a launch inside):
        OutOfBounds: an IndexError.
        Race: a RuntimeError.
    """
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN_TRITON:
        raise RuntimeError(
            f"the repairs of triton's interpreter are known to fit triton {' and '.join(KNOWN_TRITON)}, this is"
            f" {triton.__version__}: run test_repaired_interpreter.py with it, then add {version!r} to KNOWN_TRITON"
        )
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))  # mock cannot restore a __class__
            setattr(owner, name, value)
        yield


@contextlib.contextmanager
def program_order(order: str | int) -> Iterator[None]:
    """The programs of every launch inside run in another order, over all axes of the grid.

    Args:
        order: "forward", "reverse", or the seed of a random permutation.
    """
    orders = {"forward": np.arange, "reverse": lambda n: np.arange(n)[::-1]}
    chosen = orders[order] if isinstance(order, str) else lambda n: np.random.default_rng(order).permutation(n)
    with mock.patch.object(_SETTINGS, "order", chosen):
        yield


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The list grows by one for every launch inside."""
    launches: list[Launch] = []
    _SETTINGS.listeners.append(launches)
    try:
        yield launches
    finally:
        _SETTINGS.listeners = [listener for listener in _SETTINGS.listeners if listener is not launches]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch leaves uninitialised inside (torch.empty, empty_like, new_empty, ...) is NaN."""
    deterministic = torch.utils.deterministic
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


# ---------------------------------------------------------------------------------------------------------- bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns → float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bit patterns, to nearest, ties to even, as cvt.rn.bf16.f32 does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """Triton emits no cvt.rna for "tf32": the tensor core drops the low 13 bits."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle: Handle) -> bool:
    # A comparison's handle keeps the dtype of its operands in stock triton, with booleans as data.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Handle) -> Handle:
    return TensorHandle(_widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(handle: Handle) -> Handle:
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(_narrow(handle.data), tl.bfloat16)


# ------------------------------------------------------------------------------------------------------- the builder


class _FaithfulBuilder(InterpreterBuilder):
    """Every operation of an interpreted kernel goes through a method of this class."""

    # bfloat16: compute in float32, round the result.

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        """All casts but bitcasts and those that truncate on demand."""
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else TensorHandle(_narrow(src.data), tl.bfloat16)
        return super().cast_impl(_widened(src), dst_type)

    def get_bf16(self, value: float) -> Handle:
        """A constant; stock triton has none of this dtype."""
        return TensorHandle(_narrow(np.array([value], np.float32)), tl.bfloat16)

    def unary_op(self, arg: Handle, op: Callable[..., np.ndarray]) -> Handle:
        """Negation, square root, ..."""
        if _is_bfloat16(arg):
            return _narrowed(super().unary_op(_widened(arg), op))
        return super().unary_op(arg, op)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., np.ndarray]) -> Handle:
        """Arithmetic and comparisons."""
        if _is_bfloat16(lhs):
            return _narrowed(super().binary_op(_widened(lhs), _widened(rhs), op))
        return super().binary_op(lhs, rhs, op)

    def ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op: Callable[..., np.ndarray]) -> Handle:
        """Select and clamp; the first operand of a select is its condition."""
        if _is_bfloat16(other):
            return _narrowed(super().ternary_op(_widened(lhs), _widened(rhs), _widened(other), op))
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        """x·y + z."""
        if _is_bfloat16(z):
            return _narrowed(super().create_fma(_widened(x), _widened(y), _widened(z)))
        return super().create_fma(x, y, z)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int) -> Handle:
        """a·b + d. A product of two 16-bit operands is exact in the accumulator, a product of TF32 operands too."""
        a, b = _widened(a), _widened(b)
        if a.data.dtype == np.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(_truncate_to_tf32(operand.data), tl.float32) for operand in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    # Memory: every address is checked; a pointer remembers the storage that it was computed from.

    def create_masked_load(self, ptrs: Handle, mask: Handle, *args: Any, **kwargs: Any) -> Handle:
        """Loads with a mask; those without one arrive with a mask of ones."""
        self._check(ptrs, mask, store=False)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, *args: Any, **kwargs: Any) -> None:
        """Stores, likewise."""
        width = _width(ptrs)
        if value.data.itemsize != width:
            raise TypeError(f"a value of {value.data.dtype} stored through a pointer to {width} bytes")
        self._check(ptrs, mask, store=True)
        super().create_masked_store(ptrs, value, mask, *args, **kwargs)
        self._check_kept(ptrs, value, mask)

    def _check(self, ptrs: Handle, mask: Handle, *, store: bool) -> None:
        running = _running()
        addresses, on = np.broadcast_arrays(ptrs.data, mask.data)
        addresses = addresses[on]
        if addresses.size:
            running.memory.access(addresses, _width(ptrs), running.program, store=store, home=ptrs.attr.get("storage"))

    def _check_kept(self, ptrs: Handle, value: Handle, mask: Handle) -> None:
        """Two lanes of one store that meet at an address must agree: a GPU keeps either."""
        loaded = super().create_masked_load(ptrs, mask, value, None, None, False).data
        bits = np.dtype(f"u{loaded.dtype.itemsize}")
        lost = int((loaded.view(bits) != np.ascontiguousarray(value.data).view(bits)).sum())
        if lost:
            raise Race(f"kernel {_running().kernel}: {lost} lanes of a store lose to another lane of the same store")

    def create_addptr(self, ptr: Handle, offset: Handle) -> Handle:
        """Pointer arithmetic."""
        return _keep_storage(super().create_addptr(ptr, offset), ptr)

    def create_splat(self, ret_ty: Any, arg: Handle) -> Handle:
        """A scalar to a block."""
        return _keep_storage(super().create_splat(ret_ty, arg), arg)

    def create_broadcast(self, arg: Handle, shape: Any) -> Handle:
        """A block to a larger one."""
        return _keep_storage(super().create_broadcast(arg, shape), arg)

    def create_expand_dims(self, arg: Handle, axis: int) -> Handle:
        """x[:, None]."""
        return _keep_storage(super().create_expand_dims(arg, axis), arg)

    def create_bitcast(self, src: Handle, dst_type: Any) -> Handle:
        """A pointer to another dtype too."""
        return _keep_storage(super().create_bitcast(src, dst_type), src)

    def create_atomic_cas(self, *args: Any) -> Handle:
        """Not checked, therefore refused."""
        raise NotImplementedError("the repaired interpreter checks no atomics")

    create_atomic_rmw = create_atomic_cas

    # Programs.

    def set_grid_dim(self, *grid: int) -> None:
        """Called once per launch, when its grid is known."""
        super().set_grid_dim(*grid)
        running = _running()
        running.order = _SETTINGS.order(int(np.prod(grid)))
        for launches in _SETTINGS.listeners:
            launches.append(Launch(running.kernel, grid, running.options))

    def set_grid_idx(self, *index: int) -> None:
        """Called before each program runs: another one takes its turn."""
        running = _running()
        program = int(running.order[np.ravel_multi_index(index, self.grid_dim)])
        running.program = program + 1
        super().set_grid_idx(*(int(i) for i in np.unravel_index(program, self.grid_dim)))


def _running() -> _Running:
    assert _SETTINGS.running is not None, "an operation of the interpreter outside a launch"
    return _SETTINGS.running


def _width(ptrs: Handle) -> int:
    return interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize


def _keep_storage(result: Handle, source: Handle) -> Handle:
    if "storage" in source.attr:
        result.set_attr("storage", source.attr["storage"])
    return result


# -------------------------------------------------------------------------------------------------------- reductions


def _halving_sum(values: np.ndarray, axis: int | None, rounded: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The sum over one axis, or all, of a power of two of elements: halves are added until one is left."""
    if axis is None:
        values, axis = values.reshape(-1), 0
    while values.shape[axis] > 1:
        first, second = np.split(values, 2, axis)
        values = rounded(first + second)
    return values


class _FaithfulReduceOps(ReduceOps):
    """tl.sum adds halves, as a GPU does, and rounds after every addition, in 16 bits too.

    Stock triton adds bfloat16 bit patterns, and float32 row after row, with three times the error for 128 rows.
    """

    def sum(self, input: Any) -> Any:  # noqa: A002
        """The case of `apply_impl` that tl.sum takes."""
        data = input.handle.data
        if input.dtype == tl.bfloat16:
            total = _narrow(_halving_sum(_widen(data), self.axis, lambda values: _widen(_narrow(values))))
        elif input.dtype.is_floating():
            total = _halving_sum(data, self.axis, lambda values: values)  # numpy rounds float16 sums of two
        else:
            return super().sum(input)
        shape = np.empty(data.shape, np.bool_).sum(axis=self.axis, keepdims=self.keep_dims).shape
        return self.to_tensor(total.reshape(shape), input.dtype)


# ---------------------------------------------------------------------------------------------- launches and arguments


@dataclass(frozen=True)
class _Scalar:
    """A Python number and the type in which the launcher passes it."""

    value: float
    type_name: str


def _scalar_as_passed(value: Any, parameter: inspect.Parameter) -> Any:
    """A number with the type that its parameter is annotated with, else the launcher's choice; all else as it is."""
    described = KernelParam(0, parameter, False, False)
    if described.is_constexpr or not isinstance(value, bool | int | float):
        return value
    chosen = described.annotation_type or {bool: "u1", float: "fp32"}.get(type(value))
    return _Scalar(value, chosen) if chosen else value


_stock_implicit_cvt = interpreter._implicit_cvt


def _implicit_cvt(arg: Any) -> Any:
    """An argument as the kernel sees it."""
    if isinstance(arg, _Scalar):
        dtype = tl.str_to_ty(arg.type_name, None)
        wide = {bool: tl.int1, int: tl.int64, float: tl.float64}[type(arg.value)]
        handle = TensorHandle(np.array([arg.value]), wide)
        return tl.tensor(interpreter.interpreter_builder.cast_impl(handle, dtype), dtype)
    converted = _stock_implicit_cvt(arg)
    for tensor in tensors_among([arg]) if hasattr(arg, "data_ptr") else ():
        converted.handle.set_attr("storage", tensor.untyped_storage().data_ptr())
    return converted


_stock_run = InterpretedFunction.run


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """InterpretedFunction.run: one launch."""
    parameters = inspect.signature(self.fn).parameters
    args = tuple(map(_scalar_as_passed, args, parameters.values()))
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    kwargs = {
        name: _scalar_as_passed(value, parameters[name]) if name in parameters else value
        for name, value in kwargs.items()
    }
    memory = LaunchMemory(self.fn.__name__, tensors_among([*args, *kwargs.values()]))
    running = _Running(self.fn.__name__, options, memory)
    # A GPU computes with the garbage of masked lanes, and divides by zero, without a word.
    with mock.patch.object(_SETTINGS, "running", running), np.errstate(all="ignore"):
        try:
            _stock_run(self, *args, grid=grid, warmup=warmup, **kwargs)
        except InterpreterError as error:
            cause = _first_cause(error)
            if isinstance(cause, OutOfBounds | Race):
                raise cause from None
            raise


def _first_cause(error: BaseException) -> BaseException:
    return _first_cause(error.__cause__) if error.__cause__ else error


_stock_patch_lang_core = interpreter._patch_lang_core


def _patch_lang_core(lang: Any, scope: Any) -> None:
    """The names of triton.language, for the time of a launch."""
    _stock_patch_lang_core(lang, scope)
    scope.set_attr(lang, "range", _tensor_range)


def _tensor_range(arg1: Any, arg2: Any = None, step: Any = None, **_: Any) -> Iterator[Any]:
    """tl.range: a compiled loop's index is a tensor (n0.to(...) exists), as wide as the widest bound."""
    bounds = [0 if arg2 is None else arg1, arg1 if arg2 is None else arg2, 1 if step is None else step]
    wide = any(isinstance(bound, tl.tensor) and bound.dtype == tl.int64 for bound in bounds)
    for index in range(*map(_integer, bounds)):
        yield _implicit_cvt(_Scalar(index, "i64" if wide else "i32"))


def _integer(value: Any) -> int:
    if isinstance(value, tl.constexpr):
        value = value.value
    return int(value.handle.data.item() if isinstance(value, tl.tensor) else value)


def _replacements() -> list[tuple[Any, str, Any]]:
    """What `repaired()` sets: owner, name, value."""
    return [
        (interpreter.interpreter_builder, "__class__", _FaithfulBuilder),
        (interpreter, "ReduceOps", _FaithfulReduceOps),
        (interpreter, "_implicit_cvt", _implicit_cvt),
        (interpreter, "_patch_lang_core", _patch_lang_core),
        (InterpretedFunction, "run", _run),
    ]
