"""The classifier on fixed features against plain algebra, its groups and schedule, and what is frozen."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from barlow_recipes.classifier import (
    RECIPES,
    Classifier,
    Recipe,
    Scores,
    accuracies,
    build_optimizer,
    train_epoch,
    write_classifier,
)
from barlow_recipes.encoders import Encoder, build_encoder

CPU = torch.device("cpu")
IMAGES, FEATURES, CLASSES = 45, 7, 6
LINEAR, SEMI_SUPERVISED = RECIPES["linear"], RECIPES["semi-10"]
HEAVY = Recipe(epochs=3, batch_size=16, lr_classifier=0.3, weight_decay=0.05)  # a decay that shows
BOTH = pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["frozen", "fine-tuned"])


def encoder_of(module: nn.Module, features: int = FEATURES) -> Encoder:
    return Encoder(module, features, "test", "imagenet")


def convolutional() -> Encoder:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return encoder_of(nn.Sequential(*layers), 5)


def fixed_features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(IMAGES, FEATURES, dtype=torch.float64, generator=generator)
    return features, torch.randint(CLASSES, (IMAGES,), generator=generator)


def batches(images: Tensor, labels: Tensor, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(size), labels.split(size), strict=True)


def test_an_epoch_on_fixed_features_is_that_of_plain_algebra() -> None:
    """Three batches, the last of 13: d = g + wd·p; m = 0.9 m + d; p −= lr·m, with g from softmax(XWᵀ + b) − Y."""
    features, labels = fixed_features()
    torch.manual_seed(1)
    classifier = Classifier(encoder_of(nn.Identity()), CLASSES, frozen=True).double()
    weight, bias = (parameter.detach().clone() for parameter in (classifier.fc.weight, classifier.fc.bias))
    momenta, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for x, truth in batches(features, labels):
        logits = x @ weight.T + bias
        exponents = logits.exp()
        softmax = exponents / exponents.sum(dim=1, keepdim=True)
        losses += [-math.log(row[label]) for row, label in zip(softmax.tolist(), truth.tolist(), strict=True)]
        error = (softmax - torch.eye(CLASSES, dtype=torch.float64)[truth]) / len(x)
        for p, m, g in zip((weight, bias), momenta, (error.T @ x, error.sum(dim=0)), strict=True):
            m.copy_(HEAVY.momentum * m + (g + HEAVY.weight_decay * p))
            p.sub_(HEAVY.lr_classifier * m)
    loss, _ = train_epoch(classifier, build_optimizer(classifier, HEAVY), batches(features, labels), CPU)
    for found, expected in ((classifier.fc.weight, weight), (classifier.fc.bias, bias)):
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)
    assert loss == pytest.approx(sum(losses) / IMAGES, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "drops"),
    [("linear", ()), ("semi-1", ()), ("semi-10", ()), ("places205", (5, 9)), ("inaturalist18", (28, 56))],
)
def test_the_learning_rates_fall_by_a_cosine_per_epoch_or_twice(name: str, drops: tuple[int, ...]) -> None:
    recipe = RECIPES[name]
    cosine = [(1 + math.cos(math.pi * epoch / recipe.epochs)) / 2 for epoch in range(recipe.epochs)]
    steps = [0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(recipe.epochs)]
    found = [recipe.factor(epoch) for epoch in range(recipe.epochs)]
    assert found == pytest.approx(steps if drops else cosine, rel=1e-12)


def test_the_published_numbers() -> None:
    """Of evaluate.py in facebookresearch/barlowtwins, and of PIRL."""
    published = {
        "linear": (100, 256, 0.3, None, 1e-6, 0.9),
        "semi-1": (20, 256, 0.5, 0.005, 0.0, 0.9),
        "semi-10": (20, 256, 0.5, 0.005, 0.0, 0.9),
        "places205": (14, 256, 0.01, None, 5e-4, 0.9),
        "inaturalist18": (84, 256, 0.01, None, 5e-4, 0.9),
    }
    assert {name: tuple(vars(recipe).values())[:6] for name, recipe in RECIPES.items()} == published


@BOTH
def test_the_groups_are_the_published_ones(recipe: Recipe) -> None:
    """All of them decay, biases and norms too; the encoder is there only if it is fine-tuned. They begin small."""
    classifier = Classifier(convolutional(), CLASSES, frozen=recipe.frozen)
    assert not classifier.fc.bias.any()
    wide = Classifier(encoder_of(nn.Identity(), 2048), 100, frozen=True)
    assert float(wide.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    groups = build_optimizer(classifier, recipe).param_groups
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    encoder = ["encoder.0.weight", "encoder.1.weight", "encoder.1.bias"]
    assert found == [["fc.weight", "fc.bias"]] + ([] if recipe.frozen else [encoder])
    for group in groups:
        assert (group["weight_decay"], group["momentum"]) == (recipe.weight_decay, 0.9)
        assert (group["nesterov"], group["dampening"]) == (False, 0)


def photographs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(CLASSES, (12,), generator=generator)


@BOTH
def test_a_frozen_encoder_keeps_every_bit(recipe: Recipe) -> None:
    """Its running statistics too; a fine-tuned one moves everywhere."""
    encoder = convolutional()
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    classifier = Classifier(encoder, CLASSES, frozen=recipe.frozen)
    optimizer = build_optimizer(classifier, recipe)
    for _ in range(2):
        train_epoch(classifier, optimizer, batches(*photographs(), size=5), CPU)
        assert (classifier.training, classifier.encoder.training) == (True, not recipe.frozen)
        accuracies(classifier, batches(*photographs()), CPU)
    same = [torch.equal(value, before[name]) for name, value in encoder.module.state_dict().items()]
    assert same == [recipe.frozen] * len(before)
    assert any(value.grad is not None for value in encoder.module.parameters()) != recipe.frozen


@BOTH
def test_unreadable_images_are_as_if_they_were_absent(recipe: Recipe) -> None:
    """Black images of label −1 in between, and batches of nothing else: no step."""
    images, labels = photographs()
    nothing = (torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1]))
    found = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        classifier = Classifier(convolutional(), CLASSES, frozen=recipe.frozen)
        parts = [*batches(images, labels, 6)]
        if spoilt:
            parts = [tuple(torch.cat([bad, good]) for bad, good in zip(nothing, part, strict=True)) for part in parts]
            parts.insert(1, nothing)
        loss, unreadable = train_epoch(classifier, build_optimizer(classifier, recipe), parts, CPU)
        assert unreadable == 6 * spoilt
        found.append((loss, classifier.state_dict(), accuracies(classifier, parts, CPU)))
    (loss, state, whole), (spoilt_loss, spoilt_state, rest) = found
    assert spoilt_loss == loss
    assert all(torch.equal(value, spoilt_state[name]) for name, value in state.items())
    assert rest == whole | {"unreadable_in_validation": 6}
    assert whole["validation_images"] == 12
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    loss, unreadable = train_epoch(classifier, build_optimizer(classifier, recipe), [nothing], CPU)
    assert (math.isnan(loss), unreadable) == (True, 2)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert math.isnan(accuracies(classifier, [nothing], CPU)["top1"])


def test_accuracies_are_those_of_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)  # classes 7, 8 and 9 have no image
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels, strict=True)]
    of_class = [[rank == 0 for rank, label in zip(ranks, labels.tolist(), strict=True) if label == c] for c in range(7)]
    classifier = Classifier(encoder_of(nn.Identity(), 10), 10, frozen=True)
    classifier.fc.weight.data.copy_(torch.eye(10))
    found = accuracies(classifier, batches(logits, labels, 33), CPU)
    assert found["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 200, abs=1e-9)
    assert found["top5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 200, abs=1e-9)
    expected = 100 * sum(sum(right) / len(right) for right in of_class) / 7
    assert found["mean_per_class"] == pytest.approx(expected, abs=1e-9)
    assert abs(found["mean_per_class"] - found["top1"]) > 0.01  # the classes differ in size
    assert (found["validation_images"], found["unreadable_in_validation"]) == (200, 0)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_of_few_classes_all_but_the_excluded_ones_are_among_the_first_five(classes: int) -> None:
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % classes
    for excluded, expected in ((False, 100), (True, 100 - 100 * int((labels == 0).sum()) / 20)):
        scores = Scores(classes, CPU)
        scores.add(logits.index_fill(1, torch.tensor([0]), -torch.inf) if excluded else logits, labels)
        assert scores.result()["top5"] == pytest.approx(expected)


@BOTH
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "timm/test_vit", "timm/test_efficientnet"])
def test_the_libraries_load_the_classifier_and_see_the_same(arch: str, recipe: Recipe, tmp_path: Path) -> None:
    """Plain torchvision and plain timm, by the names and shapes of their own models."""
    torch.manual_seed(0)
    encoder, images = build_encoder(arch), torch.rand(4, 3, 160, 160)
    classifier = Classifier(encoder, CLASSES, frozen=recipe.frozen)
    train_epoch(classifier, build_optimizer(classifier, recipe), [(images, torch.arange(4))], CPU)
    path = tmp_path / "classifier.safetensors"
    write_classifier(path, classifier, encoder, [f"class {number}" for number in range(CLASSES)], 160)
    expected = classifier.eval()(images)
    if arch.startswith("timm/"):
        models = [timm.create_model(arch.removeprefix("timm/"), num_classes=CLASSES, checkpoint_path=path)]
    else:
        models = [torchvision.models.get_model(arch, num_classes=CLASSES)]
        models[0].load_state_dict(load_file(path))
    if arch == "resnet18":
        models.append(timm.create_model(arch, num_classes=CLASSES, checkpoint_path=path))
    for model in models:
        assert torch.equal(model.eval()(images), expected)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"])[5] == "class 5"
        assert file.metadata()["arch"] == arch


def test_bf16_trains_the_same_classifier_but_for_rounding() -> None:
    images, labels = photographs()
    weights = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        classifier = Classifier(convolutional(), CLASSES, frozen=True)
        train_epoch(classifier, build_optimizer(classifier, LINEAR), batches(images, labels, 4), CPU, precision)
        weights[precision] = classifier.fc.weight.detach()
    assert weights["bf16"].dtype == torch.float32
    assert F.cosine_similarity(*(weight.flatten() for weight in weights.values()), dim=0) > 0.999
    assert not torch.equal(*weights.values())
