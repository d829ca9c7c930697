"""What a representation is worth: nearest neighbours and few-label linear classification, on held-out images."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from .data import Probe
from .errors import require

Batches = Iterable[tuple[Tensor, Tensor]]  # of images and labels
Represent = Callable[[Tensor], Tensor]  # images (N, C, H, W) to features (N, F)

NEIGHBOURS, TEMPERATURE = 10, 0.07
DRAWS = 30  # of the few labelled images: with one per class, the accuracy of a draw varies by several points


def raw_pixels(images: Tensor) -> Tensor:
    """The image itself as a feature vector, reduced to 32×32 where it is larger."""
    height, width = images.shape[-2:]
    return F.adaptive_avg_pool2d(images, (min(height, 32), min(width, 32))).flatten(1)


def untrained(backbone: nn.Module, images: Batches, device: torch.device) -> nn.Module:
    """A copy of the backbone with its weights and, a stronger baseline, batch statistics measured on the images."""
    twin = copy.deepcopy(backbone)
    update_bn(images, twin, device)
    return twin.eval()


@torch.no_grad()
def extract(represent: Represent, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Features (N, F) in float32 and labels (N) of the readable images, on the device, and how many were not."""
    features, labels = [], []
    for images, targets in batches:
        features.append(represent(images.to(device, non_blocking=True)).float())
        labels.append(targets.to(device, non_blocking=True))
    all_features, all_labels = torch.cat(features), torch.cat(labels)
    readable = all_labels >= 0
    return all_features[readable], all_labels[readable], int((~readable).sum())


def evaluate(represent: Represent, probe: Probe, device: torch.device) -> dict[str, float]:
    """Top-1 accuracies on the queries, in percent: ``knn``, ``linear_1``, ``linear_5``, ``linear_all`` as asked for.

    Every representation is treated alike: centred on the bank's mean, each vector scaled to length 1.
    """
    bank, labels, unreadable = extract(represent, probe.bank, device)
    queries, truth, unreadable_queries = extract(represent, probe.queries, device)
    mean = bank.mean(dim=0)
    bank, queries = F.normalize(bank - mean, dim=1), F.normalize(queries - mean, dim=1)
    accuracy = {"knn": knn_accuracy(bank, labels, queries, truth)}
    for count in probe.labels_per_class:
        accuracy[f"linear_{count}"] = few_label_accuracy(bank, labels, queries, truth, count, DRAWS)
    if len(probe.labels_per_class) > 1:
        accuracy["linear_all"] = linear_accuracy(bank, labels, queries, truth)
    return accuracy | {"unreadable_in_probe": unreadable + unreadable_queries}


def knn_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = NEIGHBOURS) -> float:
    """Percent of queries whose k nearest neighbours vote for the truth, each with weight exp(cosine / 0.07).

    Args:
        bank: (M, F), rows of length 1.
        labels: (M,), from 0.
        queries: (N, F), rows of length 1.
        truth: (N,).
        k: neighbours, at most M are taken.

    Source: Wu et al. (2018), arXiv 1805.01978, section 3.4.
    """
    correct = 0
    classes = int(torch.cat([labels, truth]).max()) + 1
    for chunk, targets in zip(queries.split(1024), truth.split(1024), strict=True):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)))
        votes = similarity.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(dim=1) == targets).sum())
    return 100 * correct / len(queries)


def linear_accuracy(train: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    """Percent of queries that logistic regression, fitted to all of ``train``, gets right."""
    linear_model = require("sklearn.linear_model", "the linear probe")
    classifier = linear_model.LogisticRegression(C=10.0, max_iter=1000)
    classifier.fit(train.cpu().numpy(), labels.cpu().numpy())
    return 100 * float(classifier.score(queries.cpu().numpy(), truth.cpu().numpy()))


def few_label_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, per_class: int, draws: int
) -> float:
    """The mean of :func:`linear_accuracy` over draws of ``per_class`` labelled images, the same for every method."""
    accuracies = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
        chosen = [shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()]
        few = torch.cat(chosen)
        accuracies.append(linear_accuracy(bank[few], labels[few], queries, truth))
    return sum(accuracies) / len(accuracies)
