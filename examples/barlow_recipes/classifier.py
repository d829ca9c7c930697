"""A linear classifier on an encoder: how it is trained and measured, by one process or by several together."""

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from barlow_recipes import distributed
from barlow_recipes.encoders import Encoder
from barlow_recipes.published import Recipe
from barlow_recipes.steps import AUTOCAST

Batches = Iterable[tuple[Tensor, Tensor]]  # of images (N, C, H, W) and labels (N,), below 0 for what cannot be read
INITIAL_STD = 0.01  # of the classifier's weight
TOP = 5


class Classifier(nn.Module):
    """encoder: images to features; fc: features to logits. A frozen encoder stays in eval(), without gradients."""

    def __init__(self, encoder: nn.Module, features: int, classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.fc, self.frozen = encoder, nn.Linear(features, classes), frozen
        nn.init.normal_(self.fc.weight, std=INITIAL_STD)
        nn.init.zeros_(self.fc.bias)
        encoder.requires_grad_(not frozen)
        self.train()

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.frozen and not len(images):  # a share without rows; not every encoder takes it
            return cast("Tensor", self.fc(self.fc.weight.new_zeros(0, self.fc.in_features)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would make ties among a thousand logits
            return cast("Tensor", self.fc(features.to(self.fc.weight.dtype)))

    @property
    def learner(self) -> nn.Module:
        """The part that training changes."""
        return self.fc if self.frozen else self


def build_classifier(encoder: Encoder, classes: int, *, frozen: bool) -> Classifier:
    """Put a new linear layer on the encoder itself, not on a copy: weight from N(0, 0.01²), bias 0."""
    return Classifier(encoder.module, encoder.features, classes, frozen=frozen)


def build_optimizer(classifier: Classifier, recipe: Recipe) -> SGD:
    """SGD, two groups at most: weight and bias of the linear layer; then, if fine-tuned, all of the encoder.

    As published, and unlike pretraining, weight decay and momentum are the same for all of them.
    """
    groups = [{"params": list(classifier.fc.parameters()), "lr": recipe.lr_classifier}]
    if recipe.lr_backbone is not None:
        groups.append({"params": list(classifier.encoder.parameters()), "lr": recipe.lr_backbone})
    return SGD(groups, lr=recipe.lr_classifier, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def build_schedule(optimizer: SGD, recipe: Recipe) -> LRScheduler:
    """The learning rates of every epoch; to be stepped once after each, also after its validation."""
    return LambdaLR(optimizer, recipe.factor)


def shared(classifier: Classifier) -> nn.Module:
    """What to train in place of the classifier, so that several processes take the step that one would take."""
    if distributed.world_size() == 1 or not classifier.frozen:
        return distributed.synchronized(classifier)
    network = DistributedDataParallel(classifier)  # frozen statistics need no synchronisation
    network.broadcast_buffers = False
    return network


def train_epoch(
    network: nn.Module, optimizer: SGD, batches: Batches, device: torch.device, precision: str = "fp32"
) -> float:
    """Take a step for every batch.

    Of several processes each gives its own rows of every batch, in as many batches as the others; shares may differ in
    length and be empty. The gradient is that of the mean over the whole batch. Images that cannot be read are left out.

    Args:
        network: the classifier, or what :func:`shared` made of it.
        optimizer: of :func:`build_optimizer`.
        batches: images on any device, labels on the CPU.
        device: of the network.
        precision: "fp32", or "bf16" for autocast.

    Returns:
        The mean loss over the epoch's images, of all processes; NaN if none could be read.
    """
    network.train()
    losses: list[Tensor] = []
    images_seen = 0
    for images, labels in batches:
        readable = labels >= 0
        (count,) = distributed.totals([int(readable.sum())])
        if not count:
            continue
        own, truth = (part[readable].to(device, non_blocking=True) for part in (images, labels))
        with autocast(device, precision):
            logits = network(own)
        loss = _loss_sum(logits, truth)
        optimizer.zero_grad()
        # DistributedDataParallel takes the mean over the processes, however few rows one of them has.
        (loss * (distributed.world_size() / count)).backward()
        optimizer.step()
        losses.append(loss.detach())
        images_seen += count
    return _summed(losses) / images_seen if images_seen else math.nan


class Accuracy(NamedTuple):
    """Accuracies in percent over the readable images of all processes; NaN where there are none."""

    top1: float
    top5: float  # 100 where there are five classes or fewer
    images: int  # the readable ones
    unreadable: int  # left out
    mean_per_class: float  # of top1, over the classes that have an image


@torch.no_grad()
def accuracy(network: nn.Module, batches: Batches, device: torch.device, precision: str = "fp32") -> Accuracy:
    """How often the truth has the greatest logit, and one of the five greatest; leaves the network in eval().

    Of several processes each gives its own part of the images; they wait for each other at the end alone.

    Args:
        network: the classifier, or what :func:`shared` made of it.
        batches: images on any device, labels on the CPU.
        device: of the network.
        precision: "fp32", or "bf16" for autocast.
    """
    classifier = cast("Classifier", getattr(network, "module", network))  # of DistributedDataParallel
    classifier.eval()
    score, unreadable = Score(classifier.fc.out_features, device), 0
    for images, labels in batches:
        readable = labels >= 0
        unreadable += int((~readable).sum())
        if readable.any():
            own, truth = (part[readable].to(device, non_blocking=True) for part in (images, labels))
            with autocast(device, precision):
                logits = classifier(own)
            score.add(logits, truth)
    return score.accuracy(unreadable)


class Score:
    """For each class its images, and how many of them were right: at first, and among the first five."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, truth: Tensor) -> None:
        """Count the images with these logits, (N, classes); −∞ is a class that is not among the first."""
        greatest, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
        found = (classes == truth[:, None]) & (greatest > -torch.inf)
        rows = torch.stack([torch.ones_like(found[:, 0]), found[:, 0], found.any(dim=1)])
        self.counts.index_add_(1, truth, rows.long())

    def accuracy(self, unreadable: int) -> Accuracy:
        """Of all processes, which wait for each other."""
        counts = torch.tensor(distributed.totals([unreadable, *self.counts.flatten().tolist()]))
        images, right, among_five = counts[1:].view(3, -1).double()
        total, top1, top5 = (float(row.sum()) for row in (images, right, among_five))
        percent = 100 / total if total else math.nan
        of_each = right[images > 0] / images[images > 0]
        return Accuracy(top1 * percent, top5 * percent, int(total), int(counts[0]), 100 * float(of_each.mean()))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST.get(precision), precision != "fp32")


def _loss_sum(logits: Tensor, truth: Tensor) -> Tensor:
    """Σ cross-entropy, in float32 or the float64 of the logits."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), truth, reduction="sum")


def _summed(values: list[Tensor]) -> float:
    """The sum over all values of all processes, in float64."""
    total = torch.stack(values).cpu().double().sum() if values else torch.zeros((), dtype=torch.float64)
    if distributed.world_size() > 1:
        dist.all_reduce(total)
    return float(total)
