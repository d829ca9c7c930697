"""The parts of the evaluation on the built-in data, each a function of plain values: a process does them in turn."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes import probes
from barlow_recipes.classifier import Classifier, accuracies, build_optimizer, train_epoch
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.neighbours import extract
from barlow_recipes.published import Recipe
from barlow_recipes.small.data import CLASSES, KNN, MOST, TASKS, DataSet, Task, load
from barlow_recipes.weights import load_encoder

RAW, UNTRAINED, PRETRAINED = "raw pixels", "untrained encoder", "pretrained encoder"
SCRATCH, FINE_TUNED = "trained from scratch", "pretrained, fine-tuned"
METHODS = (RAW, UNTRAINED, SCRATCH, PRETRAINED, FINE_TUNED)
DRAWS = {"1": 3}  # of the labelled images, for every seed: with one of each class they decide about several points
RATE, WEIGHT_DECAY = 0.05, 5e-4  # of all parameters
# How long to train with labels: from so many labels on, the batch size, the steps with augmentation and without it,
# where the labels are soon known by heart. With ten labels a class of Fashion-MNIST, on 1,000 held-out training images,
# means of two seeds: 59.4 % after 600 steps, 62.0 % after 1,200 (with --solarize 0.2 0.5); without augmentation 21.9 %
# after 200, with a loss of 0.004.
EFFORTS = ((1, 10, 300, 60), (50, 50, 600, 100), (300, 50, 600, 200), (3000, 100, 500, 500))
Row = dict[str, Any]


def draws(data: DataSet, column: str, seed: int) -> list[Tensor]:
    """The labelled images' numbers, of each draw: the same for every method, and of every seed its own."""
    return [data.labelled(column, 1000 * seed + draw) for draw in range(DRAWS.get(column, 1))]


def probe(task: str, source: str, weights: str, columns: list[str], seed: int, device: str) -> Row:
    """What pixels, the untrained and the pretrained encoder of ``weights`` are worth without changing them.

    ``source`` is that of Fashion-MNIST; the seed is that of the untrained encoder, and of the draw of labels. As in
    :func:`~barlow_recipes.probes.evaluate`, features are centred on the bank's mean, which needs no labels, and scaled
    to length 1.

    Returns:
        ``rows``: an accuracy, in percent of the test images, of each method in each column.
    """
    where, doing, rows = torch.device(device), TASKS[task], []
    data = load(doing.data, source)
    torch.manual_seed(seed)
    initial = build_encoder(doing.arch).module.to(where)
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        RAW: probes.raw_pixels,
        UNTRAINED: probes.untrained(initial, doing.batches(data.train, data.bank), where),
        PRETRAINED: load_encoder(Path(weights), doing.arch).module.to(where).eval(),
    }
    for method, represent in representations.items():
        bank, test = (
            extract(represent, doing.batches(*part), where) for part in ((data.train, data.bank), (data.test,))
        )
        mean = bank.values.mean(dim=0)
        for column in columns:
            if method == RAW and seed > 0 and column in (KNN, MOST):
                continue  # pixels without a draw of labels are the same for every seed
            for draw, numbers in enumerate(draws(data, column, seed)):
                shown = numbers is not data.bank
                own = extract(represent, doing.batches(data.train, numbers), where) if shown else bank
                features, queries = (F.normalize(part.values - mean, dim=1) for part in (own, test))
                measure = probes.knn_accuracy if column == KNN else probes.linear_accuracy
                accuracy = measure(features, own.labels, queries, test.labels)
                rows.append(row_of(task, seed, method, column, draw, accuracy=accuracy))
    return {"rows": rows}


def row_of(task: str, seed: int, method: str, column: str, draw: int, **more: Any) -> Row:
    return {"task": task, "seed": seed, "method": method, "labels": column, "draw": draw} | more


def supervise(task: str, source: str, weights: str | None, column: str, seed: int, effort: float, device: str) -> Row:
    """Train the same encoder with the same labels: as many as ``column`` says.

    From ``weights`` it is fine-tuned with augmentation; without them it begins at random, both with augmentation and,
    where the task asks for it, without. ``effort`` is a factor of the number of steps.
    """
    doing, method, rows = TASKS[task], FINE_TUNED if weights else SCRATCH, []
    data = load(doing.data, source)
    for draw, numbers in enumerate(draws(data, column, seed)):
        for augmented in (True,) if weights or not doing.tries_without(column) else (True, False):
            torch.manual_seed(seed)
            encoder = load_encoder(Path(weights), doing.arch) if weights else build_encoder(doing.arch)
            encoder.module.to(device)
            recipe = recipe_for(len(numbers), augmented=augmented, effort=effort)
            trained = train_with_labels(doing, data, numbers, encoder, recipe, augmented=augmented, seed=seed)
            rows.append(row_of(task, seed, method, column, draw, augmented=augmented, **trained))
    return {"rows": rows}


def recipe_for(labels: int, *, augmented: bool, effort: float = 1.0) -> Recipe:
    """SGD with momentum and a cosine, from 0.05 to 0, in at least as many steps as EFFORTS has for so many labels."""
    _, size, with_augmentation, without = [row for row in EFFORTS if row[0] <= labels][-1]
    steps = effort * (with_augmentation if augmented else without)
    epochs = max(1, math.ceil(steps / math.ceil(labels / size)))
    return Recipe(epochs=epochs, batch_size=size, lr_classifier=RATE, lr_backbone=RATE, weight_decay=WEIGHT_DECAY)


def train_with_labels(
    task: Task, data: DataSet, numbers: Tensor, encoder: Encoder, recipe: Recipe, *, augmented: bool, seed: int
) -> Row:
    """Train the encoder itself, with a linear layer on it, on these training images; then look at the test images.

    The seed is that of the classifier, the order and the augmentations.

    Returns:
        ``accuracy`` in percent of the test images, the mean ``loss`` of the last epoch, and how many ``steps`` it took.
    """
    torch.manual_seed(seed)
    device = next(encoder.module.parameters()).device
    network = Classifier(encoder, CLASSES, frozen=False).to(memory_format=torch.channels_last).to(device)
    optimizer = build_optimizer(network, recipe)
    schedule = LambdaLR(optimizer, recipe.factor)
    generator, steps = torch.Generator().manual_seed(seed), math.ceil(len(numbers) / recipe.batch_size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """In a new order; they differ in size by one at most: none is of a single image."""
        for some in numbers[torch.randperm(len(numbers), generator=generator)].tensor_split(steps):
            images = data.train.images[some]
            seen = task.augmented(images, generator) if augmented else task.plain(images)
            yield seen.contiguous(memory_format=torch.channels_last), data.train.labels[some]

    for _ in range(recipe.epochs):
        loss, _ = train_epoch(network, optimizer, batches(), device)
        schedule.step()
    measured = accuracies(network, task.batches(data.test), device)
    return {"accuracy": measured["top1"], "loss": loss, "steps": recipe.epochs * steps}
