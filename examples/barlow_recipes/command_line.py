"""Settings of a program: a dataclass of which every field is a flag, read by tyro; the comment beside it is its help.

``--settings FILE`` takes the values of a YAML file, such as the settings.yaml of a run; flags beside it count more.
"""

import contextlib
import io
import itertools
import math
import operator
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import torch
import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from barlow_recipes import distributed
from barlow_recipes.errors import UsageError, first_line

S = TypeVar("S")


@dataclass(frozen=True)
class Bounds:
    """Of a number, in an annotation; :func:`read` refuses what lies outside or is not finite."""

    low: float
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value < (2**63 if isinstance(value, int) else math.inf)

    def __str__(self) -> str:
        return f"≥ {self.low:g}" if math.isinf(self.high) else f"from {self.low:g} to {self.high:g}"


Whole = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
Side = Annotated[int, Bounds(8)]  # in pixels
Real = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Device = torch.device | None
# Of a processor, for products of a precision, as torch.cpu.get_capabilities() names them.
INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def optional_value(kind: type, without: Any) -> PrimitiveConstructorSpec[Any]:
    """In an annotation: a flag that may lack its value, and then means ``without``."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{kind.__name__.upper()}]",
        instance_from_str=lambda values: kind(*values) if values else without,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every program that trains or evaluates can be told about its run."""

    device: Device = None  # cpu, cuda, cuda:1, ...; without it the accelerator, if there is one
    workers: Whole = field(default_factory=lambda: min(8, own_cores()))  # processes that decode for each that trains
    loader_timeout: Positive = 120  # seconds that a batch may take to be read
    seed: Whole = 0  # of weights, order and views
    out: Path | None = None  # folder for the results; without it runs/NAME, numbered if taken
    overwrite: bool = False  # replace the run in that folder
    # continue from a checkpoint; 'auto' or nothing: from the one in the output folder, if there is one
    resume: Annotated[str | None, optional_value(str, "auto")] = None


def read(kind: type[S], argv: Sequence[str] | None, description: str, default: S | None = None) -> S:
    """Read the command line, ``sys.argv`` if None; the flags that are not given are those of ``default``, if any."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    description += "\n\n--settings FILE takes the flags that are not given from a file, such as a run's settings.yaml."
    with _told_in_one_line():
        settings = tyro.cli(kind, args=with_file(argv), description=description, **given)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value, bounds = getattr(settings, name), _bounds(hint)
        values = [each for each in (value if isinstance(value, tuple) else (value,)) if each is not None]
        if any(isinstance(each, float) and not math.isfinite(each) for each in values):
            raise UsageError(f"{flag(name)} {' '.join(map(str, values))}: expected finite numbers")
        if outside := [each for each in values if bounds and each not in bounds]:
            whole = "whole " * isinstance(outside[0], int)
            raise UsageError(f"{flag(name)} {outside[0]}: expected a {whole}number {bounds}")
    return settings


def _bounds(hint: Any) -> Bounds | None:
    """Of an annotation or, of a tuple or an optional one, of what it is made of."""
    return hint if isinstance(hint, Bounds) else next(filter(None, map(_bounds, get_args(hint))), None)


def peek(kind: type[S], argv: Sequence[str] | None) -> S:
    """Read the flags of this dataclass alone, and leave the others for :func:`read`."""
    with _told_in_one_line():
        return tyro.cli(kind, args=with_file(argv), return_unknown_args=True, add_help=False)[0]


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Tyro prints a page in a frame: its first paragraph says what is wrong."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except RuntimeError as error:  # torch's, of a device
        raise UsageError(f"--device: {first_line(error)}") from None
    except SystemExit as end:
        if not end.code:  # --help
            raise
        _, *lines = (line.strip("│ ") for line in printed.getvalue().splitlines())
        texts = ["" if set(line) <= set("─╰╯-") else line for line in lines]  # without UTF-8 the title has a rule below
        paragraph = itertools.takewhile(bool, itertools.dropwhile(operator.not_, texts))
        raise UsageError(f"{' '.join(paragraph)} (--help lists the flags)") from None


def with_file(argv: Sequence[str] | None) -> list[str]:
    """The flags, those of a file before the others."""
    flags = [*(sys.argv[1:] if argv is None else argv)]
    if "--settings" not in flags:
        return flags
    place = flags.index("--settings")
    path = Path(*flags[place + 1 : place + 2])
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--settings {path}: cannot be read ({first_line(error)})") from None
    if not isinstance(values, Mapping):
        raise UsageError(f"--settings {path}: expected names and values, such as 'epochs: 100'")
    return [*as_flags(values), *flags[:place], *flags[place + 2 :]]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """What to write on a command line for these values; None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(flag(name if value else f"no_{name}"))
        elif value is not None:
            flags += [flag(name), *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def plain(settings: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass as they stand in JSON and YAML, apart from some."""
    kept = {name: value for name, value in asdict(settings).items() if name not in without}
    texts = {name: str(value) for name, value in kept.items() if isinstance(value, (Path, torch.device))}
    return kept | texts | {name: list(value) for name, value in kept.items() if isinstance(value, tuple)}


def own_cores() -> int:
    """The cores for each process that torchrun has started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def find_device(device: torch.device | None, prefer_cpu: bool = False) -> torch.device:
    """This process's device, of that kind; without one the accelerator, if there is one and no CPU is preferred."""
    if device is None:
        accelerator = None if prefer_cpu else torch.accelerator.current_accelerator(check_available=True)
        return distributed.own_device(accelerator or torch.device("cpu"))
    try:
        own = distributed.own_device(device)
        torch.zeros(1, device=own).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # each backend has its own way to say no
        raise UsageError(f"--device {device}: {first_line(error)}") from None
    return own


def best_precision(device: torch.device) -> str:
    """What --precision is when it is not given: bf16 where the hardware has it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32" if device.type == "cpu" else "bf16"


def precision_notes(device: torch.device, precision: str) -> list[str]:
    """A warning where a processor without instructions for it would compute in that precision, slower than in fp32.

    A step of a small convolutional network, on a core of an AMD EPYC: fp32 49 ms, bf16 17 ms and, kept from AVX-512 by
    ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2, 356 ms; fp16 408 and 389 ms.
    """
    wanted, found = INSTRUCTIONS.get(precision, ()), torch.cpu.get_capabilities()
    if device.type != "cpu" or not wanted or any(found.get(name) for name in wanted):
        return []
    processor = found.get("cpu_name") or found.get("architecture", "unknown")
    lacking = f"this processor ({processor}) has no instructions for it ({', '.join(wanted)})"
    return [f"--precision {precision} can be several times slower than fp32 here: {lacking}. Try --precision fp32"]
