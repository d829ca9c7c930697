"""A protocol that trains: measured and saved after every epoch, and the same to the bit if it is resumed."""

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from barlow_recipes import distributed
from barlow_recipes.classifier import (
    Epoch,
    accuracies,
    build_classifier,
    build_optimizer,
    build_schedule,
    shared,
    train_epoch,
    write_classifier,
)
from barlow_recipes.data import seed_of
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.errors import Aborted, require
from barlow_recipes.evaluation import Result, Run
from barlow_recipes.files import Catalogue
from barlow_recipes.labelled import TrainingImages, centres
from barlow_recipes.neighbours import nearest
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

    The classifier of the last epoch becomes a file of the output folder.

    Returns:
        The accuracies after the last epoch; beside them those of the epoch that was best on the validation images.

    Raises:
        Aborted: no image can be read, the loss is not finite, or a batch is too small for batch normalisation.
    """
    training, epochs = _Training(run, protocol), protocol.recipe.epochs
    if run.begun and run.begun["protocol"] == protocol.name:
        training.load_state_dict(run.begun)
    tqdm, steps = require("tqdm", "the progress bar").tqdm, len(training.images)
    shown: dict[str, Any] = {"desc": protocol.name, "unit": "step", "dynamic_ncols": True}
    shown["disable"] = None if is_main() else True  # None: where there is no terminal
    with tqdm(total=epochs * steps, initial=training.epoch * steps, **shown) as bar:
        while training.epoch < epochs:
            row = training.next_epoch(bar)
            run.step += 1
            run.metrics.add("epoch", {"step": run.step, "protocol": protocol.name, **row})
            bar.write(epoch_line(protocol.name, epochs, row))
            from_main(lambda: run.save(**training.state_dict()))
    path = run.out / f"classifier-{protocol.name}.safetensors"
    parts = training.classifier, run.encoder, run.tree.classes, run.settings.image_size
    from_main(lambda: write_classifier(path, *parts))
    described = {"labels": protocol.source, "training_images": len(protocol.train), "recipe": asdict(protocol.recipe)}
    return {**training.result, "best_on_validation": training.best, **described, "file": path.name}


class _Training:
    """A protocol's classifier, and all that changes while it is trained."""

    def __init__(self, run: Run, protocol: Protocol) -> None:
        self.run, self.recipe, self.name, settings = run, protocol.recipe, protocol.name, run.settings
        torch.manual_seed(settings.seed)  # the same first weights, whichever protocols came before
        frozen = self.recipe.frozen
        encoder = run.encoder if frozen else run.encoder._replace(module=copy.deepcopy(run.encoder.module))
        self.classifier = build_classifier(encoder, len(run.tree.classes), frozen=frozen).to(run.device)
        self.optimizer = build_optimizer(self.classifier, self.recipe)
        self.schedule = build_schedule(self.optimizer, self.recipe)
        self.parts: dict[str, Any] = {
            "model": self.classifier.learner,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
        self.network = shared(self.classifier)
        self.images, self.total = TrainingImages(protocol.train, settings), len(protocol.train)
        self.validation = centres(run.tree.validation, settings)
        self.epoch = 0
        self.result: Result = {}  # of the last epoch
        self.best: Result = {}

    def next_epoch(self, bar: Any) -> Result:
        """Train on all images once and measure; what there is to tell of it."""
        run, started = self.run, time.perf_counter()
        rates = {f"lr_{name}": group["lr"] for name, group in zip(NAMES, self.optimizer.param_groups, strict=False)}
        torch.manual_seed(seed_of(run.settings.seed, self.epoch, distributed.rank()))  # some encoders have a dropout
        trained = self._train(bar)
        speed = self.total / (time.perf_counter() - started)
        measured = accuracies(self.classifier, self.validation, run.device, run.settings.precision)
        if trained.unreadable == self.total:
            raise Aborted("no image of train/ can be read: is --data damaged?")
        check_readable(measured)
        if not math.isfinite(trained.loss):
            raise Aborted("the loss is not finite: try a lower learning rate, and fp32")
        self.schedule.step()
        self.epoch += 1
        self.result = {"epoch": self.epoch, **measured}
        self.result |= {"unreadable_in_training": trained.unreadable, "loss": trained.loss}
        if not self.best or self.result["top1"] > self.best["top1"]:
            self.best = {name: self.result[name] for name in ("epoch", "top1", "top5", "mean_per_class")}
        return {**self.result, **rates, "images_per_second": speed}

    def _train(self, bar: Any) -> Epoch:
        run, batches = self.run, self.images.batches(self.epoch)
        try:
            return train_epoch(
                self.network, self.optimizer, batches, run.device, run.settings.precision, after_step=bar.update
            )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            text = "a batch of a single image has no variance to normalise by: try another --batch-size"
            raise Aborted(text) from None

    def state_dict(self) -> dict[str, Any]:
        place = {"protocol": self.name, "epoch": self.epoch, "result": self.result, "best": self.best}
        return place | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.epoch, self.result, self.best = state["epoch"], state["result"], state["best"]


def vote(run: Run) -> Result:
    """Measure the frozen encoder by the nearest training images.

    Raises:
        Aborted: no validation image can be read.
    """
    tree, settings, k = run.tree, run.settings, run.settings.neighbours
    bank, queries = centres(tree.train, settings), centres(tree.validation, settings)
    result = nearest(run.encoder, bank, queries, len(tree.classes), run.device, settings.precision, k)
    check_readable(result)
    parts = [f"top-1 {result['top1']:.2f} %", f"top-5 {result['top5']:.2f} % by {k} neighbours", *_left_out(result)]
    print(f"knn: {', '.join(parts)}")
    return result | {"neighbours": k, "labels": f"all {len(tree.train):,} images of train/"}


def check_readable(measured: Result) -> None:
    if not measured["validation_images"]:
        raise Aborted("no validation image can be read: is --data damaged?")


def epoch_line(name: str, epochs: int, row: Result) -> str:
    """What stays on the terminal of an epoch."""
    parts = [f"loss {row['loss']:.4g}", f"top-1 {row['top1']:.2f} %", f"top-5 {row['top5']:.2f} %"]
    parts += [f"{row['images_per_second']:,.0f} images/s", *_left_out(row)]
    return f"{name}, epoch {row['epoch']}/{epochs}: {', '.join(parts)}"


def _left_out(row: Result) -> list[str]:
    counts = {part: row.get(f"unreadable_in_{part}", 0) for part in ("training", "validation", "bank")}
    return [f"{count} unreadable in {part}, left out" for part, count in counts.items() if count]
