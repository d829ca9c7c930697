"""Nearest neighbours among many images: every process keeps the features of its own, and all answer together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from barlow_recipes.classifier import Accuracy, Score, autocast
from barlow_recipes.distributed import own_rows, totals, world_size
from barlow_recipes.encoders import Encoder
from barlow_recipes.images import Loader
from barlow_recipes.probes import TEMPERATURE

NEIGHBOURS = 20
MOST_SIMILARITIES = 2**27  # at a time on each process: half a gigabyte


class Features(NamedTuple):
    values: Tensor  # (n, F) float32, on the device
    labels: Tensor  # (n,)
    unreadable: int


@torch.no_grad()
def nearest(
    encoder: Encoder,
    bank: Loader,
    queries: Loader,
    classes: int,
    device: torch.device,
    precision: str = "fp32",
    k: int = NEIGHBOURS,
) -> tuple[Accuracy, int]:
    """How often the k nearest images of the bank vote for the truth, each with weight exp(cosine / 0.07).

    As in the probes of pretraining, features are centred on the bank's mean and scaled to length 1. Of several
    processes each gives its own part of bank and queries. The features of the bank stay on the devices: those of
    ImageNet by a ResNet-50 take 10.5 GB, on all of them together.

    Returns:
        The accuracy on the queries, where a class without a vote is never among the first five; and how many images of
        the bank could not be read.

    Source: Wu et al. (2018), arXiv 1805.01978, section 3.4.
    """
    encoder.module.eval()
    own, asked = (extract(encoder, part, device, precision) for part in (bank, queries))
    (size,) = totals([len(own.values)])
    mean = _total(own.values.sum(dim=0)) / max(size, 1)
    for features in (own.values, asked.values):
        features.sub_(mean)
        features.div_(features.norm(dim=1, keepdim=True).clamp_min_(1e-12))
    everyones, truth = gathered(asked.values), gathered(asked.labels)
    score = Score(classes, device)
    together = max(1, MOST_SIMILARITIES * world_size() // max(size, 1))  # the same number on all processes
    for queried, labels in zip(everyones.split(together), truth.split(together), strict=True):
        votes, mine = _votes(own, queried, classes, min(k, size)), own_rows(len(queried))
        score.add(votes[mine], labels[mine])
    return score.accuracy(asked.unreadable), totals([own.unreadable])[0]


def _votes(own: Features, queries: Tensor, classes: int, k: int) -> Tensor:
    """(Q, classes) of all processes' images, −∞ for a class that no neighbour has.

    The nearest k of all are among the nearest k of each process.
    """
    similarity = queries.new_full((len(queries), k), -torch.inf)
    labels = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    own_k = min(k, len(own.values))
    similarity[:, :own_k], found = (queries @ own.values.T).topk(own_k)
    labels[:, :own_k] = own.labels[found]
    similarity, labels = (_beside(values) for values in (similarity, labels))
    similarity, found = similarity.topk(k)
    votes = similarity.new_zeros(len(queries), classes)
    votes.scatter_add_(1, labels.gather(1, found), (similarity / TEMPERATURE).exp())
    return votes.masked_fill_(votes == 0, -torch.inf)


def _beside(rows: Tensor) -> Tensor:
    """The columns of all processes, (Q, k) of each, as (Q, W·k)."""
    return gathered(rows).view(world_size(), *rows.shape).transpose(0, 1).flatten(1)


def extract(encoder: Encoder, images: Loader, device: torch.device, precision: str) -> Features:
    """The features of this process's readable images; what is not finite in them counts as 0."""
    most = len(images.dataset)  # type: ignore[arg-type]
    values, labels = torch.zeros(most, encoder.features, device=device), torch.zeros(most, dtype=torch.int64)
    filled = unreadable = 0
    for pixels, targets in images:
        readable = targets >= 0
        here = slice(filled, filled + int(readable.sum()))
        unreadable += int((~readable).sum())
        if here.start < here.stop:
            with autocast(device, precision):
                found = encoder.module(pixels[readable].to(device, non_blocking=True))
            values[here] = found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            labels[here] = targets[readable]
        filled = here.stop
    return Features(values[:filled], labels[:filled].to(device), unreadable)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, one process's after the other's."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyones = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyones, padded)
    return torch.cat([part[: int(count)] for part, count in zip(everyones, counts, strict=True)])


def _total(values: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(values)
    return values
