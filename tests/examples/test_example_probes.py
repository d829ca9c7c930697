"""The probes: exact where the answer is known, at chance where there is nothing to find."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow_recipes import probes
from barlow_recipes.data import Probe

CPU = torch.device("cpu")


def clusters(per_class: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes around the unit vectors of four dimensions."""
    labels = torch.arange(4).repeat(per_class)
    generator = torch.Generator().manual_seed(seed)
    points = F.one_hot(labels, 4) + noise * torch.randn(len(labels), 4, generator=generator)
    return F.normalize(points.float(), dim=1), labels


def test_separate_classes_are_found_and_shuffled_labels_are_not() -> None:
    bank, labels = clusters(100, noise=0.1)
    queries, truth = clusters(300, noise=0.1, seed=1)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    for accuracy in (probes.knn_accuracy, probes.linear_accuracy):
        assert accuracy(bank, labels, queries, truth) == 100
        assert accuracy(bank, shuffled, queries, truth) < 60
    assert probes.few_label_accuracy(bank, labels, queries, truth, per_class=1, draws=9) == 100


def test_neighbours_vote_with_the_published_weights() -> None:
    """One close neighbour of class 0 against two far ones of class 1, weighted by exp(cosine/0.07)."""

    def accuracy(cosine: float, k: int) -> float:
        far = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
        bank = torch.stack([torch.tensor([1.0, 0.0]), far, far])
        return probes.knn_accuracy(bank, torch.tensor([0, 1, 1]), bank[:1], torch.tensor([0]), k)

    edge = 1 - 0.07 * torch.tensor(2.0).log().item()  # there, two votes weigh as much as one
    assert accuracy(edge - 0.01, k=3) == 100
    assert accuracy(edge + 0.01, k=3) == 0
    assert accuracy(edge + 0.01, k=1) == 100
    assert accuracy(0.0, k=50) == 100  # more neighbours than the bank holds


def test_few_labels_are_few_labels() -> None:
    """One label per class is worth less than five, and five less than all, where the classes overlap."""
    bank, labels = clusters(100, noise=0.5)
    queries, truth = clusters(300, noise=0.5, seed=1)
    one, again, five = (probes.few_label_accuracy(bank, labels, queries, truth, count, 30) for count in (1, 1, 5))
    assert 25 < one < five < probes.linear_accuracy(bank, labels, queries, truth) < 100
    assert one == again  # the same draws for every method


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_the_linear_probe_separates_many_classes() -> None:
    """The gradient of a fit to hundreds of classes begins below scikit-learn's tolerance: it would fit nothing."""
    generator = torch.Generator().manual_seed(0)
    labels, centres = torch.arange(2000), torch.randn(2000, 1024, generator=generator)
    bank, queries = (F.normalize(centres + 0.5 * torch.randn(2000, 1024, generator=generator), dim=1) for _ in range(2))
    assert probes.linear_accuracy(bank, labels, queries, labels) > 99


def test_labels_with_a_gap_and_labels_of_a_single_class() -> None:
    bank, labels = clusters(10, noise=0.1)
    some = labels != 2
    assert probes.linear_accuracy(bank[some], labels[some], bank, labels) == 75
    assert probes.linear_accuracy(bank[:1], labels[:1], bank, labels) == 25


def test_evaluate_leaves_out_what_cannot_be_read() -> None:
    images, labels = clusters(20, noise=0.1)
    broken = labels.clone()
    broken[:3] = -1
    probe = Probe([(images, broken)], [(images, labels), (images, broken)], linear=True, labels_per_class=(1, 5))
    found = probes.evaluate(lambda x: x, probe, CPU)
    assert found == {"knn": 100, "linear_1": 100, "linear_5": 100, "linear_all": 100, "unreadable_in_probe": 6}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_that_has_diverged_is_at_chance(value: float) -> None:
    batch = clusters(5, noise=0.1)
    found = probes.evaluate(lambda x: torch.full_like(x, value), Probe([batch], [batch], True, (1,)), CPU)
    assert found == {"knn": 25, "linear_1": 25, "linear_all": 25, "unreadable_in_probe": 0}


def test_evaluate_measures_what_is_asked_for_where_there_are_images() -> None:
    batch = clusters(5, noise=0.1)
    broken = batch[0], torch.full_like(batch[1], -1)
    found = probes.evaluate(lambda x: x, Probe([batch], [batch], False, (2, 3)), CPU)
    assert set(found) == {"knn", "linear_2", "linear_3", "unreadable_in_probe"}
    for bank, queries in ((broken, batch), (batch, broken)):
        assert probes.evaluate(lambda x: x, Probe([bank], [queries], True, (1,)), CPU) == {"unreadable_in_probe": 20}


@pytest.mark.parametrize("empty", ["bank", "queries"])
@pytest.mark.parametrize("measure", ["knn", "linear", "few_label"])
def test_of_no_images_there_is_no_accuracy(measure: str, empty: str) -> None:
    rows, labels = clusters(5, noise=0.1)
    none = rows[:0], labels[:0]
    bank, queries = (none, (rows, labels)) if empty == "bank" else ((rows, labels), none)
    more = {"per_class": 1, "draws": 2} if measure == "few_label" else {}
    name = "train" if (measure, empty) == ("linear", "bank") else empty
    with pytest.raises(ValueError, match=f"{name}: expected one image or more, got none: can the files be read?"):
        getattr(probes, f"{measure}_accuracy")(*bank, *queries, **more)


@pytest.mark.parametrize(("size", "features"), [((1, 8, 8), 64), ((3, 224, 224), 3072), ((13, 40, 20), 13 * 32 * 20)])
def test_pixels_are_reduced_to_at_most_32(size: tuple[int, int, int], features: int) -> None:
    assert probes.raw_pixels(torch.rand(2, *size)).shape == (2, features)


def test_the_untrained_baseline_measures_its_statistics_and_leaves_the_model_alone() -> None:
    """Without single images, which a BatchNorm refuses, and without unreadable ones, which are black."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, black = 5 + 3 * torch.randn(64, 4), torch.full((3, 4), 1e6)
    mixed = torch.cat([images, black]), torch.tensor([0] * 64 + [-1] * 3)
    one_readable = torch.cat([images[:1], black]), torch.tensor([0, -1, -1, -1])
    none, one = (black, torch.tensor([-1, -1, -1])), (torch.randn(1, 4), torch.zeros(1))
    twin = probes.untrained(model, [mixed, one_readable, none, one], CPU)
    assert not twin.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(twin[0].weight, model[0].weight)  # type: ignore[index, union-attr]
    features = twin(images)
    torch.testing.assert_close(features.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(8), atol=1e-3, rtol=0)
