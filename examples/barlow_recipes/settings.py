"""What a pretraining run can be told: every flag, with its default as published, and what is checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from barlow_recipes import distributed
from barlow_recipes.command_line import (
    Bounds,
    Device,
    Positive,
    Real,
    RunSettings,
    Share,
    Side,
    best_precision,
    find_device,
    optional_value,
    peek,
    plain,
    read,
)
from barlow_recipes.errors import UsageError
from barlow_recipes.fashion_mnist import is_fashion_mnist
from barlow_recipes.models import parse_projector
from barlow_recipes.optimization import published_learning_rate
from barlow_recipes.pixels import PixelSettings
from barlow_recipes.presets import LEARNING_RATE_BIASES, PRESETS, WEIGHT_DECAY
from barlow_recipes.views import PAPER as PUBLISHED_VIEWS
from barlow_recipes.views import ViewRecipe

# What may differ between a run and its continuation: where it runs, what it writes. Everything else shapes the weights.
FREE = {
    "preset", "data", "device", "backend", "workers", "loader_timeout", "channels_last", "compile", "tensorboard",
    "wandb", "checkpoint_activations", "deterministic", "probe_every", "log_every", "report_every", "save_every",
    "profile", "out", "overwrite", "resume", "limit_steps", "evaluation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to learn from."""

    data: str | None = None
    """folder of images, with or without class folders; list or CSV of them; webdataset shards; a data set of
    Hugging Face on disk; module:callable; or 'fashion-mnist'. Without it: digits"""
    preset: str = "one-gpu"
    "whose numbers the other flags begin with; without it that of --data"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What learns."""

    arch: str = "resnet50"
    "encoder: a classifier of torchvision, timm/NAME, module:callable, or small-cnn"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    "first layers of a ResNet: cifar is for images of 32 pixels"
    projector: str = "8192-8192-8192"
    "widths of the projector's layers"
    init: Path | None = None
    "file of weights to begin with: encoder and, if the file has one that fits, projector"
    init_strict: bool = False
    "the file must have a projector that fits"
    freeze: tuple[str, ...] = ()
    "parts of the encoder that do not learn, by their names, such as conv1 layer1; or all"


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What the two views of an image are."""

    image_size: Side = 224
    "side of a view in pixels"
    crop_scale: Share = 0.08
    "least area of a view's crop, as a share of the image"
    color_jitter: tuple[Share, Share, Share, Share] = (0.4, 0.4, 0.2, 0.1)
    "greatest change of brightness, contrast, saturation and hue"
    grayscale: Share = 0.2
    "probability in either view"
    blur: tuple[Share, Share] = (1.0, 0.1)
    "probability in view 1 and in view 2"
    solarize: tuple[Share, Share] = (0.0, 0.2)
    "probability in view 1 and in view 2"
    augment_on: Literal["workers", "device"] = "workers"
    "device: colours, blur and solarization in batches, there"

    def recipes(self) -> tuple[ViewRecipe, ViewRecipe]:
        """What makes view 1 and view 2: as published, but for the flags."""
        both = {"crop_scale": (self.crop_scale, 1.0), "color_jitter": self.color_jitter, "grayscale": self.grayscale}
        each = zip(PUBLISHED_VIEWS, self.blur, self.solarize, strict=True)
        first, second = (replace(recipe, **both, blur=blur, solarize=solarize) for recipe, blur, solarize in each)
        return first, second


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How it learns."""

    batch_size: Annotated[int, Bounds(2)] = 2048
    "pairs in a step, of all processes together"
    accumulate: Positive = 1
    """add up the gradients of so many parts of the batch. It saves memory, but each part has a cross-correlation
    of its own: not the loss of the large batch, which --chunk-size gives"""
    chunk_size: Positive | None = None
    """images that pass through the encoder together; the rest of the memory of a step is that of their features.
    Batch norms of the encoder see one chunk; the projector and the loss see the whole batch"""
    epochs: Positive = 1000
    "passes over the images"
    warmup_epochs: Real = 10.0
    "linear warm-up; without it at most a tenth of the run"
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    learning_rate_weights: Real = 0.2
    "of matrices and kernels, per 256 pairs"
    learning_rate_biases: Real = LEARNING_RATE_BIASES
    "of biases and norms, per 256 pairs"
    weight_decay: Real = WEIGHT_DECAY
    "of matrices and kernels"
    trust_coefficient: Real = 0.001
    "of LARS"
    clip_trust: bool = False
    "no LARS step longer than a plain one"
    lambd: Real = 0.0051
    "λ, the weight of the off-diagonal sum"
    scale_loss: Real = 1.0
    "factor of the loss that is differentiated"


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """With which means."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    "fp32, or autocast to bf16 or fp16; without it bf16 on an accelerator that has it"
    channels_last: bool = False
    "memory layout of images; without it on a GPU"
    backend: Literal["auto", "eager", "triton"] = "auto"
    "of the loss"
    compile: bool = False
    "torch.compile the network"
    checkpoint_activations: bool = False
    "compute residual blocks again in the backward: less memory, a third more time"
    deterministic: bool = False
    "the same bits from the same command on a GPU too, at some cost"


@dataclass(frozen=True, kw_only=True)
class LookSettings:
    """What is measured and kept on the way."""

    probe: bool = True
    "hold images out, to look at while training"
    probe_every: Positive = 10
    "epochs from one look at held-out training images to the next"
    evaluation: bool = True
    "measure at the end what the encoder is worth"
    log_every: Positive = 10
    "steps from one row of metrics.jsonl to the next"
    report_every: Positive = 100
    "steps from one collapse report to the next"
    save_every: Positive | None = None
    "steps between checkpoints, beside one after each epoch"
    tensorboard: bool = False
    "write event files, too"
    wandb: bool = False
    "log to Weights & Biases, too"
    profile: Annotated[int | None, optional_value(int, 50), Bounds(1)] = None
    "time the parts of so many steps; 50 without a number"
    limit_steps: Positive | None = None
    "stop after so many steps of the run"


@dataclass(frozen=True, kw_only=True)
class Settings(
    RunSettings,
    LookSettings,
    HardwareSettings,
    OptimizationSettings,
    ViewSettings,
    PixelSettings,
    ModelSettings,
    DataSettings,
):
    """The flags, complete."""

    @property
    def micro_batch_size(self) -> int:
        """Pairs that pass through the network together."""
        return self.batch_size // self.accumulate

    def shaping(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint."""
        return plain(self, without=FREE)


@dataclass(frozen=True, kw_only=True)
class First:
    """The flags on which the defaults of others depend."""

    data: str | None = None
    preset: str | None = None
    device: Device = None
    batch_size: int = 0  # not given
    epochs: int = 0


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None), begin with the preset, check what can be checked without data.

    Raises:
        UsageError: a flag is unknown or has a bad value.
    """
    first = peek(First, argv)
    small = "digits" if first.data is None else "fashion-mnist" if is_fashion_mnist(first.data) else None
    default = _defaults(first, first.preset or small or "one-gpu", prefer_cpu=small is not None)
    settings = read(Settings, argv, description, default)
    _check(settings)
    mean, std = settings.statistics()
    return replace(settings, device=default.device, mean=mean, std=std)


def _defaults(first: First, name: str, *, prefer_cpu: bool) -> Settings:
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    device = find_device(first.device, prefer_cpu=prefer_cpu)
    numbers = {"channels_last": device.type == "cuda", "precision": best_precision(device)} | PRESETS[name]
    if PRESETS[name].get("arch") == "digits-cnn":
        numbers |= {"channels": 1}
    numbers |= {key: value for key in ("batch_size", "epochs") if (value := getattr(first, key))}
    default = Settings(preset=name, device=device, **numbers)
    if name == "one-gpu":
        default = replace(default, learning_rate_weights=published_learning_rate(max(1, default.batch_size)))
    return replace(default, warmup_epochs=min(default.warmup_epochs, default.epochs / 10))


def _check(settings: Settings) -> None:
    if not settings.warmup_epochs < settings.epochs:
        raise UsageError(f"--warmup-epochs {settings.warmup_epochs:g}: expected less than --epochs {settings.epochs}")
    if settings.color_jitter[3] > 0.5:
        raise UsageError(
            f"--color-jitter: expected a hue of at most 0.5, half a turn, got {settings.color_jitter[3]:g}"
        )
    if settings.data is None and settings.preset != "digits":
        raise UsageError(f"--preset {settings.preset}: expected --data, whose images it is for")
    if settings.init_strict and not settings.init:
        raise UsageError("--init-strict: expected --init, the file that must have a projector that fits")
    if settings.compile and (settings.checkpoint_activations or settings.chunk_size):
        other = "checkpoint-activations" if settings.checkpoint_activations else "chunk-size"
        raise UsageError(f"--compile: expected it without --{other}, which torch.compile cannot trace")
    if (settings.arch == "digits-cnn") != (settings.data is None):
        raise UsageError(f"--arch {settings.arch}: digits-cnn goes with the digits, every other encoder with --data")
    pairs, rest = divmod(settings.batch_size, settings.accumulate)
    if rest:
        raise UsageError(
            f"--accumulate {settings.accumulate}: expected a divisor of --batch-size {settings.batch_size}"
        )
    if pairs < (least := max(2, distributed.world_size())):
        needed = least * settings.accumulate
        raise UsageError(f"--batch-size {settings.batch_size}: expected {needed} or more, a pair for each process")
    settings.check_pixels()
    parse_projector(settings.projector)
