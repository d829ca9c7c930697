"""Nearest neighbours: of one process's images, or among many of which every process keeps the features of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow_recipes.classifier import Batches, Scores, autocast, readable, summed
from barlow_recipes.distributed import own_rows, totals, world_size
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import require

NEIGHBOURS, TEMPERATURE = 20, 0.07
MOST_SIMILARITIES = 2**27  # at a time on each process: half a gigabyte


class Features(NamedTuple):
    values: Tensor  # (n, F) float32, on the device
    labels: Tensor  # (n,), there
    unreadable: int


@torch.no_grad()
def extract(
    represent: Callable[[Tensor], Tensor], batches: Batches, device: torch.device, precision: str = "fp32"
) -> Features:
    """The features of the readable images, in batches of images (N, C, H, W) and labels (N,).

    What is not finite in them counts as 0: an encoder that has diverged is at chance.
    """
    unreadable, values = 0, [torch.empty(0, 0, device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for pixels, targets in batches:
        images, truth = readable(pixels, targets, device)
        unreadable += len(targets) - len(truth)
        if len(truth):
            with autocast(device, precision):
                found = represent(images).float()
            values.append(found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
            labels.append(truth)
    return Features(torch.cat(values[1:] or values), torch.cat(labels), unreadable)


def vote(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, *, shared: bool = False) -> Tensor:
    """The votes (Q, classes) of the k nearest images, each with weight exp(cosine / 0.07); −∞ for a class without any.

    Of (M, F) ``bank`` with its (M,) ``labels``, and (Q, F) ``queries``, all rows have length 1. With ``shared`` each
    process has a part of the bank, and the same queries.

    Source: Wu et al. (2018), arXiv 1805.01978, section 3.4.
    """
    similarity = queries.new_full((len(queries), k), -torch.inf)
    nearest = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    own_k = min(k, len(bank))
    similarity[:, :own_k], found = (queries @ bank.T).topk(own_k)
    nearest[:, :own_k] = labels[found]
    if shared:  # the nearest of all are among the nearest of each process
        similarity, nearest = (torch.cat(_everyones(values), dim=1) for values in (similarity, nearest))
        similarity, found = similarity.topk(k)
        nearest = nearest.gather(1, found)
    votes = similarity.new_zeros(len(queries), classes)
    votes.scatter_add_(1, nearest, (similarity / TEMPERATURE).exp())
    return votes.masked_fill_(votes == 0, -torch.inf)


@torch.no_grad()
def nearest(
    encoder: Encoder,
    bank: Batches,
    queries: Batches,
    classes: int,
    device: torch.device,
    precision: str = "fp32",
    k: int = NEIGHBOURS,
) -> dict[str, Any]:
    """How often the k nearest images of the bank vote for the truth.

    As in the probes of pretraining, features are centred on the bank's mean and scaled to length 1. Of several
    processes each gives its own part of bank and queries. The features of the bank stay on the devices: those of
    ImageNet by a ResNet-50 take 10.5 GB, and twice that for a moment, on all of them together. See
    :meth:`.Scores.result`; a class without a vote is never among the first five.
    """
    own, asked = (extract(encoder.module.eval(), part, device, precision) for part in (bank, queries))
    vectors, asking = (part.values.reshape(-1, encoder.features) for part in (own, asked))  # of no image, too
    size, unreadable = totals([len(vectors), own.unreadable])
    mean = summed(vectors.sum(dim=0)) / max(size, 1)
    vectors, asking = (F.normalize(features.sub_(mean), dim=1, out=features) for features in (vectors, asking))
    everyones, truth = (torch.cat(_everyones(rows)) for rows in (asking, asked.labels))
    scores = Scores(classes, device)
    scores.unreadable = asked.unreadable
    together = max(1, MOST_SIMILARITIES * world_size() // max(size, 1))  # the same number on all processes
    for some, labels in zip(everyones.split(together), truth.split(together), strict=True):
        votes = vote(vectors, own.labels, some, classes, min(k, size), shared=world_size() > 1)
        mine = own_rows(len(some))
        scores.add(votes[mine], labels[mine])
    return scores.result() | {"unreadable_in_bank": unreadable}


def _everyones(rows: Tensor) -> list[Tensor]:
    """The rows of each process, of which some may have none."""
    if world_size() == 1:
        return [rows]
    utilities: Any = require("torchmetrics.utilities.distributed", "the accuracies")
    return list(utilities.gather_all_tensors(rows.contiguous()))
