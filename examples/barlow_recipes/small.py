"""The study on the data that need no download: what encoders are worth that were pretrained in minutes."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes import probes
from barlow_recipes.classifier import Classifier, Recipe, accuracies, build_optimizer, train_epoch
from barlow_recipes.data import hold_out, seed_of
from barlow_recipes.digits import augment_digits, load_digits
from barlow_recipes.encoders import build_encoder
from barlow_recipes.fashion_mnist import FINAL_BANK_PER_CLASS, NAME, load_fashion_mnist
from barlow_recipes.pixels import as_float, normalized
from barlow_recipes.settings import read_settings
from barlow_recipes.views import PAPER, draw, small_views
from barlow_recipes.weights import load_encoder

DIGITS, FASHION = "digits", NAME
CLASSES = 10  # of either
KNN, MOST = "knn", "most"
# Labels of each class, or a share of all labels, and what a table calls them.
COLUMNS = {KNN: "10-NN", "1": "1 a class", "10": "10 a class", "1%": "1 %", "10%": "10 %", MOST: "most"}
RAW, UNTRAINED, PRETRAINED = "raw pixels", "untrained encoder", "pretrained encoder"
SCRATCH, AUGMENTED = "trained from scratch", "from scratch, augmented"
FOUR_VIEWS, LOCAL_CROPS = "pretrained, 4 views", "pretrained, 2 + 4 local crops"
VIEWS = {PRETRAINED: (), FOUR_VIEWS: ("--views", "4"), LOCAL_CROPS: ("--local-crops", "4")}  # flags of pretraining
METHODS = (RAW, UNTRAINED, SCRATCH, AUGMENTED, *VIEWS)
DRAWS = {"1": 3}  # of the labelled images, for every seed: with one of each class they decide about several points
RATE, WEIGHT_DECAY = 0.05, 5e-4  # of training from scratch
# How long: from so many labels on, the batch size, the steps with augmentation and without it, where the labels are
# soon known by heart. With ten labels a class of Fashion-MNIST, on 1,000 held-out training images, means of two seeds:
# 59.4 % after 600 steps, 62.0 % after 1,200 (with --solarize 0.2 0.5); without augmentation 21.9 % after 200.
EFFORTS = ((1, 10, 300, 60), (50, 50, 600, 100), (300, 50, 600, 200), (3000, 100, 500, 500))
Row = dict[str, Any]


class Study(NamedTuple):
    """One data set: an encoder is pretrained on its training images and measured on its test images."""

    title: str
    arch: str
    columns: tuple[str, ...]  # for neighbours and linear classifiers
    scratch: dict[str, tuple[str, ...]]  # and for training from scratch: the others would take most of the time


FEW = {SCRATCH: ("1", "10", MOST), AUGMENTED: ("1", "10", MOST)}
SHARES = {SCRATCH: ("1", "10", "1%"), AUGMENTED: ("1", "10", "1%", "10%")}
STUDIES = {
    DIGITS: Study("Digits", "digits-cnn", (KNN, "1", "10", MOST), FEW),
    FASHION: Study("Fashion-MNIST in random colours", "small-cnn", tuple(COLUMNS), SHARES),
}


class Labelled(NamedTuple):
    images: Tensor  # (N, C, H, W), uint8 or float32 in [0, 1]
    labels: Tensor  # (N,)

    def of(self, numbers: Tensor) -> "Labelled":
        return Labelled(self.images[numbers], self.labels[numbers])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As the encoder sees them, without augmentation."""
        for images, labels in zip(self.images.split(512), self.labels.split(512), strict=True):
            yield plain(images), labels


class DataSet(NamedTuple):
    """All images of a data set; pretraining sees ``train`` without its labels, and nothing is learned from ``test``."""

    name: str
    train: Labelled
    test: Labelled
    bank: Tensor  # numbers of the training images among which neighbours are sought; the most that have labels

    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train.labels), MOST: len(self.bank), "test": len(self.test.labels)}

    def labelled(self, column: str, seed: int) -> Tensor:
        """The numbers of the training images that have labels; more labels of a seed contain the fewer."""
        if column in (KNN, MOST):
            return self.bank
        labels, share = self.train.labels, column.removesuffix("%")
        count = int(share) if share == column else max(1, len(labels) * int(share) // 100 // CLASSES)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
        return torch.cat([shuffled[labels[shuffled] == label][:count] for label in range(CLASSES)])

    def draws(self, column: str, seed: int) -> list[Tensor]:
        """The labelled images' numbers, of each draw: the same for every method, and of every seed its own."""
        return [self.labelled(column, 1000 * seed + draw) for draw in range(DRAWS.get(column, 1))]


@cache  # a process does several jobs, and Fashion-MNIST takes seconds to read
def load(name: str, source: str) -> DataSet:
    """Read digits or, from ``source``, Fashion-MNIST (UsageError), split and coloured as for pretraining."""
    if name == DIGITS:
        parts: Any = load_digits(1, seed=0, monitor=False).final
        train, test = (Labelled(*map(torch.cat, zip(*part, strict=True))) for part in (parts.bank, parts.queries))
    else:
        parts = load_fashion_mnist(source, recipes=PAPER, batch_size=1, seed=0, monitor=False).final
        train, test = (Labelled(part.images, part.labels) for part in (parts.bank, parts.queries))  # all, not some
    return DataSet(name, train, test, hold_out(train.labels, 1, at_most=FINAL_BANK_PER_CLASS).nonzero()[:, 0])


def plain(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else normalized(as_float(images))


def augmented(name: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """With the random changes that pretraining makes; of Fashion-MNIST those of either view."""
    if name == DIGITS:
        return augment_digits(images, generator)
    first, second = (draw(recipe, len(images), generator) for recipe in read_settings(["--data", NAME], "").recipes())
    return small_views(images, torch.where(torch.rand(len(images), 1, generator=generator) < 0.5, first, second))


def measure_frozen(data: DataSet, weights: Mapping[str, Path], seed: int, device: torch.device) -> list[Row]:
    """What pixels, the untrained and each method's pretrained encoder of ``weights`` are worth without changing them.

    The seed is that of the untrained encoder, and of the draw of labels. As in :func:`.probes.evaluate`, features are
    centred on the bank's mean, which needs no labels, and scaled to length 1.
    """
    study, rows, bank_images = STUDIES[data.name], [], data.train.of(data.bank)
    torch.manual_seed(seed)
    initial = build_encoder(study.arch).module.to(device)
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        RAW: probes.raw_pixels,
        UNTRAINED: probes.untrained(initial, bank_images.batches(), device),
    }
    representations |= {
        method: load_encoder(path, study.arch).module.to(device).eval() for method, path in weights.items()
    }
    for method, represent in representations.items():
        bank, test = (probes.extract(represent, part.batches(), device) for part in (bank_images, data.test))
        mean = bank.values.mean(dim=0)
        for column in study.columns:
            if method == RAW and seed > 0 and column in (KNN, MOST):
                continue  # pixels without a draw of labels are the same for every seed
            for number, few in enumerate(data.draws(column, seed)):
                own = bank if few is data.bank else probes.extract(represent, data.train.of(few).batches(), device)
                features, queries = (F.normalize(part.values - mean, dim=1) for part in (own, test))
                measure = probes.knn_accuracy if column == KNN else probes.linear_accuracy
                accuracy = measure(features, own.labels, queries, test.labels)
                rows.append(row_of(data.name, method, column, seed, number, accuracy=accuracy))
    return rows


def row_of(task: str, method: str, labels: str, seed: int, draw: int, **more: Any) -> Row:
    return {"task": task, "seed": seed, "method": method, "labels": labels, "draw": draw} | more


def train_from_scratch(data: DataSet, seed: int, effort: float, device: torch.device) -> list[Row]:
    """Train the same encoder with the same labels; ``effort`` is a factor of the number of steps."""
    return [
        row_of(data.name, method, column, seed, number, **train(data, few, method, seed, effort, device))
        for method, columns in STUDIES[data.name].scratch.items()
        for column in columns
        for number, few in enumerate(data.draws(column, seed))
    ]


def train(data: DataSet, few: Tensor, method: str, seed: int, effort: float, device: torch.device) -> Row:
    """Train encoder and linear layer on these training images; then look at the test images.

    SGD with momentum and a cosine from 0.05 to 0, in at least as many steps as EFFORTS has for so many labels. The seed
    is that of weights, order and augmentations.

    Returns:
        ``accuracy`` in percent of the test images, the mean ``loss`` of the last epoch, and how many ``steps`` it took.
    """
    _, size, *lengths = [row for row in EFFORTS if row[0] <= len(few)][-1]
    steps = math.ceil(len(few) / size)
    epochs = max(1, math.ceil(effort * lengths[method == SCRATCH] / steps))
    recipe = Recipe(epochs=epochs, lr_classifier=RATE, lr_backbone=RATE, weight_decay=WEIGHT_DECAY)
    torch.manual_seed(seed)
    encoder = build_encoder(STUDIES[data.name].arch)
    torch.manual_seed(seed)
    network = Classifier(encoder, CLASSES, frozen=False).to(memory_format=torch.channels_last).to(device)
    optimizer = build_optimizer(network, recipe)
    schedule, generator = LambdaLR(optimizer, recipe.factor), torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """In a new order; they differ in size by one at most: none is of a single image."""
        for some in few[torch.randperm(len(few), generator=generator)].tensor_split(steps):
            images, labels = data.train.of(some)
            seen = plain(images) if method == SCRATCH else augmented(data.name, images, generator)
            yield seen.contiguous(memory_format=torch.channels_last), labels

    for _ in range(epochs):
        loss, _ = train_epoch(network, optimizer, batches(), device)
        schedule.step()
    measured = accuracies(network, data.test.batches(), device)
    return {"accuracy": measured["top1"], "loss": loss, "steps": epochs * steps}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """By task, method and labels: the mean over the seeds of the mean over a seed's draws, and the seeds' deviation.

    It is the sample's, with n − 1; None of one seed.
    """
    groups: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        seeds = groups.setdefault((row["task"], row["method"], row["labels"]), {})
        seeds.setdefault(row["seed"], []).append(row["accuracy"])
    found = {}
    for cell, seeds in groups.items():
        values = [statistics.fmean(draws) for draws in seeds.values()]
        found[cell] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The table, the best of a task and column in bold; and in words what stands in it."""
    cells = figures(results["rows"])
    columns = [name for name in COLUMNS if any(column == name for _, _, column in cells)]
    lines = [["", *map(COLUMNS.__getitem__, columns)], ["---", *("---:" for _ in columns)]]
    for task in [name for name in STUDIES if any(of == name for of, _, _ in cells)]:
        lines.append([f"**{STUDIES[task].title}**", *("" for _ in columns)])
        for method in METHODS:
            texts = [_cell(cells, task, method, column) for column in columns]
            lines += [[method, *texts]] if {*texts} != {"–"} else []
    settings, environment = results["settings"], results["environment"]
    sizes = " and ".join(f"{size[MOST]:,} of {size['train']:,} {name}" for name, size in results["data"].items())
    epochs = " and ".join(f"{count} on {name}" for name, count in settings["epochs"].items())
    taken = _seconds(results["pretraining"])
    minutes = sum(job["seconds"] for job in results["jobs"].values()) / 60
    words = f"""
Percent of the test images, mean ± standard deviation over {settings["seeds"]} seeds of weights, views and labels; the \
best in bold.
10-NN searches, and “most” are, {sizes}. Pixels and frozen encoders get a linear classifier.
From scratch, the same encoder learns from the same labels; augmented: with the random changes of pretraining.
Epochs of pretraining: {epochs}. {taken}All of it took {minutes:.1f} minutes of one process on \
{environment["device"]}, with torch {environment["versions"]["torch"]}."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n{words}"


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the epochs of each way of pretraining took, the mean over the seeds, in words."""
    texts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        taken = [[row for row in rows if (row["task"], row["method"]) == (task, way)] for way in VIEWS]
        means = (f"{own[0]['epochs']} in {statistics.fmean(row['seconds'] for row in own):.0f} s" for own in taken)
        texts.append(f"on {task} {', '.join(means)}")
    return f"With 2 views, with 4, and with 2 and 4 local crops: {'; '.join(texts)}. " if texts else ""


def _cell(cells: Mapping[tuple[str, str, str], tuple[float, float | None]], task: str, method: str, column: str) -> str:
    if (task, method, column) not in cells:
        return "–"
    mean, spread = cells[task, method, column]
    best = max(other for (of, _, labels), (other, _) in cells.items() if (of, labels) == (task, column))
    text = f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
    return f"**{text}**" if round(mean, 1) == round(best, 1) else text
