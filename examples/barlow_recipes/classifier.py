"""A linear classifier on an encoder: the published numbers; trained and measured by one process or several together."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from barlow_recipes.optimization import require_all
from barlow_recipes.steps import AUTOCAST
from barlow_recipes.weights import save_safetensors

Batches = Iterable[tuple[Tensor, Tensor]]  # of images (N, C, H, W) and labels (N,), below 0 for what cannot be read
INITIAL_STD = 0.01  # of the linear layer's weight; its bias starts at 0
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained: by SGD, with learning rates that are constant within an epoch."""

    epochs: int
    batch_size: int = 256  # of all processes together; the learning rates are not scaled by it
    lr_classifier: float
    lr_backbone: float | None = None  # None: the encoder is frozen, in eval()
    weight_decay: float  # of the classifier's weight and bias, and of the encoder if it is fine-tuned
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()  # after so many epochs the rates are multiplied by 0.1; (): cosine to 0

    @property
    def frozen(self) -> bool:
        return self.lr_backbone is None

    def factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch, the first is 0; by default (1 + cos(πt)) / 2."""
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


# Source: README and evaluate.py of facebookresearch/barlowtwins. The paper (appendix B.2) has 0.002 for the encoder,
# and ×0.2 after epochs 12 and 16 in place of the cosine.
SEMI_SUPERVISED = Recipe(epochs=20, lr_classifier=0.5, lr_backbone=0.005, weight_decay=0.0)
RECIPES = {
    # Source: the paper, arXiv 2103.03230, appendix B.1; evaluate.py of facebookresearch/barlowtwins.
    "linear": Recipe(epochs=100, lr_classifier=0.3, weight_decay=1e-6),
    "semi-1": SEMI_SUPERVISED,
    "semi-10": SEMI_SUPERVISED,
    # Source of both: the paper, appendix C.1, after Misra & van der Maaten (2020), PIRL, arXiv 1912.01991, appendix C:
    # ×0.1 at "two equally spaced intervals", which we read as thirds. PIRL pools to some 9,000 features, here they are
    # the encoder's own. VISSL's configurations (eval_resnet_8gpu_transfer_*_linear.yaml of facebookresearch/vissl) have
    # the batch size, and the same rate, decay and epochs; but drops after 4, 8 and 12 (24, 48 and 72) epochs and
    # Nesterov's momentum.
    "places205": Recipe(epochs=14, lr_classifier=0.01, weight_decay=5e-4, milestones=(5, 9)),
    "inaturalist18": Recipe(epochs=84, lr_classifier=0.01, weight_decay=5e-4, milestones=(28, 56)),
}
# Top-1 and perhaps top-5, in percent, of the paper's ResNet-50, pretrained on ImageNet for 1000 epochs: tables 1 to 3.
PUBLISHED = {
    "linear": (73.2, 91.0),
    "semi-1": (55.0, 79.2),
    "semi-10": (69.7, 89.3),
    "places205": (54.1,),
    "inaturalist18": (46.5,),
}


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
    require_all(classifier, groups)
    return SGD(groups, lr=recipe.lr_classifier, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def data_parallel(classifier: Classifier) -> nn.Module:
    """What to train in place of the classifier, so that several processes take the step that one would take."""
    if distributed.world_size() == 1 or not classifier.frozen:
        return distributed.data_parallel(classifier)
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
        count, unreadable = distributed.all_reduce([len(truth), len(labels) - len(truth)])
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
    """How good the classifier is on its own process's share of the images; leaves it in eval(). See :class:`Scores`."""
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
    """How often the truth has the greatest logit, and one of the five greatest, of all processes' images."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)  # images; right; among the five
        self.unreadable = 0

    def add(self, logits: Tensor, truth: Tensor) -> None:
        """Count the images with these logits, (N, classes); −∞ is a class that is not among the first five."""
        classes = logits.shape[1]
        greatest, places = logits.topk(min(TOP, classes))
        found = (places == truth[:, None]) & (greatest > -torch.inf)
        for row, some in enumerate((truth, truth[found[:, 0]], truth[found.any(dim=1)])):
            self.counts[row] += torch.bincount(some, minlength=classes)

    def result(self) -> dict[str, Any]:
        """In percent of the readable images, NaN where there are none; and the numbers of readable and other images.

        ``top5`` is 100 of five classes or fewer, ``mean_per_class`` of top1 over the classes that have an image. The
        processes wait for each other.
        """
        images, first, five = summed(self.counts).cpu().double()
        there = images > 0
        return {
            "top1": 100 * float(first.sum() / images.sum()),
            "top5": 100 * float(five.sum() / images.sum()),
            "mean_per_class": 100 * float((first[there] / images[there]).mean()),
            "validation_images": int(images.sum()),
            "unreadable_in_validation": distributed.all_reduce([self.unreadable])[0],
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
    """
    state = dict(classifier.encoder.state_dict())
    for head in encoder.heads or ("fc",):
        state |= {f"{head}.{name}": value for name, value in classifier.fc.state_dict().items()}
    save_safetensors(path, state, encoder, image_size=str(side), classes=json.dumps(classes))
