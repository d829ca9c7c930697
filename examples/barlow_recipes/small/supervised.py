"""Training with a few labels, from random or from pretrained weights: what the probes are compared with."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from barlow_recipes.classifier import accuracy, build_classifier, build_optimizer, build_schedule, train_epoch
from barlow_recipes.encoders import Encoder
from barlow_recipes.published import Recipe
from barlow_recipes.small.data import CLASSES, DataSet, Task

RATE, WEIGHT_DECAY = 0.05, 5e-4  # of all parameters


class Effort(NamedTuple):
    """How long to train, from a number of labels on."""

    labels: int
    batch_size: int
    steps: int
    plain_steps: int  # without augmentation the labels are soon known by heart


# With ten labels a class of Fashion-MNIST, on 1,000 held-out training images, means of two seeds: 59.4 % after 600
# steps, 62.0 % after 1,200 (with --solarize 0.2 0.5); without augmentation 21.9 % after 200, with a loss of 0.004.
EFFORTS = (
    Effort(1, 10, 300, 60),
    Effort(50, 50, 600, 100),
    Effort(300, 50, 600, 200),
    Effort(3000, 100, 500, 500),
)


class Trained(NamedTuple):
    accuracy: float  # percent of the test images
    loss: float  # the mean of the last epoch, on the labelled images
    steps: int


def recipe_for(labels: int, *, augmented: bool, effort: float = 1.0) -> Recipe:
    """SGD with momentum and a cosine, from 0.05 to 0, in at least as many steps as EFFORTS has for so many labels."""
    found = [row for row in EFFORTS if row.labels <= labels][-1]
    steps = effort * (found.steps if augmented else found.plain_steps)
    epochs = max(1, math.ceil(steps / math.ceil(labels / found.batch_size)))
    return Recipe(
        epochs=epochs,
        batch_size=found.batch_size,
        lr_classifier=RATE,
        lr_backbone=RATE,
        weight_decay=WEIGHT_DECAY,
    )


def train_with_labels(
    task: Task,
    data: DataSet,
    numbers: Tensor,
    encoder: Encoder,
    recipe: Recipe,
    *,
    augmented: bool,
    seed: int,
    device: torch.device,
) -> Trained:
    """Train the encoder itself, with a linear layer on it, on these training images; then look at the test images.

    Args:
        task: what the encoder sees of an image.
        data: where the images are.
        numbers: of the training images that have labels.
        encoder: with the weights to begin with.
        recipe: how long, and how fast.
        augmented: whether to change the images as pretraining does.
        seed: of the classifier, the order and the augmentations.
        device: of the encoder.
    """
    torch.manual_seed(seed)
    encoder.module.to(device).to(memory_format=torch.channels_last)
    network = build_classifier(encoder, CLASSES, frozen=False).to(device)
    optimizer = build_optimizer(network, recipe)
    schedule = build_schedule(optimizer, recipe)
    generator = torch.Generator().manual_seed(seed)
    loss = math.nan
    for _ in range(recipe.epochs):
        batches = _epoch(task, data, numbers, recipe.batch_size, generator if augmented else None, generator)
        loss = train_epoch(network, optimizer, batches, device)
        schedule.step()
    steps = recipe.epochs * math.ceil(len(numbers) / recipe.batch_size)
    return Trained(accuracy(network, task.batches(data.test), device).top1, loss, steps)


def _epoch(
    task: Task,
    data: DataSet,
    numbers: Tensor,
    batch_size: int,
    augmentation: torch.Generator | None,
    order: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All labelled images in a new order, in batches that differ in size by one at most: none of a single image."""
    shuffled = numbers[torch.randperm(len(numbers), generator=order)]
    for some in shuffled.tensor_split(math.ceil(len(numbers) / batch_size)):
        images = data.train.images[some]
        seen = task.plain(images) if augmentation is None else task.augmented(images, augmentation)
        yield seen.contiguous(memory_format=torch.channels_last), data.train.labels[some]
