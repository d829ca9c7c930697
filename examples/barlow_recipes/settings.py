"""The command line: every flag, and what it checks."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from barlow_recipes import distributed
from barlow_recipes.augmentations import PAPER as PUBLISHED_VIEWS
from barlow_recipes.augmentations import ViewRecipe
from barlow_recipes.encoders import STEMS
from barlow_recipes.errors import UsageError
from barlow_recipes.fashion_mnist import is_fashion_mnist
from barlow_recipes.flags import YES_OR_NO, Flags, at_least, best_precision, find_device, own_cores, share
from barlow_recipes.models import parse_projector
from barlow_recipes.optimization import OPTIMIZERS, published_learning_rate
from barlow_recipes.presets import PAPER, PRESETS, preset

CHOICES = {
    "optimizer": OPTIMIZERS,
    "precision": ("fp32", "bf16", "fp16"),
    "stem": STEMS,
    "augment_on": ("workers", "device"),
    "backend": ("auto", "eager", "triton"),
}

# What may differ between a run and its continuation: where it runs, what it writes. Everything else shapes the weights.
FREE = {
    "preset", "data", "device", "backend", "workers", "loader_timeout", "channels_last", "compile", "tensorboard",
    "checkpoint_activations", "deterministic", "probe_every", "log_every", "report_every", "save_every", "profile",
    "out", "overwrite", "resume", "limit_steps", "evaluation", "wandb",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The flags, complete."""

    preset: str
    data: str | None
    arch: str
    stem: str
    projector: str
    init: str | None
    image_size: int
    batch_size: int
    accumulate: int
    epochs: int
    warmup_epochs: float
    optimizer: str
    learning_rate_weights: float
    learning_rate_biases: float
    weight_decay: float
    trust_coefficient: float
    clip_trust: bool
    lambd: float
    scale_loss: float
    crop_scale: float
    color_jitter: tuple[float, float, float, float]
    grayscale: float
    blur: tuple[float, float]
    solarize: tuple[float, float]
    augment_on: str
    probe: bool
    evaluation: bool
    probe_every: int
    log_every: int
    report_every: int
    save_every: int | None
    device: torch.device
    precision: str
    backend: str
    channels_last: bool
    compile: bool
    checkpoint_activations: bool
    deterministic: bool
    workers: int
    loader_timeout: int
    seed: int
    out: Path | None
    overwrite: bool
    resume: str | None
    tensorboard: bool
    wandb: bool
    profile: int | None
    limit_steps: int | None

    @property
    def micro_batch_size(self) -> int:
        """Pairs that pass through the network together."""
        return self.batch_size // self.accumulate

    def recipes(self) -> tuple[ViewRecipe, ViewRecipe]:
        """What makes view 1 and view 2: as published, but for the flags."""
        both = {"crop_scale": (self.crop_scale, 1.0), "color_jitter": self.color_jitter, "grayscale": self.grayscale}
        each = zip(PUBLISHED_VIEWS, self.blur, self.solarize, strict=True)
        first, second = (replace(recipe, **both, blur=blur, solarize=solarize) for recipe, blur, solarize in each)
        return first, second

    def shaping(self) -> dict[str, Any]:
        """The settings that a continued run must share with its checkpoint."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def _parser(description: str) -> Flags:
    parser = Flags(description)
    switch = parser.switch

    def add(flag: str, convert: Callable[[str], Any], text: str, **options: Any) -> None:
        by_the_preset = flag[2:].replace("-", "_") in PAPER and options.get("default") is None
        parser.add(flag, convert, text + " [by the preset]" * by_the_preset, **options)

    whole, positive = partial(at_least, 0, int), partial(at_least, 1, int)
    real = partial(at_least, 0.0, float)
    add("--data", str, "class folders of images, webdataset shards, or 'fashion-mnist'; without it: digits")
    add("--preset", str, f"whose numbers the other flags begin with: {', '.join(PRESETS)} [by --data]")
    add("--arch", str, "encoder: a ResNet of torchvision, or small-cnn")
    add("--stem", str, "first layers of a ResNet: imagenet, or cifar for images of 32 pixels")
    add("--projector", str, "widths of the projector's layers")
    add("--init", str, "weights to begin with: encoder and, if the file has one, projector", metavar="FILE")
    add("--image-size", partial(at_least, 8, int), "side of a view in pixels")
    add("--batch-size", partial(at_least, 2, int), "pairs in a step, of all processes together")
    text = "add up the gradients of K batches of BATCH_SIZE/K pairs in a step. It saves memory, but each of them"
    add(
        "--accumulate",
        positive,
        f"{text} has a cross-correlation of its own: not the loss of the large batch",
        default=1,
        metavar="K",
    )
    add("--epochs", positive, "passes over the images")
    add("--warmup-epochs", real, "linear warm-up, at most a tenth of the run if not given")
    add("--optimizer", str, " or ".join(OPTIMIZERS))
    add("--learning-rate-weights", real, "of matrices and kernels, per 256 pairs", metavar="LR")
    add("--learning-rate-biases", real, "of biases and norms, per 256 pairs", metavar="LR")
    add("--weight-decay", real, "of matrices and kernels")
    add("--trust-coefficient", real, "of LARS")
    parser.add_argument("--clip-trust", action=YES_OR_NO, help="no LARS step longer than a plain one [by the preset]")
    add("--lambd", real, "λ, the weight of the off-diagonal sum")
    add("--scale-loss", real, "factor of the loss that is differentiated")
    add("--crop-scale", share, "least area of a view's crop, as a share of the image")
    jitter = "greatest change of brightness, contrast, saturation and hue"
    add("--color-jitter", share, jitter, nargs=4, metavar=("B", "C", "S", "H"))
    add("--grayscale", share, "probability in either view")
    add("--blur", share, "probability in view 1 and in view 2", nargs=2, metavar=("P1", "P2"))
    add("--solarize", share, "probability in view 1 and in view 2", nargs=2, metavar=("P1", "P2"))
    add("--augment-on", str, "workers, or device: colours, blur and solarization in batches, there", default="workers")
    add("--probe-every", positive, "epochs from one look at held-out training images to the next", metavar="EPOCHS")
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="hold no images out for it")
    text = "end with the encoder, and no measure of what it is worth"
    parser.add_argument("--no-evaluation", dest="evaluation", action="store_false", help=text)
    add("--log-every", positive, "steps from one row of metrics.jsonl to the next", default=10, metavar="STEPS")
    add("--report-every", positive, "steps from one collapse report to the next", default=100, metavar="STEPS")
    add("--save-every", positive, "steps between checkpoints, beside one after each epoch", metavar="STEPS")
    add("--device", str, "cpu, cuda, cuda:1, ... [cpu for the small images; else the accelerator, if there is one]")
    add("--precision", str, "fp32, or autocast to bf16 or fp16 [bf16 on an accelerator that has it]")
    parser.add_argument("--channels-last", action=YES_OR_NO, help="memory layout of images [on a GPU]")
    add("--backend", str, "of the loss: auto, eager or triton", default="auto")
    switch("--compile", "torch.compile the network")
    switch("--checkpoint-activations", "compute residual blocks again in the backward: less memory, a third more time")
    switch("--deterministic", "the same bits from the same command on a GPU too, at some cost")
    add("--workers", whole, "processes that decode for each that trains", default=min(8, own_cores()))
    add("--loader-timeout", positive, "seconds that a batch may take to be read", default=120, metavar="SECONDS")
    add("--seed", whole, "of weights, order and views", default=0)
    add("--out", Path, "folder for the results [runs/NAME, numbered if taken]")
    switch("--overwrite", "replace the run in that folder")
    resuming = (
        "continue from a checkpoint, or the official program's; 'auto' or nothing: the output folder's, if it has one"
    )
    add("--resume", str, resuming, nargs="?", const="auto", metavar="PATH")
    switch("--tensorboard", "write event files, too")
    switch("--wandb", "log to Weights & Biases, too; WANDB_MODE=offline keeps it here")
    add("--profile", positive, "time the parts of this many steps [50]", nargs="?", const=50, metavar="STEPS")
    add("--limit-steps", positive, "stop after this many steps of the run", metavar="STEPS")
    return parser


def read_settings(argv: Sequence[str] | None, description: str) -> Settings:
    """Read the command line (``sys.argv`` if None), fill in the preset, check what can be checked without data.

    Raises:
        UsageError: a flag is unknown or has a bad value.
    """
    flags = vars(_parser(description).parse_args(argv))
    small = "digits" if flags["data"] is None else "fashion-mnist" if is_fashion_mnist(flags["data"]) else None
    flags["preset"] = flags["preset"] or small or "one-gpu"
    if flags["preset"] not in PRESETS:
        raise UsageError(f"--preset {flags['preset']}: expected one of {', '.join(PRESETS)}")
    warmup = flags["warmup_epochs"]
    for name, value in preset(flags["preset"]).items():
        flags[name] = value if flags[name] is None else flags[name]
    if warmup is None:
        flags["warmup_epochs"] = min(flags["warmup_epochs"], flags["epochs"] / 10)
    if flags["learning_rate_weights"] is None:
        flags["learning_rate_weights"] = published_learning_rate(flags["batch_size"])
    if not flags["warmup_epochs"] < flags["epochs"]:
        raise UsageError(f"--warmup-epochs {flags['warmup_epochs']:g}: expected less than --epochs {flags['epochs']}")
    flags |= {name: tuple(flags[name]) for name in ("color_jitter", "blur", "solarize")}
    if flags["color_jitter"][3] > 0.5:
        raise UsageError(
            f"--color-jitter: expected a hue of at most 0.5, half a turn, got {flags['color_jitter'][3]:g}"
        )
    if flags["data"] is None and flags["preset"] != "digits":
        raise UsageError(f"--preset {flags['preset']}: expected --data, whose images it is for")
    if flags["compile"] and flags["checkpoint_activations"]:
        raise UsageError("--compile: expected it without --checkpoint-activations, which torch.compile cannot trace")
    if (flags["arch"] == "digits-cnn") != (flags["data"] is None):
        raise UsageError(f"--arch {flags['arch']}: digits-cnn goes with the digits, every other encoder with --data")
    pairs, rest = divmod(flags["batch_size"], flags["accumulate"])
    if rest:
        raise UsageError(
            f"--accumulate {flags['accumulate']}: expected a divisor of --batch-size {flags['batch_size']}"
        )
    if pairs < (least := max(2, distributed.world_size())):
        needed = least * flags["accumulate"]
        raise UsageError(f"--batch-size {flags['batch_size']}: expected {needed} or more, a pair for each process")
    parse_projector(flags["projector"])
    flags["device"] = find_device(flags["device"], prefer_cpu=small is not None)
    flags["precision"] = flags["precision"] or best_precision(flags["device"])
    if flags["channels_last"] is None:
        flags["channels_last"] = flags["device"].type == "cuda"
    for name, known in CHOICES.items():
        if flags[name] not in known:
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]}: expected {' or '.join(known)}")
    return Settings(**{field.name: flags[field.name] for field in fields(Settings)})
