"""What a representation is worth as it is: nearest neighbours and linear classification, on held-out images."""

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from barlow_recipes.classifier import Batches, Scores, autocast, readable, summed
from barlow_recipes.data import Probe
from barlow_recipes.distributed import all_reduce, shard, world_size
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import require

Represent = Callable[[Tensor], Tensor]  # images (N, C, H, W) to features (N, F)
NEIGHBOURS = 10  # of the probes; those of the evaluation are a flag
TEMPERATURE = 0.07
MOST_SIMILARITIES = 2**27  # at a time on each process: half a gigabyte
DRAWS = 30  # of the few labelled images: with one per class, the accuracy of a draw varies by several points


def raw_pixels(images: Tensor) -> Tensor:
    """The image itself as a feature vector, reduced to 32×32 where it is larger."""
    height, width = images.shape[-2:]
    return F.adaptive_avg_pool2d(images, (min(height, 32), min(width, 32))).flatten(1)


def untrained(backbone: nn.Module, batches: Batches, device: torch.device) -> nn.Module:
    """A copy of the backbone with its weights and, a stronger baseline, batch statistics measured on the images."""
    twin = copy.deepcopy(backbone)
    readable = (images[labels >= 0] for images, labels in batches)
    # A single image has no variance, and a BatchNorm may refuse it.
    update_bn((images for images in readable if len(images) > 1), twin, device)
    return twin.eval()


class Features(NamedTuple):
    values: Tensor  # (n, F) float32, on the device
    labels: Tensor  # (n,), there
    unreadable: int


@torch.no_grad()
def extract(represent: Represent, batches: Batches, device: torch.device, precision: str = "fp32") -> Features:
    """The features of the readable images; what is not finite counts as 0: an encoder that diverged is at chance."""
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


def evaluate(represent: Represent, probe: Probe, device: torch.device) -> dict[str, float]:
    """Top-1 accuracies on the queries, in percent: ``knn``, and as the probe asks for ``linear_N`` and ``linear_all``.

    The representation is centred on the bank's mean, each vector scaled to length 1. Where no image of bank or
    queries can be read, there is no accuracy.
    """
    bank, labels, unreadable = extract(represent, probe.bank, device)
    queries, truth, unreadable_queries = extract(represent, probe.queries, device)
    accuracy: dict[str, float] = {"unreadable_in_probe": unreadable + unreadable_queries}
    if not len(bank) or not len(queries):
        return accuracy
    mean = bank.mean(dim=0)
    bank, queries = F.normalize(bank - mean, dim=1), F.normalize(queries - mean, dim=1)
    accuracy["knn"] = knn_accuracy(bank, labels, queries, truth)
    for count in probe.labels_per_class:
        accuracy[f"linear_{count}"] = few_label_accuracy(bank, labels, queries, truth, count, DRAWS)
    if probe.linear:
        accuracy["linear_all"] = linear_accuracy(bank, labels, queries, truth)
    return accuracy


def most_similar(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines (Q, k) and labels (Q, k) of the k nearest images; −∞ where there are fewer.

    Of (M, F) ``bank`` with its (M,) ``labels``, and (Q, F) ``queries``; all rows have length 1.
    """
    own_k = min(k, len(bank))
    together = max(1, MOST_SIMILARITIES // max(1, len(bank)))
    cosines, found = map(
        torch.cat, zip(*((some @ bank.T).topk(own_k) for some in queries.split(together)), strict=True)
    )
    return F.pad(cosines, (0, k - own_k), value=-torch.inf), F.pad(labels[found], (0, k - own_k))


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The votes (Q, classes) of the nearest images, each with weight exp(cosine / 0.07); −∞ for a class without any.

    Source: Wu et al. (2018), arXiv 1805.01978, section 3.4.
    """
    votes = similarity.new_zeros(len(similarity), classes)
    votes.scatter_add_(1, labels, (similarity / TEMPERATURE).exp())
    return votes.masked_fill_(votes == 0, -torch.inf)


def require_images(**parts: Tensor) -> None:
    """ValueError where one of them is empty: of no images there is no accuracy."""
    for name, rows in parts.items():
        if not len(rows):
            raise ValueError(f"{name}: expected one image or more, got none: can the files be read?")


def knn_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = NEIGHBOURS) -> float:
    """Percent of queries (N, F) whose k nearest of the bank (M, F), or all if M < k, vote for the truth.

    ValueError where either is empty, here and in the other accuracies.
    """
    require_images(bank=bank, queries=queries)
    classes = int(torch.cat([labels, truth]).max()) + 1
    found = vote(*most_similar(bank, labels, queries, k), classes).argmax(dim=1)
    return 100 * int((found == truth).sum()) / len(queries)


@torch.no_grad()
def nearest(
    encoder: Encoder, bank: Batches, queries: Batches, classes: int, device: torch.device, precision: str, k: int
) -> dict[str, Any]:
    """How often the k nearest images of the bank vote for the truth: see :class:`.Scores`.

    Features are centred and scaled as in :func:`evaluate`. Of several processes each gives its own part of bank and
    queries. The features of the bank stay on the devices: those of ImageNet by a ResNet-50 take 10.5 GB, and twice that
    for a moment, on all of them together.
    """
    own, asked = (extract(encoder.module.eval(), part, device, precision) for part in (bank, queries))
    vectors, asking = (part.values.reshape(-1, encoder.features) for part in (own, asked))  # of no image, too
    size, unreadable = all_reduce([len(vectors), own.unreadable])
    mean = summed(vectors.sum(dim=0)) / max(size, 1)
    vectors, asking = (F.normalize(features.sub_(mean), dim=1, out=features) for features in (vectors, asking))
    everyones, truth = (torch.cat(_everyones(rows)) for rows in (asking, asked.labels))
    similarity, labels = most_similar(vectors, own.labels, everyones, min(k, size))
    if world_size() > 1:  # the nearest of all are among the nearest of each process
        similarity, labels = (torch.cat(_everyones(values), dim=1) for values in (similarity, labels))
        similarity, found = similarity.topk(min(k, size))
        labels = labels.gather(1, found)
    scores, mine = Scores(classes, device), shard(len(truth))
    scores.unreadable = asked.unreadable
    scores.add(vote(similarity[mine], labels[mine], classes), truth[mine])
    return scores.result() | {"unreadable_in_bank": unreadable}


def _everyones(rows: Tensor) -> list[Tensor]:
    """The rows of each process, of which some may have none."""
    if world_size() == 1:
        return [rows]
    utilities: Any = require("torchmetrics.utilities.distributed", "the accuracies")
    return list(utilities.gather_all_tensors(rows.contiguous()))


def linear_accuracy(train: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    """Percent of queries that scikit-learn's logistic regression, fitted to all of ``train``, gets right.

    20,000 images in 1,000 classes, with 2,048 features, take 44 s on one CPU core; 2,000 in 10 take 0.04 s.
    """
    require_images(train=train, queries=queries)
    if len(labels.unique()) < 2:  # scikit-learn refuses them
        return 100 * float((truth == labels[0]).float().mean())
    linear_model: Any = require("sklearn.linear_model", "the linear probe")
    # With hundreds of classes the gradient begins below scikit-learn's tolerance of 1e-4, and nothing would be fitted.
    model = linear_model.LogisticRegression(C=10.0, max_iter=1000, tol=min(1e-4, 0.01 / len(labels.unique())))
    model.fit(train.cpu().numpy(), labels.cpu().numpy())
    return 100 * model.score(queries.cpu().numpy(), truth.cpu().numpy())


def few_label_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, per_class: int, draws: int
) -> float:
    """The mean of :func:`linear_accuracy` over draws of ``per_class`` labelled images, the same for every method."""
    require_images(bank=bank, queries=queries)
    accuracies = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
        few = torch.cat([shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()])
        accuracies.append(linear_accuracy(bank[few], labels[few], queries, truth))
    return fmean(accuracies)
