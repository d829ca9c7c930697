"""One run of the evaluation: its flags, its encoder, what it has found out, and how it goes on after an end."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from barlow_recipes import checkpoint, distributed, outputs
from barlow_recipes.command_line import Positive, Real, as_flags
from barlow_recipes.distributed import from_main
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.errors import UsageError
from barlow_recipes.labelled import Reading, Tree
from barlow_recipes.metrics import Metrics, aligned
from barlow_recipes.neighbours import NEIGHBOURS
from barlow_recipes.published import PUBLISHED, RECIPES, Recipe
from barlow_recipes.weights import digest, load_encoder

PERCENT = {"semi-1": 1, "semi-10": 10}
PROTOCOLS = ("linear", "knn", *PERCENT, "places205", "inaturalist18")
RANDOM = "random"  # in the place of a file of weights
PARTS = {"settings", "results", "step"}  # of a checkpoint; of one amid a protocol there are more
COLUMNS = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
NOTES = (
    "published: top-1 / top-5 of a ResNet-50 pretrained on ImageNet for 1000 epochs, arXiv 2103.03230",
    "best epoch: its top-1, chosen on the validation images themselves; the other columns are the last epoch's",
)
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(Reading):
    """The flags; a number that is None is the published one."""

    data: Path
    "folder with the images in train/ and in val/ or test/, one folder per class"
    weights: str
    "the encoder: a checkpoint or a state_dict, or 'random' for an untrained one"
    arch: str | None = None
    "of the encoder; without it as the file has it, of a random one resnet50"
    stem: Literal["imagenet", "cifar"] | None = None
    "of a ResNet: imagenet, or cifar for images of 32 pixels; without it as the file has it"
    protocols: tuple[Literal["linear", "knn", "semi-1", "semi-10", "places205", "inaturalist18"], ...] = PROTOCOLS[:4]
    "what to measure; places205 and inaturalist18 are linear, with the numbers of those transfers"
    precision: Literal["fp32", "bf16"] = "fp32"
    "fp32 as published, or autocast to bf16"
    momentum: Real = 0.9
    "of SGD"
    linear_epochs: Positive | None = None
    "passes over all images [linear 100, places205 14, inaturalist18 84]"
    linear_lr_classifier: Real | None = None
    "in the first epoch, not scaled by the batch size [0.3; of the transfers 0.01]"
    linear_weight_decay: Real | None = None
    "of the classifier [1e-6; of the transfers 5e-4]"
    linear_milestones: tuple[Positive, ...] | None = None
    "epochs after which the rate is multiplied by 0.1; nothing: cosine to 0 [cosine; of the transfers after a third]"
    semi_epochs: Positive | None = None
    "passes over the labelled images [20]"
    semi_lr_backbone: Real | None = None
    "in the first epoch, not scaled by the batch size [0.005]"
    semi_lr_classifier: Real | None = None
    "likewise [0.5]"
    semi_weight_decay: Real | None = None
    "of both [0]"
    neighbours: Positive = NEIGHBOURS
    "that vote in knn"
    lists: Path | None = None
    "folder with 1percent.txt and 10percent.txt; without it a share of each class by a fixed seed"

    def recipe(self, name: str) -> Recipe:
        """The published one of a protocol, with the numbers that are given in place of its own.

        Raises:
            UsageError: a milestone is not within the epochs.
        """
        prefix = "semi" if name in PERCENT else "linear"
        given = {field: getattr(self, f"{prefix}_{field}", None) for field in asdict(RECIPES[name])}
        given |= {"batch_size": self.batch_size, "momentum": self.momentum}
        recipe = replace(RECIPES[name], **{field: value for field, value in given.items() if value is not None})
        if max(recipe.milestones, default=0) >= recipe.epochs:
            milestones = " ".join(map(str, recipe.milestones))
            raise UsageError(f"--linear-milestones {milestones}: expected less than --linear-epochs {recipe.epochs}")
        return recipe


@dataclass
class Run:
    """What the protocols have in common, and what there is already."""

    settings: Settings
    device: torch.device
    encoder: Encoder
    tree: Tree
    out: Path
    metrics: Metrics
    shaping: dict[str, Any]  # all that a checkpoint must share with the run that it continues
    results: dict[str, Result] = field(default_factory=dict)  # of the protocols that are done
    step: int = 0  # epochs so far, of all protocols
    begun: dict[str, Any] | None = None  # the checkpoint of a protocol that is not done

    def resume(self, saved: dict[str, Any]) -> None:
        self.results, self.step = saved["results"], saved["step"]
        self.begun = saved if "model" in saved else None

    def save(self, **state: Any) -> None:
        state |= {"settings": self.shaping, "results": self.results, "step": self.step}
        from_main(lambda: checkpoint.save(self.out / outputs.CHECKPOINT, state, keep_previous=True))

    def finish(self, name: str, result: Result) -> None:
        """Keep the result of a protocol that is done."""
        self.results[name] = result
        self.save()

    def introduction(self) -> str:
        tree, processes = self.tree, distributed.world_size()
        devices = f"{self.device.type} in {processes} processes" if processes > 1 else f"{self.device}"
        return (
            f"{tree.name}: {len(tree.classes):,} classes, {len(tree.train):,} images to train on and "
            f"{len(tree.validation):,} to validate on\n{self.encoder.arch}, {self.encoder.source}: "
            f"{self.settings.precision} on {devices}; results go to {self.out}" + self._other_pixels()
        )

    def _other_pixels(self) -> str:
        """Where the flags of the images are not those that the encoder was trained with: which those were."""
        mean, std = self.settings.statistics()
        now = {"value_range": self.settings.value_range or (), "mean": mean, "std": std}
        other = {name: values for name, values in self.encoder.pixels.items() if tuple(values) != tuple(now[name])}
        return f"\nnote: the encoder was trained with {' '.join(as_flags(other))}" if other else ""

    def write_results(self) -> None:
        """results.json, and a row of metrics for each protocol."""
        for name, result in self.results.items():
            self.metrics.add("evaluation", {"step": self.step, "protocol": name, **result})
        encoder = {"weights": self.encoder.source, "arch": self.encoder.arch, "stem": self.encoder.stem}
        facts = {**encoder, "data": str(self.settings.data), "settings": self.shaping, "protocols": self.results}
        with outputs.replacing(self.out / outputs.RESULTS) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """Each protocol with its accuracies, the published ones, and the epoch that was best; for people to read."""
        rows = [["", *COLUMNS.values(), "published", "best epoch"]]
        for name, result in self.results.items():
            best = result.get("best_on_validation")
            paper = " / ".join(f"{value:.1f} %" for value in PUBLISHED.get(name, ())) or "–"
            chosen = f"{best['top1']:.2f} % ({best['epoch']})" if best else "–"
            rows.append([name, *(f"{result[column]:.2f} %" for column in COLUMNS), paper, chosen])
        return "\n".join([aligned(rows), *NOTES])


def find_encoder(settings: Settings, device: torch.device) -> Encoder:
    """The encoder of --weights, for images of --channels and --image-size, on the device and in eval().

    Raises:
        UsageError: it cannot be loaded, or does not take such images.
    """
    torch.manual_seed(settings.seed)
    shape = settings.channels, settings.image_size
    if settings.weights == RANDOM:
        encoder = build_encoder(settings.arch or "resnet50", settings.stem or "imagenet", *shape)
    else:
        encoder = load_encoder(Path(settings.weights), settings.arch, settings.stem, *shape)
    if encoder.shape[0] != settings.channels:
        raise UsageError(f"--channels {settings.channels}: {encoder.arch} takes images of {encoder.shape[0]} alone")
    return encoder._replace(module=encoder.module.to(device).eval())


def shaping_of(settings: Settings, tree: Tree, encoder: Encoder) -> dict[str, Any]:
    """What decides about the results of every protocol, in plain values."""
    names = ("image_size", "batch_size", "precision", "seed", "channels", "value_range", "mean", "std", "neighbours")
    return {name: getattr(settings, name) for name in names} | {
        "images of --data": tree.fingerprint(),
        "--weights": digest(encoder.module),
        "protocols": [name for name in PROTOCOLS if name in settings.protocols],
    }
