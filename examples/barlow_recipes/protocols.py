"""A protocol that trains: measured and saved after every epoch, and the same to the bit if it is resumed."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from barlow_recipes import distributed
from barlow_recipes.classifier import (
    Accuracy,
    accuracy,
    build_classifier,
    build_optimizer,
    build_schedule,
    shared,
    train_epoch,
)
from barlow_recipes.data import seed_of
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.errors import Aborted, require
from barlow_recipes.evaluation import Result, Run
from barlow_recipes.files import Catalogue
from barlow_recipes.labelled import TrainingImages, centres
from barlow_recipes.published import Recipe

NAMES = ("classifier", "backbone")  # of the optimiser's groups


@dataclass(frozen=True)
class Protocol:
    """A classifier to be trained on these images."""

    name: str
    recipe: Recipe
    train: Catalogue
    source: str  # of the images, in words

    def settings(self) -> dict[str, Any]:
        """What decides about its result, in plain values."""
        values = asdict(self.recipe) | {"images": self.train.fingerprint()}
        return {f"{self.name} {name}": value for name, value in values.items()}


def train(run: Run, protocol: Protocol) -> Result:
    """Train a classifier, on a copy of the encoder if it is to be fine-tuned, and measure it after every epoch.

    Returns:
        The accuracies after the last epoch; beside them those of the epoch that was best on the validation images.

    Raises:
        Aborted: no image can be read, the loss is not finite, or a batch is too small for batch normalisation.
    """
    training, epochs = _Training(run, protocol), protocol.recipe.epochs
    if run.begun and run.begun["protocol"] == protocol.name:
        training.load_state_dict(run.begun)
    tqdm = require("tqdm", "the progress bar").tqdm
    steps = len(training.images)
    with tqdm(
        total=epochs * steps,
        initial=training.epoch * steps,
        desc=protocol.name,
        unit="step",
        disable=None if is_main() else True,  # None: where there is no terminal
        dynamic_ncols=True,
    ) as bar:
        while training.epoch < epochs:
            row = training.next_epoch(bar)
            run.step += 1
            run.metrics.add("epoch", {"step": run.step, "protocol": protocol.name, **row})
            bar.write(epoch_line(protocol.name, epochs, row))
            from_main(lambda: run.save(**training.state_dict()))
    described = {"labels": protocol.source, "training_images": len(protocol.train), "recipe": asdict(protocol.recipe)}
    return {**training.result, "best_on_validation": training.best, **described}


class _Training:
    """A protocol's classifier, and all that changes while it is trained."""

    def __init__(self, run: Run, protocol: Protocol) -> None:
        self.options, self.protocol, recipe = run.options, protocol, protocol.recipe
        torch.manual_seed(self.options.seed)  # the same first weights, whichever protocols came before
        encoder = run.encoder if recipe.frozen else run.encoder._replace(module=copy.deepcopy(run.encoder.module))
        self.classifier = build_classifier(encoder, len(run.tree.classes), frozen=recipe.frozen).to(self.options.device)
        self.optimizer = build_optimizer(self.classifier, recipe)
        self.schedule = build_schedule(self.optimizer, recipe)
        self.network = shared(self.classifier)
        self.images = TrainingImages(protocol.train, self.options.reading, self.options.seed)
        self.validation = centres(run.tree.validation, self.options.reading)
        self.epoch = 0
        self.result: Result = {}  # of the last epoch
        self.best: Result = {}

    def next_epoch(self, bar: Any) -> Result:
        """Train on all images once and measure; what there is to tell of it."""
        options, started = self.options, time.perf_counter()
        rates = {f"lr_{name}": group["lr"] for name, group in zip(NAMES, self.optimizer.param_groups, strict=False)}
        torch.manual_seed(seed_of(options.seed, self.epoch, distributed.rank()))  # some encoders have a dropout
        counted = _Counted(self.images.batches(self.epoch), bar)
        loss = self._train(counted)
        (unreadable,) = distributed.totals([counted.unreadable])
        speed = len(self.protocol.train) / (time.perf_counter() - started)
        measured = accuracy(self.classifier, self.validation, options.device, options.precision)
        _check(loss, measured, unreadable, len(self.protocol.train))
        self.schedule.step()
        self.epoch += 1
        self.result = {"epoch": self.epoch, **of_accuracy(measured), "unreadable_in_training": unreadable, "loss": loss}
        if not self.best or self.result["top1"] > self.best["top1"]:
            self.best = {name: self.result[name] for name in ("epoch", "top1", "top5", "mean_per_class")}
        return {**self.result, **rates, "images_per_second": speed}

    def _train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        try:
            return train_epoch(self.network, self.optimizer, batches, self.options.device, self.options.precision)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise Aborted(
                "a batch of a single image has no variance to normalise by: try another --batch-size"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.name,
            "epoch": self.epoch,
            "result": self.result,
            "best": self.best,
            "model": self.classifier.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classifier.learner.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.result, self.best = state["epoch"], state["result"], state["best"]


class _Counted:
    """Batches, whose unreadable images are counted, and which move a bar."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], bar: Any) -> None:
        self.batches, self.bar, self.unreadable = batches, bar, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            self.unreadable += int((labels < 0).sum())
            yield images, labels
            self.bar.update()


def _check(loss: float, measured: Accuracy, unreadable: int, images: int) -> None:
    if unreadable == images:
        raise Aborted("no image of train/ can be read: is --data damaged?")
    check_readable(measured)
    if not math.isfinite(loss):
        raise Aborted("the loss is not finite: try a lower learning rate, and fp32")


def check_readable(measured: Accuracy) -> None:
    """End a run that has nothing to measure on."""
    if not measured.images:
        raise Aborted("no validation image can be read: is --data damaged?")


def of_accuracy(measured: Accuracy) -> Result:
    """What rows and results say of an accuracy."""
    accuracies = {"top1": measured.top1, "top5": measured.top5, "mean_per_class": measured.mean_per_class}
    return accuracies | {"validation_images": measured.images, "unreadable_in_validation": measured.unreadable}


def epoch_line(name: str, epochs: int, row: Result) -> str:
    """What stays on the terminal of an epoch."""
    parts = [f"loss {row['loss']:.4g}", f"top-1 {row['top1']:.2f} %", f"top-5 {row['top5']:.2f} %"]
    parts += [f"{row['images_per_second']:,.0f} images/s", *unreadable_notes(row)]
    return f"{name}, epoch {row['epoch']}/{epochs}: {', '.join(parts)}"


def unreadable_notes(row: Result) -> list[str]:
    """What was left out of training and measuring, if anything was."""
    counts = {part: row.get(f"unreadable_in_{part}", 0) for part in ("training", "validation", "bank")}
    return [f"{count} unreadable in {part}, left out" for part, count in counts.items() if count]
