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
    INITIAL_STD,
    Classifier,
    Scores,
    accuracies,
    build_classifier,
    build_optimizer,
    build_schedule,
    train_epoch,
    write_classifier,
)  # fmt: skip
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.published import RECIPES, Recipe

CPU = torch.device("cpu")
IMAGES, FEATURES, CLASSES = 45, 7, 6
LINEAR, SEMI_SUPERVISED = RECIPES["linear"], RECIPES["semi-10"]
HEAVY = Recipe(epochs=3, batch_size=16, lr_classifier=0.3, weight_decay=0.05)  # a decay that shows


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
    classifier = build_classifier(encoder_of(nn.Identity()), CLASSES, frozen=True).double()
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


@pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["linear", "semi-supervised"])
def test_the_learning_rates_fall_by_a_cosine_per_epoch(recipe: Recipe) -> None:
    classifier = build_classifier(convolutional(), CLASSES, frozen=recipe.frozen)
    optimizer = build_optimizer(classifier, recipe)
    schedule = build_schedule(optimizer, recipe)
    highest = [recipe.lr_classifier, *filter(None, [recipe.lr_backbone])]
    for epoch in range(recipe.epochs):
        expected = [lr / 2 * (1 + math.cos(math.pi * epoch / recipe.epochs)) for lr in highest]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0] * len(highest), abs=1e-12)


@pytest.mark.parametrize(("name", "drops"), [("places205", (5, 9)), ("inaturalist18", (28, 56))])
def test_the_learning_rates_of_transfer_fall_twice(name: str, drops: tuple[int, int]) -> None:
    recipe = RECIPES[name]
    expected = [0.01 * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(recipe.epochs)]
    rates = [recipe.lr_classifier * recipe.factor(epoch) for epoch in range(recipe.epochs)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert len(set(rates)) == 3


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


@pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["frozen", "fine-tuned"])
def test_the_groups_are_the_published_ones(recipe: Recipe) -> None:
    """All of them decay, biases and norms too; the encoder is there only if it is fine-tuned."""
    classifier = build_classifier(convolutional(), CLASSES, frozen=recipe.frozen)
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


@pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["frozen", "fine-tuned"])
def test_a_frozen_encoder_keeps_every_bit(recipe: Recipe) -> None:
    """Its running statistics too; a fine-tuned one moves everywhere."""
    encoder = convolutional()
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    classifier = build_classifier(encoder, CLASSES, frozen=recipe.frozen)
    optimizer = build_optimizer(classifier, recipe)
    for _ in range(2):
        train_epoch(classifier, optimizer, batches(*photographs(), size=5), CPU)
        accuracies(classifier, batches(*photographs()), CPU)
    same = [torch.equal(value, before[name]) for name, value in encoder.module.state_dict().items()]
    assert same == [recipe.frozen] * len(before)
    assert any(value.grad is not None for value in encoder.module.parameters()) != recipe.frozen


def test_the_first_weights_are_small_and_the_bias_is_zero() -> None:
    torch.manual_seed(0)
    classifier = build_classifier(encoder_of(nn.Identity(), 2048), 100, frozen=True)
    assert float(classifier.fc.weight.detach().std()) == pytest.approx(INITIAL_STD, rel=0.01)
    assert not classifier.fc.bias.any()


def with_unreadable(images: Tensor, labels: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Black images of label −1 in between."""
    wider, marked = [], []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if number % every == 0:
            wider.append(torch.zeros_like(image))
            marked.append(torch.tensor(-1))
        wider.append(image)
        marked.append(label)
    return torch.stack(wider), torch.stack(marked)


@pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["frozen", "fine-tuned"])
def test_unreadable_images_are_as_if_they_were_absent(recipe: Recipe) -> None:
    images, labels = photographs()
    found = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        classifier = build_classifier(convolutional(), CLASSES, frozen=recipe.frozen)
        parts = [with_unreadable(*part, every=2) if spoilt else part for part in batches(images, labels, 6)]
        if spoilt:
            parts.insert(1, (torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1])))  # nothing to learn from: no step
        epoch = train_epoch(classifier, build_optimizer(classifier, recipe), parts, CPU)
        found.append((epoch, classifier.state_dict(), accuracies(classifier, parts, CPU)))
    (epoch, state, whole), (spoilt_epoch, spoilt_state, rest) = found
    assert spoilt_epoch == epoch._replace(unreadable=8)
    assert all(torch.equal(value, spoilt_state[name]) for name, value in state.items())
    assert rest == whole | {"unreadable_in_validation": 8}
    assert whole["validation_images"] == 12


def test_an_epoch_without_a_readable_image_has_no_loss_and_takes_no_step() -> None:
    classifier = build_classifier(convolutional(), CLASSES, frozen=False)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    nothing = [(torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1]))]
    loss, unreadable = train_epoch(classifier, build_optimizer(classifier, SEMI_SUPERVISED), nothing, CPU)
    assert math.isnan(loss)
    assert unreadable == 2
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert math.isnan(accuracies(classifier, nothing, CPU)["top1"])


class Table(nn.Module):
    """Features that are the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def reading_off() -> Classifier:
    classifier = Classifier(Table(), 10, 10, frozen=True)
    with torch.no_grad():
        classifier.fc.weight.copy_(torch.eye(10))
    return classifier


def test_accuracies_are_those_of_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)  # classes 7, 8 and 9 have no image
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels, strict=True)]
    of_class = [[rank == 0 for rank, label in zip(ranks, labels.tolist(), strict=True) if label == c] for c in range(7)]
    found = accuracies(reading_off(), batches(logits, labels, 33), CPU)
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


@pytest.mark.parametrize("recipe", [LINEAR, SEMI_SUPERVISED], ids=["frozen", "fine-tuned"])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "timm/test_vit", "timm/test_efficientnet"])
def test_the_libraries_load_the_classifier_and_see_the_same(arch: str, recipe: Recipe, tmp_path: Path) -> None:
    """Plain torchvision and plain timm, by the names and shapes of their own models."""
    torch.manual_seed(0)
    encoder, images = build_encoder(arch), torch.rand(4, 3, 160, 160)
    classifier = build_classifier(encoder, CLASSES, frozen=recipe.frozen)
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
        classifier = build_classifier(convolutional(), CLASSES, frozen=True)
        train_epoch(classifier, build_optimizer(classifier, LINEAR), batches(images, labels, 4), CPU, precision)
        weights[precision] = classifier.fc.weight.detach()
    assert weights["bf16"].dtype == torch.float32
    assert F.cosine_similarity(*(weight.flatten() for weight in weights.values()), dim=0) > 0.999
    assert not torch.equal(*weights.values())


def test_training_leaves_the_mode_to_the_encoder() -> None:
    """A frozen one stays in eval(), however it is asked."""
    for frozen in (True, False):
        classifier = build_classifier(convolutional(), CLASSES, frozen=frozen)
        classifier.train()
        assert classifier.encoder.training != frozen
        assert not classifier.eval().encoder.training
