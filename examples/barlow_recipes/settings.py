"""What a pretraining run can be told: every flag, with its default as published; presets; what is checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from barlow_recipes import command_line, distributed
from barlow_recipes.command_line import Bounds, Device, Positive, Real, RunSettings, Share, Side, Whole
from barlow_recipes.errors import UsageError
from barlow_recipes.fashion_mnist import is_fashion_mnist
from barlow_recipes.models import parse_projector
from barlow_recipes.optimization import LEARNING_RATE_BIASES, WEIGHT_DECAY, published_learning_rate
from barlow_recipes.pixels import PixelSettings
from barlow_recipes.views import PAPER, ViewRecipe

# What may differ between a run and its continuation: where it runs, what it writes. Everything else shapes the weights.
MAY_CHANGE = {
    "preset", "data", "device", "backend", "workers", "loader_timeout", "channels_last", "compile", "tensorboard",
    "wandb", "deterministic", "probe_every", "log_every", "save_every",
    "profile", "out", "overwrite", "resume", "limit_steps", "evaluation", "show_settings",
}  # fmt: skip
# What the digits do without: they are grey, 8 pixels wide, and have changes of their own.
OF_LARGER_IMAGES = (
    "image_size", "stem", "channels", "value_range", "mean", "std", "crop_scale", "color_jitter", "grayscale", "blur",
    "solarize", "local_crop_scale", "augment_on",
)  # fmt: skip
BEFORE_MORE_VIEWS = {"views": 2, "local_crops": 0}  # what older checkpoints lack
WORLD_SIZE_OF_THE_OFFICIAL_RUN = 16  # V100s, says its README; the paper says 32


def official(world_size: int) -> dict[str, Any]:
    """The settings that give, with exact gradients, the updates of the official program on W processes.

    It sums C over the processes without differentiating the sum, and DistributedDataParallel then takes the mean, so
    its gradient is g/W, where g is the true one. A vector (a bias, a norm's parameter) moves as with g and a learning
    rate W times smaller. A matrix takes the same step for d = g/W + βp = (g + Wβp)/W as for W·d = g + Wβp, since its
    length does not depend on the scale of d: only the weight decay's share counts, W times the written one.
    """
    return {"learning_rate_biases": LEARNING_RATE_BIASES / world_size, "weight_decay": WEIGHT_DECAY * world_size}


# The flags that differ from the defaults below, which are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "arch": "digits-cnn", "projector": "512-512", "image_size": 8, "local_size": 6, "batch_size": 128, "epochs": 60,
        "optimizer": "adamw", "learning_rate_weights": 4e-3, "learning_rate_biases": 4e-3, "weight_decay": 1e-4,
        "channels": 1, "probe_every": 5,
    },
    "fashion-mnist": {
        "arch": "small-cnn", "projector": "512-512", "image_size": 28, "local_size": 20, "batch_size": 256, "epochs": 5,
        "optimizer": "adamw", "learning_rate_weights": 2e-3, "learning_rate_biases": 2e-3, "weight_decay": 1e-4,
        "crop_scale": 0.3, "color_jitter": (0.8, 0.8, 0.8, 0.4),  # colours mean nothing there
        "blur": (0.0, 0.0), "channels_last": True, "probe_every": 2,
        "local_crop_scale": (0.1, 0.4),  # 5 % are six pixels: 59.7 % by a linear probe after an epoch, so 62.4 %
    },
    # One GPU: the published recipe with the author's learning rate for a small batch (70.7 % after 300 epochs).
    "one-gpu": {"batch_size": 256, "epochs": 300},  # and the weights' learning rate by the batch size
    "paper": {},
    "official-16": official(WORLD_SIZE_OF_THE_OFFICIAL_RUN),
    # 32-pixel images, the numbers of solo-learn's CIFAR runs: 92.10 % on CIFAR-10, 70.90 % on CIFAR-100 (online).
    "cifar": {
        "arch": "resnet18", "stem": "cifar", "projector": "2048-2048-2048", "image_size": 32, "batch_size": 256,
        "learning_rate_weights": 0.3, "learning_rate_biases": 0.3, "weight_decay": 1e-4, "trust_coefficient": 0.02,
        "clip_trust": True, "scale_loss": 0.1, "blur": (0.0, 0.0),
    },
    # The same images with SGD at the rates of lightly's CIFAR benchmark, where vectors decay as well: 84.2 % by nearest
    # neighbours after 200 epochs.
    "cifar-sgd": {
        "arch": "resnet18", "stem": "cifar", "projector": "2048-2048-2048", "image_size": 32, "batch_size": 128,
        "epochs": 200, "warmup_epochs": 0.0, "optimizer": "sgd", "learning_rate_weights": 0.12,
        "learning_rate_biases": 0.12, "weight_decay": 5e-4, "blur": (0.0, 0.0),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings, PixelSettings):
    # folder of images, with or without class folders; list or CSV of them; webdataset shards; a data set of Hugging
    # Face on disk; module:callable; or 'fashion-mnist'. Without it: digits
    data: str | None = None
    preset: str = "one-gpu"  # whose numbers the other flags begin with; without it that of --data

    arch: str = "resnet50"  # encoder: a classifier of torchvision, timm/NAME, module:callable, or small-cnn
    stem: Literal["imagenet", "cifar"] = "imagenet"  # first layers of a ResNet: cifar is for images of 32 pixels
    projector: str = "8192-8192-8192"  # widths of the projector's layers
    init: Path | None = None  # file of weights to begin with: encoder and, if the file has one that fits, projector
    init_strict: bool = False  # the file must have a projector that fits
    freeze: tuple[str, ...] = ()  # parts of the encoder that do not learn, by their names, such as conv1 layer1; or all

    image_size: Side = 224  # side of a view in pixels
    views: Annotated[int, Bounds(2)] = 2  # of each image; the paper's two recipes take turns
    local_crops: Whole = 0  # small views beside them, compared with those but not with each other
    local_size: Positive = 96  # side of a local crop in pixels
    # area of a local crop, as a share of the image. Source: DINO (arXiv 2104.14294), the default of its main_dino.py
    local_crop_scale: tuple[Share, Share] = (0.05, 0.4)
    crop_scale: Share = 0.08  # least area of a view's crop, as a share of the image
    # greatest change of brightness, contrast, saturation and hue
    color_jitter: tuple[Share, Share, Share, Share] = (0.4, 0.4, 0.2, 0.1)
    grayscale: Share = 0.2  # probability in either view
    blur: tuple[Share, Share] = (1.0, 0.1)  # probability in view 1 and in view 2
    solarize: tuple[Share, Share] = (0.0, 0.2)  # probability in view 1 and in view 2
    augment_on: Literal["workers", "device"] = "workers"  # device: colours, blur and solarization in batches, there

    batch_size: Annotated[int, Bounds(2)] = 2048  # images in a step, of all processes together
    # add up the gradients of so many parts of the batch. Each has a cross-correlation of its own: not the loss of the
    # large batch, which --chunk-size gives
    accumulate: Positive = 1
    # images that pass through the encoder together; the rest of the memory of a step is that of their features. Batch
    # norms of the encoder see one chunk; the projector and the loss see the whole batch
    chunk_size: Positive | None = None
    epochs: Positive = 1000  # passes over the images
    warmup_epochs: Real = 10.0  # linear warm-up; without it at most a tenth of the run
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    learning_rate_weights: Real = 0.2  # of matrices and kernels, per 256 pairs
    learning_rate_biases: Real = LEARNING_RATE_BIASES  # of biases and norms, per 256 pairs
    weight_decay: Real = WEIGHT_DECAY  # of matrices and kernels
    trust_coefficient: Real = 0.001  # of LARS
    clip_trust: bool = False  # no LARS step longer than a plain one
    lambd: Real = 0.0051  # λ, the weight of the off-diagonal sum
    scale_loss: Real = 1.0  # factor of the loss that is differentiated

    # fp32, or autocast to bf16 or fp16; without it bf16 on an accelerator that has it
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False  # memory layout of images; without it on a GPU
    backend: Literal["auto", "eager", "triton"] = "auto"  # of the loss
    compile: bool = False  # torch.compile the network
    deterministic: bool = False  # the same bits from the same command on a GPU too, at some cost

    probe: bool = True  # hold images out, to look at while training
    probe_every: Positive = 10  # epochs from one look at held-out training images to the next
    evaluation: bool = True  # measure at the end what the encoder is worth
    log_every: Positive = 10  # steps from one row of metrics.jsonl to the next
    save_every: Positive | None = None  # steps between checkpoints, beside one after each epoch
    tensorboard: bool = False  # log to TensorBoard, too: tensorboard --logdir OUT shows it
    wandb: bool = False  # log to Weights & Biases, too
    profile: bool = False  # time the parts of the steps, and wait for the device to do so
    limit_steps: Positive | None = None  # stop after so many steps of the run
    show_settings: bool = False  # print all settings, as --settings FILE takes them, and stop

    @property
    def micro_batch_size(self) -> int:
        """Images of which the views are compared with each other."""
        return self.batch_size // self.accumulate

    def recipes(self) -> tuple[ViewRecipe, ...]:
        """What makes each view, local crops last: the published two in turns, but for the flags."""
        both = {"crop_scale": (self.crop_scale, 1.0), "color_jitter": self.color_jitter, "grayscale": self.grayscale}
        each = zip(PAPER, self.blur, self.solarize, strict=True)
        two = [replace(recipe, **both, blur=blur, solarize=solarize) for recipe, blur, solarize in each]
        local = [replace(recipe, crop_scale=self.local_crop_scale, size=self.local_size) for recipe in two]
        return (*islice(cycle(two), self.views), *islice(cycle(local), self.local_crops))

    def pair_weights(self) -> list[list[float]] | None:
        """Of the loss: 0 for two local crops, 1 for every other pair; None without local crops."""
        numbers = range(self.views + self.local_crops)
        rows = [[float(i != j and min(i, j) < self.views) for j in numbers] for i in numbers]
        return rows if self.local_crops else None

    def must_match(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint."""
        unused = {} if self.local_crops else {"local_size": None, "local_crop_scale": None}
        return command_line.plain(self, without=MAY_CHANGE) | unused

    def without_effect(self) -> dict[str, str]:
        """The fields that change nothing beside the others, and why."""
        found: dict[str, str] = {}
        if not self.local_crops:
            found |= dict.fromkeys(("local_size", "local_crop_scale"), "without --local-crops")
        if self.optimizer != "lars":
            found |= dict.fromkeys(("trust_coefficient", "clip_trust"), f"with --optimizer {self.optimizer}")
        if self.data is None:
            found |= dict.fromkeys(OF_LARGER_IMAGES, "on the digits; give --data")
        return found

    def check(self) -> None:
        self.check_pixels()
        parse_projector(self.projector)
        if not self.warmup_epochs < self.epochs:
            raise UsageError(f"--warmup-epochs {self.warmup_epochs:g}: expected less than --epochs {self.epochs}")
        if self.local_crops and self.local_size > self.image_size:
            raise UsageError(f"--local-size {self.local_size}: expected at most --image-size {self.image_size}")
        if self.local_crop_scale[0] > self.local_crop_scale[1]:
            low, high = self.local_crop_scale
            raise UsageError(f"--local-crop-scale {low:g} {high:g}: expected the lower share first")
        if self.init_strict and not self.init:
            raise UsageError("--init-strict: expected --init, the file that must have a projector that fits")
        if self.compile and self.chunk_size:
            raise UsageError("--compile: expected it without --chunk-size, which torch.compile cannot trace")
        if (self.arch == "digits-cnn") != (self.data is None):
            raise UsageError(f"--arch {self.arch}: digits-cnn goes with the digits, every other encoder with --data")
        if self.batch_size % self.accumulate:
            raise UsageError(f"--accumulate {self.accumulate}: expected a divisor of --batch-size {self.batch_size}")
        if self.batch_size < (least := self.accumulate * max(2, distributed.world_size())):
            raise UsageError(f"--batch-size {self.batch_size}: expected {least} or more, an image for each process")


@dataclass(frozen=True, kw_only=True)
class First:  # the flags on which the defaults of others depend
    data: str | None = None
    preset: str | None = None
    device: Device = None
    batch_size: int = 0  # not given
    epochs: int = 0


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None), begin with the preset, check what can be checked without data."""
    first = command_line.peek(First, argv)
    small = "digits" if first.data is None else "fashion-mnist" if is_fashion_mnist(first.data) else None
    name = first.preset or small or "one-gpu"
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    device = command_line.find_device(first.device, prefer_cpu=small is not None)
    usual = {"channels_last": device.type == "cuda", "precision": command_line.best_precision(device)}
    given = {key: value for key in ("batch_size", "epochs") if (value := getattr(first, key))}
    default = Settings(preset=name, device=device, **(usual | PRESETS[name] | given))
    if name == "one-gpu":
        default = replace(default, learning_rate_weights=published_learning_rate(max(1, default.batch_size)))
    default = replace(default, warmup_epochs=min(default.warmup_epochs, default.epochs / 10))
    settings = command_line.read(Settings, argv, description, default)
    settings.check()
    for field, reason in settings.without_effect().items():
        if getattr(settings, field) != getattr(default, field):
            raise UsageError(f"{command_line.flag(field)}: expected it to be left out, it changes nothing {reason}")
    mean, std = settings.statistics()
    return replace(settings, device=device, mean=mean, std=std)
