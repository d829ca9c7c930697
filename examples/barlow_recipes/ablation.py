"""One run of the ablations: pretrain a small encoder on the built-in data in some way, and see what it is worth."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from barlow_loss import cross_correlation
from barlow_loss.diagnostics import effective_rank
from barlow_recipes import probes, small
from barlow_recipes.data import hold_out, seed_of
from barlow_recipes.digits import augment_digits
from barlow_recipes.encoders import build_encoder
from barlow_recipes.methods import METHODS, Method
from barlow_recipes.small import DIGITS, DataSet, Labelled
from barlow_recipes.views import PAPER, draw, small_views

COLORED = "coloured digits"
ARCHS = {DIGITS: "digits-cnn", COLORED: "small-cnn"}
# For images of 8 pixels in which colours mean nothing.
RECIPES = tuple(
    replace(recipe, crop_scale=(0.5, 1.0), color_jitter=(0.8, 0.8, 0.8, 0.4), blur=0.0, flip=0.0) for recipe in PAPER
)
WEIGHT_DECAY = 1e-4
BATCH_SIZE = 128
CORNER = 24  # features of a cross-correlation matrix that are kept to be drawn
PER_CLASS, DRAWS = 5, 20  # labelled images of the linear classifier, and how often they are drawn
IMAGES = 28_000  # that a run sees, twice each
LEFT_OUT = {  # of COLORED, what is set so that a change is left out
    "grayscale": {"grayscale": 0.0},
    "color jitter": {"jitter": 0.0},
    "solarize": {"solarize": 0.0},
}


class Way(NamedTuple):
    """How an encoder is pretrained: what identifies a run, but for its seed and its learning rate."""

    method: str = "Barlow Twins"
    data: str = DIGITS
    batch_size: int = BATCH_SIZE
    without: tuple[str, ...] = ()  # augmentations
    options: tuple[tuple[str, Any], ...] = ()  # of the method

    @classmethod
    def of(cls, fields: list[Any]) -> "Way":
        """As JSON gives them."""
        method, data, batch_size, without, options = fields
        return cls(method, data, batch_size, tuple(without), tuple((name, value) for name, value in options))

    def but(self, **options: Any) -> "Way":
        return self._replace(options=tuple(options.items()))


def measure(way: Way, rate: float, seed: int, data: DataSet, effort: float = 1.0) -> dict[str, Any]:
    """Pretrain on the training images; classify the test images with few labelled ones, and look at the embeddings.

    Returns:
        ``accuracy`` in percent; ``same`` and ``other``, the mean cosines of two views of the same test image and of
        different ones, and ``rank``, the effective rank of their embeddings; ``C``, the first rows and columns of the
        cross-correlation matrix; ``seconds`` of the processor.
    """
    started = time.process_time()
    method = pretrain(way, rate, seed, data, effort)
    found = {"accuracy": accuracy(method.encoder, data), **describe(method, way, data.test.images)}
    return found | {"seconds": round(time.process_time() - started, 2)}


def pretrain(way: Way, rate: float, seed: int, data: DataSet, effort: float) -> Method:
    """With AdamW, a tenth of the steps for the rate to rise, and a cosine for it to fall."""
    torch.manual_seed(seed)
    built = build_encoder(ARCHS[way.data])
    method: Method = METHODS[way.method](built.module, built.features, **dict(way.options))
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    steps = max(2, round(effort * IMAGES / way.batch_size))
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed_of(seed))
    for step, images in zip(range(steps), endless(data.train, way.batch_size, generator), strict=False):
        loss = method(*views(way, images, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        method.after_step((step + 1) / steps)
    return method.eval()


def accuracy(encoder: torch.nn.Module, data: DataSet) -> float:
    """Of a linear classifier, with so many labels a class, the mean over draws of the labelled images."""
    parts = (data.train.of(data.bank), data.test)
    bank, asked = (probes.extract(encoder, part.batches(), torch.device("cpu")) for part in parts)
    mean = bank.values.mean(dim=0)
    features, queries = (F.normalize(part.values - mean, dim=1) for part in (bank, asked))
    return probes.few_label_accuracy(features, bank.labels, queries, asked.labels, PER_CLASS, DRAWS)


@torch.no_grad()
def describe(method: Method, way: Way, images: Tensor) -> dict[str, Any]:
    """How alike and how redundant the embeddings are of two views of images that were not trained on."""
    generator = torch.Generator().manual_seed(seed_of(0))
    z1, z2 = (method.embed(x) for x in views(way._replace(without=()), images, generator))
    cosines = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T
    same, n = cosines.diagonal().mean(), len(cosines)
    found = {"same": same, "other": (cosines.mean() * n - same) / (n - 1), "rank": effective_rank(z1)}
    corner = cross_correlation(z1, z2)[:CORNER, :CORNER]
    return {name: round(float(value), 3) for name, value in found.items()} | {
        "C": [[round(c, 2) for c in row] for row in corner.tolist()]
    }


def endless(part: Labelled, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of images, each epoch in a new order; what is left of an epoch is left out."""
    size = min(batch_size, len(part.images))
    while True:
        order = torch.randperm(len(part.images), generator=generator)
        for numbers in order[: len(order) // size * size].split(size):
            yield part.images[numbers]


def views(way: Way, images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Two of each image."""
    if way.data == DIGITS:
        return [augment_digits(images, generator, way.without) for _ in range(2)]
    left_out = {name: value for change in way.without for name, value in LEFT_OUT[change].items()}
    return [small_views(images, draw(replace(recipe, **left_out), len(images), generator)) for recipe in RECIPES]


def for_search(data: DataSet) -> DataSet:
    """The training images alone, of which some take the place of the test images."""
    labels = data.train.labels
    held_out = hold_out(labels, 1 / 5, at_most=200)
    train, test = (data.train.of(part.nonzero()[:, 0]) for part in (~held_out, held_out))
    bank = hold_out(train.labels, 1, at_most=200).nonzero()[:, 0]
    return DataSet(data.name, train, test, bank)


@cache  # a process does many runs
def load(name: str) -> DataSet:
    """The digits, grey, or each in a colour of its own on black: (N, 3, 8, 8) uint8."""
    data = small.load(DIGITS, "")
    if name == COLORED:
        data = data._replace(name=name, train=_colored(data.train, 0), test=_colored(data.test, 1))
    return data


def _colored(part: Labelled, seed: int) -> Labelled:
    colors = torch.rand(len(part.images), 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return part._replace(images=(part.images * (0.2 + 0.8 * colors)).mul(255).round().byte())
