"""A protocol that trains: measured and saved after every epoch, and the same to the bit if it is resumed."""

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes import distributed
from barlow_recipes.classifier import Classifier, accuracies, build_optimizer, shared, train_epoch, write_classifier
from barlow_recipes.data import seed_of
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.errors import Aborted, require
from barlow_recipes.evaluation import COLUMNS, Result, Run
from barlow_recipes.files import Catalogue
from barlow_recipes.labelled import TrainingImages, centres
from barlow_recipes.neighbours import nearest
from barlow_recipes.published import Recipe


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

    The accuracies and the classifier that remain are those of the last epoch; the best one's accuracies stand beside.

    Raises:
        Aborted: no image can be read, the loss is not finite, or a batch is too small for batch normalisation.
    """
    training, epochs = _Training(run, protocol), protocol.recipe.epochs
    if run.begun and run.begun["protocol"] == protocol.name:
        training.load_state_dict(run.begun)
    tqdm, steps = require("tqdm", "the progress bar").tqdm, len(training.images)
    shown = {"desc": protocol.name, "unit": "step", "dynamic_ncols": True, "initial": training.epoch * steps}
    with tqdm(total=epochs * steps, disable=None if is_main() else True, **shown) as bar:  # None: without a terminal
        while training.epoch < epochs:
            row = training.next_epoch(bar)
            run.step += 1
            run.metrics.add("epoch", {"step": run.step, "protocol": protocol.name, **row})
            learned = f"loss {row['loss']:.4g}, {row['images_per_second']:,.0f} images/s"
            bar.write(f"{protocol.name}, epoch {row['epoch']}/{epochs}: {learned}, {_told(row)}")
            run.save(**training.state_dict())
    path = run.out / f"classifier-{protocol.name}.safetensors"
    kept = training.classifier, run.encoder, run.tree.classes, run.settings.image_size
    from_main(lambda: write_classifier(path, *kept))
    described = {"labels": protocol.source, "training_images": len(protocol.train), "recipe": asdict(protocol.recipe)}
    return {**training.result, "best_on_validation": training.best, **described, "file": path.name}


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
        self.network = shared(self.classifier)
        self.images, self.validation = TrainingImages(protocol.train, settings), centres(run.tree.validation, settings)
        self.epoch = 0
        self.result: Result = {}  # of the last epoch
        self.best: Result = {}

    def next_epoch(self, bar: Any) -> Result:
        """Train on all images once and measure; what there is to tell of it."""
        run, started, total = self.run, time.perf_counter(), len(self.protocol.train)
        place, batches = (run.device, run.settings.precision), self.images.batches(self.epoch)
        groups = zip(("classifier", "backbone"), self.optimizer.param_groups, strict=False)
        rates = {f"lr_{name}": group["lr"] for name, group in groups}
        torch.manual_seed(seed_of(run.settings.seed, self.epoch, distributed.rank()))  # some encoders have a dropout
        try:
            loss, unreadable = train_epoch(self.network, self.optimizer, batches, *place, after_step=bar.update)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            text = "a batch of a single image has no variance to normalise by: try another --batch-size"
            raise Aborted(text) from None
        speed = total / (time.perf_counter() - started)
        if unreadable == total:
            raise Aborted("no image of train/ can be read: is --data damaged?")
        if not math.isfinite(loss):
            raise Aborted("the loss is not finite: try a lower learning rate, and fp32")
        measured = _checked(accuracies(self.classifier, self.validation, *place))
        self.schedule.step()
        self.epoch += 1
        self.result = {"epoch": self.epoch, **measured, "unreadable_in_training": unreadable, "loss": loss}
        if not self.best or self.result["top1"] > self.best["top1"]:
            self.best = {name: self.result[name] for name in ("epoch", *COLUMNS)}
        return {**self.result, **rates, "images_per_second": speed}

    def state_dict(self) -> dict[str, Any]:
        place = {"protocol": self.protocol.name, "epoch": self.epoch, "result": self.result, "best": self.best}
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
    result = _checked(nearest(run.encoder, bank, queries, len(tree.classes), run.device, settings.precision, k))
    print(f"knn: {k} neighbours, {_told(result)}")
    return result | {"neighbours": k, "labels": f"all {len(tree.train):,} images of train/"}


def _checked(measured: Result) -> Result:
    if not measured["validation_images"]:
        raise Aborted("no validation image can be read: is --data damaged?")
    return measured


def _told(row: Result) -> str:
    counts = {part: row.get(f"unreadable_in_{part}", 0) for part in ("training", "validation", "bank")}
    left_out = [f"{count} unreadable in {part}, left out" for part, count in counts.items() if count]
    return ", ".join([f"top-1 {row['top1']:.2f} %", f"top-5 {row['top5']:.2f} %", *left_out])
