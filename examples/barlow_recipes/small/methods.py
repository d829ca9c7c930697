"""The parts of the evaluation on the built-in data, each a function of plain values: a process does them in turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes import probes
from barlow_recipes.encoders import build_encoder
from barlow_recipes.small.data import KNN, MOST, TASKS, DataSet, Task, load
from barlow_recipes.small.supervised import recipe_for, train_with_labels
from barlow_recipes.weights import load_encoder

RAW, UNTRAINED, PRETRAINED = "raw pixels", "untrained encoder", "pretrained encoder"
SCRATCH, FINE_TUNED = "trained from scratch", "pretrained, fine-tuned"
METHODS = (RAW, UNTRAINED, SCRATCH, PRETRAINED, FINE_TUNED)
DRAWS = {"1": 3}  # of the labelled images, for every seed: with one of each class they decide about several points
Row = dict[str, Any]
Represent = Callable[[Tensor], Tensor]


@contextmanager
def timed(found: Row) -> Iterator[None]:
    """Note the seconds, and those of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def probe(task: str, source: str, weights: str, columns: list[str], seed: int, device: str) -> Row:
    """What pixels, the untrained and the pretrained encoder are worth without changing them.

    Args:
        task: a name of TASKS.
        source: of Fashion-MNIST.
        weights: the pretrained encoder's file.
        columns: which of the task's.
        seed: of the untrained encoder, and of the draw of labels.
        device: where the encoder computes.

    Returns:
        Its rows: an accuracy of each method in each column; and what it took.
    """
    found: Row = {}
    where = torch.device(device)
    with timed(found):
        doing = TASKS[task]
        data = load(doing.data, source)
        torch.manual_seed(seed)
        initial = build_encoder(doing.arch).module.to(where)
        bank = partial(doing.batches, data.train, data.bank)
        representations: dict[str, Represent] = {
            RAW: probes.raw_pixels,
            UNTRAINED: probes.untrained(initial, bank(), where),
            PRETRAINED: load_encoder(Path(weights), doing.arch).module.to(where).eval(),
        }

        def asked(method: str) -> list[str]:
            """Pixels without a draw of labels are the same for every seed."""
            repeated = method == RAW and seed > 0
            return [column for column in columns if not (repeated and column in (KNN, MOST))]

        found["rows"] = [
            {"task": task, "seed": seed, "method": method, "labels": column, "draw": draw, "accuracy": accuracy}
            for method, represent in representations.items()
            for column, draw, accuracy in probed(represent, doing, data, asked(method), seed, where)
        ]
    return found


def probed(
    represent: Represent, task: Task, data: DataSet, columns: list[str], seed: int, device: torch.device
) -> Iterator[tuple[str, int, float]]:
    """The accuracy, in percent of the test images, of nearest neighbours and of linear classifiers.

    Every representation is treated as by :func:`~barlow_recipes.probes.evaluate`: centred on the mean of the bank,
    which needs no labels, each vector scaled to length 1.
    """
    draws = {
        (column, draw): data.labelled(column, draw_seed(seed, draw))
        for column in columns
        for draw in range(DRAWS.get(column, 1))
    }
    wanted = torch.cat([data.bank, *draws.values()]).unique()
    features, labels, _ = probes.extract(represent, task.batches(data.train, wanted), device)
    queries, truth, _ = probes.extract(represent, task.batches(data.test), device)
    place = torch.full((len(data.train.labels),), -1)
    place[wanted] = torch.arange(len(wanted))
    mean = features[place[data.bank]].mean(dim=0)
    features, queries = F.normalize(features - mean, dim=1), F.normalize(queries - mean, dim=1)
    for (column, draw), numbers in draws.items():
        chosen = place[numbers].to(device)
        measure = probes.knn_accuracy if column == KNN else probes.linear_accuracy
        yield column, draw, measure(features[chosen], labels[chosen], queries, truth)


def draw_seed(seed: int, draw: int) -> int:
    """Of the labelled images: every seed has draws of its own."""
    return 1000 * seed + draw


def supervise(task: str, source: str, weights: str | None, column: str, seed: int, effort: float, device: str) -> Row:
    """Train the same encoder with the same labels.

    Args:
        task: a name of TASKS.
        source: of Fashion-MNIST.
        weights: the pretrained encoder's file, to be fine-tuned with augmentation; None: from scratch, both with
            augmentation and, where the task asks for it, without.
        column: how many labels.
        seed: of the encoder's first weights, and of the draw of labels.
        effort: a factor of the number of steps.
        device: where to train.

    Returns:
        Its rows, and what it took.
    """
    found: Row = {"rows": []}
    where = torch.device(device)
    with timed(found):
        doing = TASKS[task]
        data = load(doing.data, source)
        for draw in range(DRAWS.get(column, 1)):
            numbers = data.labelled(column, draw_seed(seed, draw))
            for augmented in (True,) if weights or not doing.tries_without(column) else (True, False):
                torch.manual_seed(seed)
                encoder = load_encoder(Path(weights), doing.arch) if weights else build_encoder(doing.arch)
                recipe = recipe_for(len(numbers), augmented=augmented, effort=effort)
                trained = train_with_labels(
                    doing, data, numbers, encoder, recipe, augmented=augmented, seed=seed, device=where
                )
                row = {"task": task, "seed": seed, "method": FINE_TUNED if weights else SCRATCH, "labels": column}
                found["rows"].append(row | {"draw": draw, "augmented": augmented, **trained._asdict()})
    return found
