"""Which images have labels, what the trees must look like, and how their images are read."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from labelled_tree import make_tree, spoil
from torch import Tensor
from torchvision.transforms import v2

from barlow_recipes import distributed
from barlow_recipes.errors import UsageError
from barlow_recipes.labelled import (
    EveryImage,
    ImageFolders,
    ReadingSettings,
    Views,
    centre_view,
    centres,
    from_list,
    load_tree,
    stratified,
    training_images,
    training_view,
)

READING = ReadingSettings(image_size=16, batch_size=8, workers=0, seed=7, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> ImageFolders:
    return load_tree(make_tree(tmp_path_factory.mktemp("data") / "flowers"))


def names_of(tree: ImageFolders, images: Tensor) -> list[str]:
    return [Path(tree.train.read(int(index))[1]).name for index in images]


def test_a_list_names_its_images(tree: ImageFolders, tmp_path: Path) -> None:
    path = tmp_path / "10percent.txt"
    path.write_text("\ufeffn03_2.JPEG\nn01_9.JPEG\r\n\nn02_0.JPEG\nn01_1.JPEG\n")  # Windows has had it
    images, source = from_list(path, tree)
    assert sorted(names_of(tree, images)) == ["n01_1.JPEG", "n01_9.JPEG", "n02_0.JPEG", "n03_2.JPEG"]
    assert source == "4 images listed in 10percent.txt"
    labels = [tree.classes[label] for label in tree.train.labels[images]]
    assert labels == [name[:3] for name in names_of(tree, images)]


WHOLE = "n01_1.JPEG n02_1.JPEG n03_1.JPEG"
BAD_LISTS = {
    "  ": "; 3 of 3 classes have none, the first is n01",
    f"{WHOLE} n01_77.JPEG n99_1.JPEG x.JPEG": "; 3 of 6 images are not in train/, the first is n01_77.JPEG",
    f"{WHOLE} n02_1.JPEG": "; 1 of 4 images are listed twice",
    "n01_1.JPEG n01_2.JPEG": "; 2 of 3 classes have none, the first is n02",
    "\xff\xd8\xff\xe0 a picture": " (",
}


@pytest.mark.parametrize("content", BAD_LISTS)
def test_a_list_that_does_not_fit_is_refused(content: str, tree: ImageFolders, tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text(content.replace(" ", "\n"), encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        from_list(path, tree)
    assert f"--lists {path}: expected a list of image files, one a line{BAD_LISTS[content]}" in str(caught.value)


@pytest.mark.parametrize(("percent", "of_each"), [(1, 1), (20, 2), (100, 10)])
def test_a_share_is_the_same_of_every_class(percent: int, of_each: int, tree: ImageFolders) -> None:
    images, source = stratified(percent, tree)
    assert torch.bincount(tree.train.labels[images]).tolist() == [of_each] * 3
    assert torch.equal(images, stratified(percent, tree)[0])
    assert source == f"{3 * of_each} images, {percent} % of each class or one, by a fixed seed, not a published list"


def epoch_of(rows: int, size: int) -> list[list[int]]:
    order = EveryImage(rows, size, seed=4)
    order.epoch = 3
    assert len(order) == len(list(order))
    return [[index for epoch, index in batch if epoch == 3] for batch in order]


@pytest.mark.parametrize(("rows", "size", "processes"), [(10, 4, 3), (8, 4, 2), (9, 4, 2), (9, 8, 3), (5, 7, 3)])
def test_every_image_is_seen_once_an_epoch_by_one_process(
    rows: int, size: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 by 4, 9 by 8 a last batch of one image, of which one process has it and the others have none."""
    whole, parts = epoch_of(rows, size), []
    assert sorted(chain(*whole)) == list(range(rows))
    assert {len(batch) for batch in whole[:-1]} <= {size}
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        parts.append(epoch_of(rows, size))
    assert [[*chain(*shares)] for shares in zip(*parts, strict=True)] == whole


def test_a_share_without_rows_is_a_batch_all_the_same(tree: ImageFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    one = tree.train.subset(torch.tensor([5]))
    ((images, labels),) = training_images(one, READING)
    assert images.shape == (0, 3, 16, 16)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
    assert list(centres(one, READING)) == []


def test_a_view_is_a_pure_function_of_seed_epoch_and_index(tree: ImageFolders) -> None:
    dataset = Views(tree.train, READING)
    torch.manual_seed(1)
    first, label = dataset[2, 11]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, _ = Views(tree.train, READING)[2, 11]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, first)
    assert label == 1
    others = [dataset[3, 11], Views(tree.train, replace(READING, seed=8))[2, 11]]
    assert not any(torch.equal(other, first) for other, _ in others)


def test_an_unreadable_image_has_the_label_below_0(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "flowers", train=2, validation=1)
    spoil(root / "train" / "n02" / "n02_1.JPEG")
    catalogue = load_tree(root).train
    view, label = Views(catalogue, READING)[0, 3]
    assert (view.shape, label) == ((3, 16, 16), -1)
    ((_, labels),) = centres(catalogue, READING)
    assert labels.tolist() == [0, 0, 1, -1, 2, 2]


def difference(view: Callable[[Tensor], Tensor], published: list[v2.Transform], image: Tensor) -> float:
    """Of what evaluate.py does to a PIL image; of a tensor torchvision rounds a few pixels otherwise."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.manual_seed(0)
    expected = v2.Compose([v2.ToPILImage(), *published, v2.PILToTensor()])(image)
    torch.manual_seed(0)
    return float(((view(image) * std + mean) * 255 - expected).abs().max())


@pytest.mark.parametrize("shape", [(300, 400), (500, 333), (180, 200)])
def test_the_views_are_those_of_torchvision_and_pillow(shape: tuple[int, int]) -> None:
    image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reading = replace(READING, image_size=224)
    assert difference(centre_view(reading), [v2.Resize(256), v2.CenterCrop(224)], image) < 1.01
    assert difference(training_view(reading), [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()], image) < 1.01
