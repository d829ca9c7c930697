"""Failures that are told in one line."""

import importlib
from types import ModuleType

EXTRAS = {"pycocotools": "transfer", "datasets": "scale", "tensorboard": "scale", "tifffile": "scale", "wandb": "scale"}
LOST_WORKER = "a process that reads images has died: is there memory for --workers?"


class UsageError(Exception):
    """Something the user can mend: a flag, a folder, a missing package. The program prints it and exits with 2."""

    exit_code = 2


class Aborted(UsageError):
    """A run that had started and cannot go on. The program prints it and exits with 1."""

    exit_code = 1


class Interrupted(UsageError):
    """Ctrl-C, at once. The program prints it and exits with 130, as shells expect."""

    exit_code = 130


class Stopped(UsageError):
    """A signal that the run has obeyed. The program prints it and exits with 128 + its number, as shells expect."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(module: str, reason: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    A torchvision built for another torch fails with RuntimeError, not ImportError.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        remedy = f"pip install 'barlow-loss[{EXTRAS.get(package, 'examples')}]'"
        why = f"{reason} needs {package}, which cannot be imported ({first_line(error)})"
        raise UsageError(f"{why}: {remedy}") from None
