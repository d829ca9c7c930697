"""A linear classifier on an encoder: trained and measured by one process or several together, kept as a file."""

import json
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from barlow_recipes import distributed
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import require
from barlow_recipes.outputs import replacing
from barlow_recipes.published import Recipe
from barlow_recipes.steps import AUTOCAST

Batches = Iterable[tuple[Tensor, Tensor]]  # of images (N, C, H, W) and labels (N,), below 0 for what cannot be read
INITIAL_STD = 0.01  # of the linear layer's weight; its bias starts at 0
TOP = 5


class Classifier(nn.Module):
    """The encoder itself, not a copy, and a new linear layer ``fc``; a frozen encoder stays in eval(), no gradients."""

    def __init__(self, encoder: Encoder, classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.fc, self.frozen = encoder.module, nn.Linear(encoder.features, classes), frozen
        nn.init.normal_(self.fc.weight, std=INITIAL_STD)
        nn.init.zeros_(self.fc.bias)
        self.encoder.requires_grad_(not frozen)
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


def build_optimizer(classifier: Classifier, recipe: Recipe) -> SGD:
    """SGD, two groups at most: weight and bias of the linear layer; then, if fine-tuned, all of the encoder.

    As published, and unlike pretraining, weight decay and momentum are the same for all of them.
    """
    groups = [{"params": list(classifier.fc.parameters()), "lr": recipe.lr_classifier}]
    if recipe.lr_backbone is not None:
        groups.append({"params": list(classifier.encoder.parameters()), "lr": recipe.lr_backbone})
    return SGD(groups, lr=recipe.lr_classifier, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def shared(classifier: Classifier) -> nn.Module:
    """What to train in place of the classifier, so that several processes take the step that one would take."""
    if distributed.world_size() == 1 or not classifier.frozen:
        return distributed.synchronized(classifier)
    network = DistributedDataParallel(classifier)  # frozen statistics need no synchronisation
    network.broadcast_buffers = False
    return network


def readable(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those that could be read, on the device."""
    there = labels >= 0
    return images[there].to(device, non_blocking=True), labels[there].to(device, non_blocking=True)


def train_epoch(
    network: nn.Module,
    optimizer: SGD,
    batches: Batches,
    device: torch.device,
    precision: str = "fp32",
    after_step: Callable[[], object] = lambda: None,
) -> tuple[float, int]:
    """Take a step for every batch, by the gradient of the mean over its images; those that cannot be read are left out.

    Of several processes each gives its own rows of every batch, in as many batches as the others; shares may differ in
    length and be empty. Labels are on the CPU.

    Returns:
        The mean loss over the readable images of all processes, NaN if there are none; and how many were left out.
    """
    network.train()
    losses = [torch.zeros((), device=device)]
    seen = left_out = 0
    for images, labels in batches:
        own, truth = readable(images, labels, device)
        count, unreadable = distributed.totals([len(truth), len(labels) - len(truth)])
        seen, left_out = seen + count, left_out + unreadable
        if count:
            with autocast(device, precision):
                logits = network(own)
            loss = F.cross_entropy(logits, truth, reduction="sum")
            optimizer.zero_grad()
            # DistributedDataParallel takes the mean over the processes, however few rows one of them has.
            (loss * (distributed.world_size() / count)).backward()
            optimizer.step()
            losses.append(loss.detach())
        after_step()
    total = summed(torch.stack(losses).cpu().double().sum())
    return float(total) / seen if seen else math.nan, left_out


@torch.no_grad()
def accuracies(network: Classifier, batches: Batches, device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """How often the truth has the greatest logit, and one of the five greatest; leaves the network in eval().

    Of several processes each gives its own images; they wait for each other at the end. See :meth:`Scores.result`.
    """
    network.eval()
    scores = Scores(network.fc.out_features, device)
    for images, labels in batches:
        own, truth = readable(images, labels, device)
        scores.unreadable += len(labels) - len(truth)
        if len(truth):
            with autocast(device, precision):
                scores.add(network(own), truth)
    return scores.result()


class Scores:
    """Accuracies of logits, counted by torchmetrics over all processes."""

    def __init__(self, classes: int, device: torch.device) -> None:
        metrics: Any = require("torchmetrics.classification", "the accuracies")
        self.classes, self.unreadable = classes, 0
        # Five more classes, which are never true, make a top-5 of any number of them.
        self.counts = [metrics.MulticlassStatScores(classes + TOP, k, average=None).to(device) for k in (1, TOP)]

    def add(self, logits: Tensor, truth: Tensor) -> None:
        """Count the images with these logits, (N, classes); −∞ is a class that is not among the first five."""
        more = logits.new_full((len(logits), TOP), torch.finfo(logits.dtype).min)
        for metric in self.counts:
            metric.update(torch.cat([logits, more], dim=1), truth)

    def result(self) -> dict[str, Any]:
        """Of all processes, which wait for each other.

        Returns:
            In percent of the readable images, NaN where there are none: ``top1``; ``top5``, which is 100 of five
            classes or fewer; ``mean_per_class``, of top1 over the classes that have an image. Then how many images
            were readable, and how many were not and left out.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)  # a process without images
            first, five = (metric.compute().cpu()[: self.classes].double() for metric in self.counts)
        right, images = first[:, 0], first[:, 4]
        there = images > 0
        (unreadable,) = distributed.totals([self.unreadable])
        return {
            "top1": 100 * float(right.sum() / images.sum()),
            "top5": 100 * float(five[:, 0].sum() / images.sum()),
            "mean_per_class": 100 * float((right[there] / images[there]).mean()),
            "validation_images": int(images.sum()),
            "unreadable_in_validation": unreadable,
        }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST.get(precision), precision != "fp32")


def summed(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if distributed.world_size() > 1:
        dist.all_reduce(values)
    return values


def write_classifier(path: Path, classifier: Classifier, encoder: Encoder, classes: list[str], side: int) -> None:
    """Encoder and linear layer as one safetensors file, under the names that the architecture has in its library.

    torchvision and timm load it into a model of as many classes; its metadata have the names of the classes as JSON,
    and the side of the images.

    Raises:
        Aborted: it cannot be written.
    """
    library: Any = require("safetensors.torch", path.name)
    state = dict(classifier.encoder.state_dict())
    for head in encoder.heads or ("fc",):
        state |= {f"{head}.{name}": value for name, value in classifier.fc.state_dict().items()}
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    metadata = {"format": "pt", "arch": encoder.arch, "stem": encoder.stem, "image_size": str(side)}
    with replacing(path) as temporary:
        temporary.write_bytes(library.save(tensors, metadata | {"classes": json.dumps(classes)}))
