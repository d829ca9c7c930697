"""Measure what a pretrained encoder is worth on ImageNet, or on any images in train/ and val/ with class folders.

    python examples/imagenet_evaluate.py --data DIR --weights runs/imagenet-resnet50/backbone.pt
    python examples/imagenet_evaluate.py --data DIR --weights resnet50.pth --protocols semi-1 --lists imagenet_subsets
    python examples/imagenet_evaluate.py --data places205 --weights resnet50.pth --protocols places205
    torchrun --nproc-per-node 8 examples/imagenet_evaluate.py --data DIR --weights FILE

linear: a linear classifier on the frozen encoder. knn: a vote of the 20 nearest training images, without training.
semi-1, semi-10: encoder and classifier fine-tuned on 1 % or 10 % of the labels; which images, SimCLR's 1percent.txt and
10percent.txt say (google-research/simclr, imagenet_subsets/). places205, inaturalist18: linear, with the numbers of
those transfers. All numbers are the published ones, and flags.

Several processes take the steps that one would take. With --resume the same command begins or continues a run. The
results are those of the last epoch, in ``results.json`` and ``metrics.jsonl``; ``classifier-NAME.safetensors`` are its
classifiers, to be loaded by torchvision or timm.

Source: Zbontar et al. (2021), arXiv 2103.03230, and evaluate.py of facebookresearch/barlowtwins; Misra & van der Maaten
(2020), arXiv 1912.01991.
"""

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes import checkpoint, command_line, distributed, folders, outputs
from barlow_recipes.classifier import (
    PUBLISHED,
    RECIPES,
    Classifier,
    Recipe,
    accuracies,
    build_optimizer,
    data_parallel,
    train_epoch,
    write_classifier,
)
from barlow_recipes.command_line import Positive, Real, as_flags
from barlow_recipes.data import seed_of
from barlow_recipes.distributed import is_rank_zero, on_rank_zero
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import Aborted, UsageError, require
from barlow_recipes.files import ImageIndex
from barlow_recipes.images import look_at_some
from barlow_recipes.labelled import (
    ImageFolders,
    ReadingSettings,
    centres,
    from_list,
    load_tree,
    stratified,
    training_images,
)
from barlow_recipes.metrics import Metrics, aligned
from barlow_recipes.probes import nearest
from barlow_recipes.program import exit_status, start
from barlow_recipes.weights import digest, find_encoder

NO_TRAINING_IMAGE = "no image of train/ can be read: is --data damaged?"
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, or --precision bf16"
PERCENT = {"semi-1": 1, "semi-10": 10}
PROTOCOLS = ("linear", "knn", *PERCENT, "places205", "inaturalist18")
PARTS = {"settings", "results", "step"}  # of a checkpoint; of one amid a protocol there are more
COLUMNS = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
NOTE = "published: top-1 / top-5 of a ResNet-50 pretrained on ImageNet for 1000 epochs, arXiv 2103.03230"
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: launch(argv), OUT_OF_MEMORY)


def launch(argv: Sequence[str] | None) -> None:
    """Index the images, load the encoder, go through the protocols, tell."""
    started = time.perf_counter()
    settings = command_line.read(Settings, argv, __doc__ or "")
    require("safetensors.torch", "the classifiers")  # now, not hours later
    settings.check_pixels()
    wanted: list[str] = [name for name in PROTOCOLS if name in settings.protocols]
    if not wanted:
        raise UsageError(f"--protocols: expected some of {', '.join(PROTOCOLS)}")
    if settings.batch_size < (processes := distributed.world_size()):
        raise UsageError(f"--batch-size {settings.batch_size}: expected {processes} or more, an image for each process")
    device, tree = command_line.find_device(settings.device), load_tree(settings.data)
    for part in (tree.train, tree.validation):
        look_at_some(part, str(part.root), settings)
    trained = {name: find_protocol(name, settings, tree) for name in wanted if name != "knn"}
    torch.manual_seed(settings.seed)
    images = settings.channels, settings.image_size
    encoder = find_encoder(settings.weights, settings.arch, settings.stem, *images)
    if encoder.shape[0] != settings.channels:
        raise UsageError(f"--channels {settings.channels}: {encoder.arch} takes images of {encoder.shape[0]} alone")
    run = Run(settings, device, encoder._replace(module=encoder.module.to(device).eval()), tree, trained)
    default = Path("runs") / f"{tree.name}-evaluation"
    saved = folders.load(folders.find(settings, default), PARTS)
    with folders.opened(settings, default, run.must_match, saved, unit="epoch") as (run.out, run.metrics):
        if saved:
            run.resume(saved.content)
        print(run.introduction())
        for name in [name for name in wanted if name not in run.results]:
            run.finish(name)
        distributed.on_rank_zero(run.write_results)
        print("\n" + run.table(), end="\n\n")
        print(f"{time.perf_counter() - started:.0f} seconds. Results: {run.out}")


@dataclass(frozen=True, kw_only=True)
class Settings(ReadingSettings):
    """The flags; a number that is None is the published one of each protocol, [in brackets]."""

    data: Path  # folder with the images in train/ and in val/ or test/, one folder per class
    weights: str  # the encoder: a checkpoint or a state_dict, or 'random' for an untrained one
    arch: str | None = None  # of the encoder; without it as the file has it, of a random one resnet50
    stem: Literal["imagenet", "cifar"] | None = None
    "of a ResNet: imagenet, or cifar for images of 32 pixels; without it as the file has it"
    protocols: tuple[Literal["linear", "knn", "semi-1", "semi-10", "places205", "inaturalist18"], ...] = PROTOCOLS[:4]
    "what to measure; places205 and inaturalist18 are linear, with the numbers of those transfers"
    precision: Literal["fp32", "bf16"] = "fp32"  # fp32 as published, or autocast to bf16
    epochs: Positive | None = None  # [linear 100, semi-1 and semi-10 20, places205 14, inaturalist18 84]
    lr_classifier: Real | None = None  # in the first epoch, not scaled by the batch size [0.3, 0.5; transfers 0.01]
    lr_backbone: Real | None = None  # likewise, where the encoder is fine-tuned [0.005]
    weight_decay: Real | None = None  # of what is trained [linear 1e-6, semi-1 and semi-10 0, transfers 5e-4]
    momentum: Real | None = None  # of SGD [0.9]
    milestones: tuple[Positive, ...] | None = None
    "epochs after which the rates are multiplied by 0.1; nothing: cosine to 0 [cosine; of the transfers after a third]"
    neighbours: Positive = 20  # that vote in knn
    lists: Path | None = None
    "folder with 1percent.txt and 10percent.txt; without it a share of each class by a fixed seed"

    def recipe(self, name: str) -> Recipe:
        """The published one of a protocol, with the numbers that are given in place of its own (UsageError)."""
        given = {field: getattr(self, field) for field in asdict(RECIPES[name]) if getattr(self, field) is not None}
        if RECIPES[name].frozen:
            given.pop("lr_backbone", None)
        recipe = replace(RECIPES[name], **given)
        if max(recipe.milestones, default=0) >= recipe.epochs:
            milestones = " ".join(map(str, recipe.milestones))
            raise UsageError(f"--milestones {milestones}: expected less than --epochs {recipe.epochs}")
        return recipe


class Protocol(NamedTuple):
    """A classifier to be trained on these images."""

    name: str
    recipe: Recipe
    train: ImageIndex
    source: str  # of the images, in words


def find_protocol(name: str, settings: Settings, tree: ImageFolders) -> Protocol:
    """With its recipe and its labelled images."""
    recipe, percent = settings.recipe(name), PERCENT.get(name)
    if percent is None:
        return Protocol(name, recipe, tree.train, f"all {len(tree.train):,} images of train/")
    path = settings.lists / f"{percent}percent.txt" if settings.lists else None
    images, source = from_list(path, tree) if path else stratified(percent, tree)
    return Protocol(name, recipe, tree.train.subset(images), source)


@dataclass
class Run:
    """What the protocols have in common, and what there is already."""

    settings: Settings
    device: torch.device
    encoder: Encoder
    tree: ImageFolders
    protocols: dict[str, Protocol]  # those that train
    out: Path = Path()
    metrics: Metrics = field(default_factory=lambda: Metrics(None))
    results: dict[str, Result] = field(default_factory=dict)  # of the protocols that are done
    step: int = 0  # epochs so far, of all protocols
    begun: dict[str, Any] | None = None  # the checkpoint of a protocol that is not done

    @cached_property
    def must_match(self) -> dict[str, Any]:
        """What decides about the results, in plain values: what a checkpoint must share with its continuation."""
        names = ("image_size", "batch_size", "precision", "seed", "channels", "value_range", "mean", "std")
        must_match = {name: getattr(self.settings, name) for name in (*names, "neighbours")} | {
            "images of --data": self.tree.fingerprint(),
            "--weights": digest(self.encoder.module),
            "protocols": [name for name in PROTOCOLS if name in self.settings.protocols],
        }
        for name, recipe, train, _ in self.protocols.values():
            values = asdict(recipe) | {"images": train.fingerprint()}
            must_match |= {f"{name} {key}": value for key, value in values.items()}
        return must_match

    def resume(self, saved: dict[str, Any]) -> None:
        self.results, self.step = saved["results"], saved["step"]
        self.begun = saved if "model" in saved else None

    def save(self, **state: Any) -> None:
        state |= {"settings": self.must_match, "results": self.results, "step": self.step}
        on_rank_zero(lambda: checkpoint.save(self.out / outputs.CHECKPOINT, state, keep_previous=True))

    def finish(self, name: str) -> None:
        """Measure by a protocol, and keep the result."""
        self.results[name] = vote(self) if name == "knn" else train(self, self.protocols[name])
        self.save()

    def introduction(self) -> str:
        """What is measured on what, with a note where the flags are not those that the encoder was trained with."""
        tree, processes, settings = self.tree, distributed.world_size(), self.settings
        devices = f"{self.device.type} in {processes} processes" if processes > 1 else f"{self.device}"
        now = dict(zip(("mean", "std"), settings.statistics(), strict=True))
        now |= {"value_range": settings.value_range or ()}
        other = {name: values for name, values in self.encoder.pixels.items() if tuple(values) != tuple(now[name])}
        lines = [
            *(
                f"note: {note}"
                for note in (*tree.notes, *command_line.precision_notes(self.device, settings.precision))
            ),
            f"{tree.name}: {len(tree.classes):,} classes, {len(tree.train):,} images to train on and "
            f"{len(tree.validation):,} to validate on",
            f"{self.encoder.arch}, {self.encoder.source}: {settings.precision} on {devices}; results go to {self.out}",
            *([f"note: the encoder was trained with {' '.join(as_flags(other))}"] if other else []),
            *(f"{protocol.name}: {protocol.source}" for protocol in self.protocols.values()),
        ]
        return "\n".join(lines)

    def write_results(self) -> None:
        """results.json, and a row of metrics for each protocol."""
        for name, result in self.results.items():
            self.metrics.add("evaluation", {"step": self.step, "protocol": name, **result})
        encoder = {"weights": self.encoder.source, "arch": self.encoder.arch, "stem": self.encoder.stem}
        facts = {
            **encoder,
            "data": str(self.settings.data),
            "settings": self.must_match,
            "protocols": self.results,
        }
        with outputs.replacing(self.out / outputs.RESULTS) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """Each protocol with its accuracies and the published ones; for people to read."""
        rows = [["", *COLUMNS.values(), "published"]]
        for name, result in self.results.items():
            paper = " / ".join(f"{value:.1f} %" for value in PUBLISHED.get(name, ())) or "–"
            rows.append([name, *(f"{result[column]:.2f} %" for column in COLUMNS), paper])
        return f"{aligned(rows)}\n{NOTE}"


def vote(run: Run) -> Result:
    """Measure the frozen encoder by the nearest training images; Aborted: of either part, no image can be read."""
    tree, settings, k = run.tree, run.settings, run.settings.neighbours
    bank, queries = centres(tree.train, settings), centres(tree.validation, settings)
    result = _checked(nearest(run.encoder, bank, queries, len(tree.classes), run.device, settings.precision, k))
    if result["unreadable_in_bank"] == len(tree.train):
        raise Aborted(NO_TRAINING_IMAGE)
    print(f"knn: {k} neighbours, {_told(result)}")
    return result | {"neighbours": k, "labels": f"all {len(tree.train):,} images of train/"}


def train(run: Run, protocol: Protocol) -> Result:
    """Train a classifier, on a copy of the encoder if it is to be fine-tuned, and measure it after every epoch.

    The accuracies and the classifier that remain are those of the last epoch.
    Aborted: no image can be read, the loss is not finite, or a batch is too small for batch normalisation.
    """
    training, epochs = _Training(run, protocol), protocol.recipe.epochs
    if run.begun and run.begun["protocol"] == protocol.name:
        training.load_state_dict(run.begun)
    tqdm, steps = require("tqdm", "the progress bar").tqdm, len(training.images)
    shown = {"desc": protocol.name, "unit": "step", "dynamic_ncols": True, "initial": training.epoch * steps}
    with tqdm(
        total=epochs * steps, disable=None if is_rank_zero() else True, **shown
    ) as bar:  # None: without a terminal
        while training.epoch < epochs:
            row = training.next_epoch(bar)
            run.step += 1
            run.metrics.add("epoch", {"step": run.step, "protocol": protocol.name, **row})
            learned = f"loss {row['loss']:.4g}, {row['images_per_second']:,.0f} images/s"
            bar.write(f"{protocol.name}, epoch {row['epoch']}/{epochs}: {learned}, {_told(row)}")
            run.save(**training.state_dict())
    path = run.out / f"classifier-{protocol.name}.safetensors"
    kept = training.classifier, run.encoder, run.tree.classes, run.settings.image_size
    on_rank_zero(lambda: write_classifier(path, *kept))
    described = {"labels": protocol.source, "training_images": len(protocol.train), "recipe": asdict(protocol.recipe)}
    return {**training.result, **described, "file": path.name}


class _Training:
    """A protocol's classifier, and all that changes while it is trained."""

    def __init__(self, run: Run, protocol: Protocol) -> None:
        self.run, self.protocol, settings, frozen = run, protocol, run.settings, protocol.recipe.frozen
        torch.manual_seed(settings.seed)  # the same first weights, whichever protocols came before
        encoder = run.encoder if frozen else run.encoder._replace(module=copy.deepcopy(run.encoder.module))
        self.classifier = Classifier(encoder, len(run.tree.classes), frozen=frozen).to(run.device)
        self.optimizer = build_optimizer(self.classifier, protocol.recipe)
        self.schedule = LambdaLR(self.optimizer, protocol.recipe.factor)
        learner = self.classifier.fc if frozen else self.classifier
        self.parts: dict[str, Any] = {"model": learner, "optimizer": self.optimizer, "schedule": self.schedule}
        self.network = data_parallel(self.classifier)
        self.images: Any = training_images(protocol.train, settings)
        self.validation = centres(run.tree.validation, settings)
        self.epoch = 0
        self.result: Result = {}  # of the last epoch

    def next_epoch(self, bar: Any) -> Result:
        """Train on all images once and measure; what there is to tell of it."""
        run, started, total = self.run, time.perf_counter(), len(self.protocol.train)
        place, self.images.batch_sampler.epoch = (run.device, run.settings.precision), self.epoch
        groups = zip(("classifier", "backbone"), self.optimizer.param_groups, strict=False)
        rates = {f"lr_{name}": group["lr"] for name, group in groups}
        torch.manual_seed(seed_of(run.settings.seed, self.epoch, distributed.rank()))  # some encoders have a dropout
        try:
            loss, unreadable = train_epoch(self.network, self.optimizer, self.images, *place, after_step=bar.update)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            text = "a batch of a single image has no variance to normalise by: try another --batch-size"
            raise Aborted(text) from None
        speed = total / (time.perf_counter() - started)
        if unreadable == total:
            raise Aborted(NO_TRAINING_IMAGE)
        if not math.isfinite(loss):
            raise Aborted("the loss is not finite: try a lower learning rate, and fp32")
        measured = _checked(accuracies(self.classifier, self.validation, *place))
        self.schedule.step()
        self.epoch += 1
        self.result = {"epoch": self.epoch, **measured, "unreadable_in_training": unreadable, "loss": loss}
        return {**self.result, **rates, "images_per_second": speed}

    def state_dict(self) -> dict[str, Any]:
        place = {"protocol": self.protocol.name, "epoch": self.epoch, "result": self.result}
        return place | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.epoch, self.result = state["epoch"], state["result"]


def _checked(measured: Result) -> Result:
    if not measured["validation_images"]:
        raise Aborted("no validation image can be read: is --data damaged?")
    return measured


def _told(row: Result) -> str:
    counts = {part: row.get(f"unreadable_in_{part}", 0) for part in ("training", "validation", "bank")}
    left_out = [f"{count} unreadable in {part}, left out" for part, count in counts.items() if count]
    return ", ".join([f"top-1 {row['top1']:.2f} %", f"top-5 {row['top5']:.2f} %", *left_out])


if __name__ == "__main__":
    start(main)
