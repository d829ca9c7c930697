"""A GPU that is not there: triton's real launch code on CPU tensors, every launch recorded, none executed.

Python arguments are specialised and the kernel is compiled as on the chip itself, so that a test can count launches and
compilations, and sees a launch that the chip would refuse for its shared memory.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import triton
from chips import Chip

KNOWN_TRITON = ("3.6", "3.8")
_NUMBERS = itertools.count()


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: its name.
        grid: on three axes.
        num_warps: the launch option.
        num_stages: the launch option.
        shared: bytes of shared memory; 0 where nothing was compiled.
        specialization: equal for launches that share their machine code, see `Specialization`.
        arguments: by name, constexprs too.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared: int
    specialization: "Specialization"
    arguments: Mapping[str, Any]


class Specialization(NamedTuple):
    """What one compilation is for: the kernel, each argument's type with its attributes or value, the options."""

    kernel: str
    arguments: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


class PretendedGpu:
    """The active driver of triton while `pretended()` is open: what it was asked to compile and to launch."""

    def __init__(self, chip: Chip, compile_kernel: Callable[..., Any] | None) -> None:
        self.chip = chip
        self.launches: list[Launch] = []
        self.compilations: list[Specialization] = []
        self.utils = self  # load_binary and get_device_properties
        # A device that no other driver has: triton keeps kernels and properties by device, and never sees these again.
        self._device = f"pretended {chip.name}, number {next(_NUMBERS)}"
        self._compile = compile_kernel
        self._kernels: list[Any] = []

    def count(self, kernel: str) -> int:
        """How many launches of a kernel there were."""
        return sum(launch.kernel == kernel for launch in self.launches)

    def compile(self, source: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Any:
        """triton.compile: records the specialisation."""
        self._kernels.append(source.fn)
        self.compilations.append(_specialization(source, options))
        if self._compile is None:
            return _Uncompiled(self, source, options)
        return self._compile(source, target=target, options=options, **kwargs)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches a compiled kernel: here it records."""
        specialization = _specialization(source, metadata._asdict())

        def launch(x: int, y: int, z: int, *args: Any) -> None:
            # stream, function, packed metadata, launch metadata, two hooks; then the kernel's arguments
            for hook in args[4:6]:
                if hook is not None and args[3] is not None:
                    hook(args[3])
            arguments = dict(zip(source.fn.arg_names, args[6:], strict=True))
            options = metadata.num_warps, metadata.num_stages, metadata.shared
            self.launches.append(Launch(source.fn.__name__, (x, y, z), *options, specialization, arguments))

        return launch

    def close(self) -> None:
        """Takes this device out of every kernel that was launched on it."""
        for kernel in self._kernels:
            kernel.device_caches.pop(self._device, None)
            kernel.compile = triton.compiler.compile

    # What triton asks of a driver and of its utilities.

    def get_current_target(self) -> Any:
        return self.chip.target

    def get_current_device(self) -> str:
        return self._device

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        warp = self.chip.target.warp_size
        return {"max_shared_mem": self.chip.shared, "multiprocessor_count": 132, "warpSize": warp}

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        """Module, function, registers, spills, threads. No module: nothing to unload when the kernel is collected."""
        return None, 1, 0, 0, 1024


class _Uncompiled:
    """In place of a CompiledKernel, for tests that only count."""

    function = packed_metadata = None

    def __init__(self, gpu: PretendedGpu, source: Any, options: Mapping[str, Any]) -> None:
        metadata = _Metadata(options["num_warps"], options["num_stages"], 0, options["enable_fp_fusion"])
        self.run = gpu.launcher_cls(source, metadata)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.run(*grid, 0, None, None, None, None, None, *args)


class _Metadata(NamedTuple):
    num_warps: int
    num_stages: int
    shared: int
    enable_fp_fusion: bool


def _specialization(source: Any, options: Mapping[str, Any]) -> Specialization:
    arguments = []
    for position, (name, kind) in enumerate(source.signature.items()):
        attributes = source.attrs.get((position,), [])
        value = f"={source.constants[position,]}" if kind == "constexpr" else f":{kind}"
        arguments.append(f"{name}{value}{''.join(f' {key}={attribute}' for key, attribute in attributes)}")
    kept = tuple((key, options[key]) for key in ("num_warps", "num_stages", "enable_fp_fusion"))
    return Specialization(source.fn.__name__, tuple(arguments), kept)


@contextlib.contextmanager
def pretended(chip: Chip, *, compiled: bool = False) -> Iterator[PretendedGpu]:
    """Launches inside go to a chip that is not there.

    Args:
        chip: one of chips.CHIPS.
        compiled: whether kernels are compiled to machine code, which takes seconds; else launches are only recorded.

    Raises (from a launch inside):
        OutOfResources: the machine code needs more shared memory than the chip has. Only where `compiled`.
    """
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN_TRITON:
        raise RuntimeError(
            f"the pretended GPU is known to fit triton {' and '.join(KNOWN_TRITON)}, this is {triton.__version__}:"
            f" run test_tools.py with it, then add {version!r} to KNOWN_TRITON"
        )
    gpu = PretendedGpu(chip, triton.compiler.compile if compiled else None)
    with (
        contextlib.closing(gpu),
        mock.patch.object(triton.runtime.driver, "_active", gpu),
        mock.patch.object(triton.compiler, "compile", gpu.compile),
    ):
        yield gpu
