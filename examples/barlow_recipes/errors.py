"""Failures that are told in one line."""

import importlib
from types import ModuleType

GROUPS = {
    "pycocotools": "transfer", "datasets": "scale", "tensorboard": "scale", "tifffile": "scale", "wandb": "scale",
    "lightly": "integrations",
}  # fmt: skip
LOST_WORKER = "a process that reads images has died: is there memory for --workers?"


class UsageError(Exception):
    """Something the user can mend: a flag, a folder, a missing package. The program prints it and exits with 2."""

    exit_code = 2


class Aborted(UsageError):  # a run that had started and cannot go on
    exit_code = 1


class Interrupted(UsageError):  # by Ctrl-C, at once
    exit_code = 130


class Stopped(UsageError):  # by a signal that the run has obeyed
    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(module: str, reason: str) -> ModuleType:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another torch
        package = module.partition(".")[0]
        group = GROUPS.get(package, "examples")
        remedy = f"pip install --group {group} in a clone of barlow-loss, with pip 25.1 or newer"
        why = f"{reason} needs {package}, which cannot be imported ({first_line(error)})"
        raise UsageError(f"{why}: {remedy}") from None
