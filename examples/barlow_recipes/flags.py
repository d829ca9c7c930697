"""What the command lines of the example's programs have in common: how a flag is read and checked."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from barlow_recipes import distributed
from barlow_recipes.errors import UsageError, first_line

YES_OR_NO = argparse.BooleanOptionalAction


class Flags(argparse.ArgumentParser):
    """A parser that raises UsageError, and whose help shows what a flag is without it."""

    def __init__(self, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")

    def add(self, flag: str, convert: Callable[[str], Any], text: str, **options: Any) -> None:
        """A flag with a value."""
        name = flag[2:].replace("-", "_")
        text += " [%(default)s]" if options.get("default") is not None else ""
        self.add_argument(flag, type=convert, help=text, metavar=options.pop("metavar", name.upper()), **options)

    def switch(self, flag: str, text: str) -> None:
        """A flag without a value."""
        self.add_argument(flag, action="store_true", help=text)


def at_least(low: float, kind: Callable[[str], float], text: str) -> float:
    """Read a number that is finite and not less than ``low``; with ``functools.partial`` the type of a flag."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < (2**63 if kind is int else math.inf):
        raise argparse.ArgumentTypeError(f"expected a {'whole ' * (kind is int)}number ≥ {low:g}, got {text}")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    value = at_least(0.0, float, text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def own_cores() -> int:
    """The cores for each process that torchrun has started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def find_device(name: str | None, prefer_cpu: bool = False) -> torch.device:
    """The device called ``name``, or without a name the accelerator, if there is one and the CPU is not preferred.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    if name is None:
        accelerator = None if prefer_cpu else torch.accelerator.current_accelerator(check_available=True)
        return distributed.own_device(accelerator or torch.device("cpu"))
    try:
        device = distributed.own_device(torch.device(name))
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # each backend has its own way to say no
        raise UsageError(f"--device {name}: {first_line(error)}") from None
    return device


def best_precision(device: torch.device) -> str:
    """What --precision is when it is not given: bf16 where the hardware has it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32" if device.type == "cpu" else "bf16"
