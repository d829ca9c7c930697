"""The command line: one set of flags, two sets of defaults."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import distributed
from .errors import UsageError, first_line
from .models import DIGITS_ARCH, parse_projector
from .optimization import OPTIMIZERS, published_learning_rate

DIGITS: dict[str, Any] = {
    "arch": DIGITS_ARCH,
    "projector": "512-512",
    "batch_size": 128,
    "epochs": 60,
    "optimizer": "adamw",
    "learning_rate_weights": 4e-3,
    "learning_rate_biases": 4e-3,
    "weight_decay": 1e-4,
    "knn_every": 5,
}
FOLDER: dict[str, Any] = {
    "arch": "resnet50",
    "projector": "8192-8192-8192",
    "batch_size": 256,
    "epochs": 300,
    "optimizer": "lars",
    "learning_rate_weights": "the author's for the batch size",
    "learning_rate_biases": 0.0048,
    "weight_decay": 1e-6,
    "knn_every": 1,
}
# What may differ between a run and its continuation. Everything else shapes the weights.
FREE = {"data", "knn_every", "device", "workers", "out", "overwrite", "resume", "limit_steps"}


@dataclass(frozen=True)
class Settings:
    """The flags, complete."""

    data: Path | None
    arch: str
    projector: str
    image_size: int
    batch_size: int
    epochs: int
    warmup_epochs: float
    optimizer: str
    learning_rate_weights: float
    learning_rate_biases: float
    weight_decay: float
    lambd: float
    knn: bool
    knn_every: int
    device: torch.device
    precision: str
    workers: int
    seed: int
    out: Path | None
    overwrite: bool
    resume: str | None
    limit_steps: int | None

    def shaping(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


def _at_least(low: float, kind: Callable[[str], float], text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < (2**63 if kind is int else math.inf):
        raise argparse.ArgumentTypeError(f"expected a {'whole ' * (kind is int)}number ≥ {low:g}, got {text}")
    return value


def _parser(description: str) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=layout, allow_abbrev=False)

    def add(flag: str, convert: Callable[[str], Any], text: str, **options: Any) -> None:
        name = flag[2:].replace("-", "_")
        if name in DIGITS:
            text += f" [{DIGITS[name]}; with --data: {FOLDER[name]}]"
        elif options.get("default") is not None:
            text += " [%(default)s]"
        parser.add_argument(flag, type=convert, help=text, metavar=options.pop("metavar", name.upper()), **options)

    whole, positive = partial(_at_least, 0, int), partial(_at_least, 1, int)
    real = partial(_at_least, 0.0, float)
    cores = os.cpu_count() or 1
    add("--data", Path, "folder of class folders of images, or one with train/ above them; without it: digits")
    add("--arch", str, "encoder, with --data: a ResNet of torchvision")
    add("--projector", str, "widths of the projector's layers")
    add("--image-size", partial(_at_least, 16, int), "side of a view in pixels, with --data", default=224)
    add("--batch-size", partial(_at_least, 2, int), "pairs in a step, of all processes together")
    add("--epochs", positive, "passes over the images")
    add("--warmup-epochs", real, "linear warm-up [10, or a tenth of the run if that is less]")
    add("--optimizer", str, " or ".join(OPTIMIZERS))
    add("--learning-rate-weights", real, "of matrices and kernels, per 256 pairs", metavar="LR")
    add("--learning-rate-biases", real, "of biases and norms, per 256 pairs", metavar="LR")
    add("--weight-decay", real, "of matrices and kernels")
    add("--lambd", real, "λ, the weight of the off-diagonal sum", default=0.0051)
    add("--knn-every", positive, "epochs from one look at held-out images to the next", metavar="EPOCHS")
    parser.add_argument("--no-knn", dest="knn", action="store_false", help="hold no images out for it")
    add("--device", str, "cpu, cuda, cuda:1, ... [cpu; with --data: the accelerator, if there is one]")
    add("--precision", str, "fp32, or bf16 autocast [bf16 on an accelerator that has it]")
    add("--workers", whole, "processes that decode for each that trains, with --data", default=min(8, cores))
    add("--seed", whole, "of weights, order and views", default=0)
    add("--out", Path, "folder for the results [runs/NAME, numbered if taken]")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    resuming = "continue from a checkpoint; 'auto' or nothing: from the one in the output folder, if there is one"
    add("--resume", str, resuming, nargs="?", const="auto", metavar="PATH")
    add("--limit-steps", positive, "stop after this many steps of the run", metavar="STEPS")
    return parser


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None), fill in the defaults, check what can be checked without data.

    Raises:
        UsageError: a flag is unknown or has a bad value.
    """
    flags = vars(_parser(description).parse_args(argv))
    for name, default in (DIGITS if flags["data"] is None else FOLDER).items():
        flags[name] = default if flags[name] is None else flags[name]
    if isinstance(flags["learning_rate_weights"], str):
        flags["learning_rate_weights"] = published_learning_rate(flags["batch_size"])
    if flags["warmup_epochs"] is None:
        flags["warmup_epochs"] = min(10.0, flags["epochs"] / 10)
    if (flags["arch"] == DIGITS_ARCH) != (flags["data"] is None):
        raise UsageError(f"--arch {flags['arch']}: {DIGITS_ARCH} goes with the digits, a ResNet with --data")
    if flags["batch_size"] < (processes := distributed.world_size()):
        raise UsageError(f"--batch-size {flags['batch_size']}: expected {processes} or more, a pair for each process")
    parse_projector(flags["projector"])
    flags["device"] = _device(flags["device"], prefer_cpu=flags["data"] is None)
    flags["precision"] = flags["precision"] or _precision(flags["device"])
    for name, known in (("optimizer", tuple(OPTIMIZERS)), ("precision", ("fp32", "bf16"))):
        if flags[name] not in known:
            raise UsageError(f"--{name} {flags[name]}: expected {' or '.join(known)}")
    return Settings(**{field.name: flags[field.name] for field in fields(Settings)})


def _device(name: str | None, prefer_cpu: bool) -> torch.device:
    if name is None:
        accelerator = None if prefer_cpu else torch.accelerator.current_accelerator(check_available=True)
        return distributed.own_device(accelerator or torch.device("cpu"))
    try:
        device = distributed.own_device(torch.device(name))
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # each backend has its own way to say no
        raise UsageError(f"--device {name}: {first_line(error)}") from None
    return device


def _precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32" if device.type == "cpu" else "bf16"
