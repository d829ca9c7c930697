"""Which images have labels, what the trees must look like, and how their images are read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from labelled_tree import make_tree, spoil
from torch import Tensor

from barlow_recipes import distributed
from barlow_recipes.errors import UsageError
from barlow_recipes.labelled import (
    EveryImage,
    Reading,
    TrainingImages,
    Tree,
    Views,
    centre_view,
    centres,
    load_tree,
    training_view,
)  # fmt: skip
from barlow_recipes.labels import from_list, stratified

READING = Reading(image_size=16, batch_size=8, workers=0, seed=7, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return load_tree(make_tree(tmp_path_factory.mktemp("data") / "flowers"))


def names_of(tree: Tree, images: Tensor) -> list[str]:
    return [Path(tree.train.read(int(index))[1]).name for index in images]


def test_a_list_names_its_images(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "10percent.txt"
    path.write_text("n03_2.JPEG\nn01_9.JPEG\n\nn02_0.JPEG\nn01_1.JPEG\n")
    images, source = from_list("--list-10", path, tree)
    assert sorted(names_of(tree, images)) == ["n01_1.JPEG", "n01_9.JPEG", "n02_0.JPEG", "n03_2.JPEG"]
    assert source == "4 images listed in 10percent.txt"
    labels = [tree.classes[label] for label in tree.train.labels[images]]
    assert labels == [name[:3] for name in names_of(tree, images)]


WHOLE = "n01_1.JPEG n02_1.JPEG n03_1.JPEG"
BAD_LISTS = {
    "empty": ("  ", "expected a list of image files, one a line; it is empty"),
    "absent": (f"{WHOLE} n01_77.JPEG n99_1.JPEG x.JPEG", "3 of 6 images are not in train/, the first is n01_77.JPEG"),
    "duplicates": (f"{WHOLE} n02_1.JPEG", "1 of 4 images are listed twice, the first is n02_1.JPEG"),
    "a class without an image": (
        "n01_1.JPEG n01_2.JPEG",
        "expected an image of every class, 2 of 3 have none, the first is n02",
    ),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_list_that_does_not_fit_is_refused(kind: str, tree: Tree, tmp_path: Path) -> None:
    content, message = BAD_LISTS[kind]
    (tmp_path / "1.txt").write_text(content.replace(" ", "\n"))
    with pytest.raises(UsageError) as caught:
        from_list("--list-1", tmp_path / "1.txt", tree)
    assert str(caught.value) == f"--list-1 {tmp_path / '1.txt'}: {message}"


def test_a_list_written_by_windows(tree: Tree, tmp_path: Path) -> None:
    names = [f"n0{c}_0.JPEG" for c in (1, 2, 3)]
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("".join(f"{name}\n" for name in names))
    marked.write_bytes("".join(f"{name}\r\n" for name in names).encode("utf-8-sig"))
    found = [from_list("--list-1", path, tree)[0] for path in (plain, marked)]
    assert torch.equal(*found)


def test_a_list_that_cannot_be_read_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(b"\xff\xd8\xff\xe0 a picture")
    for path in (tmp_path / "1.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError, match="expected a list of image files, one a line"):
            from_list("--lists", path, tree)


@pytest.mark.parametrize(("percent", "of_each"), [(1, 1), (20, 2), (100, 10)])
def test_a_share_is_the_same_of_every_class(percent: int, of_each: int, tree: Tree) -> None:
    images, source = stratified(percent, tree)
    assert torch.bincount(tree.train.labels[images]).tolist() == [of_each] * 3
    assert torch.equal(images, stratified(percent, tree)[0])
    assert source.startswith(f"{3 * of_each} images, {percent} % of each class by a fixed seed")
    assert ("one image for each of 3 classes" in source) == (percent == 1)


def test_a_tree_has_its_classes_in_order(tree: Tree) -> None:
    assert (tree.name, tree.classes) == ("flowers", ["n01", "n02", "n03"])
    assert (len(tree.train), len(tree.validation)) == (30, 12)


def tenfold(rows: int, size: int) -> list[list[int]]:
    order = EveryImage(rows, size, seed=4)
    order.epoch = 3
    assert all(epoch == 3 for batch in order for epoch, _ in batch)
    assert len(order) == len(list(order))
    return [[index for _, index in batch] for batch in order]


def test_every_image_is_seen_once_an_epoch() -> None:
    batches = tenfold(10, 4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(sum(batches, [])) == list(range(10))  # noqa: RUF017
    assert [len(batch) for batch in tenfold(8, 4)] == [4, 4]


@pytest.mark.parametrize(("rows", "size", "processes"), [(10, 4, 3), (9, 4, 2), (9, 8, 3), (5, 7, 3)])
def test_the_ranks_rows_make_up_the_batches(
    rows: int, size: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 by 4, 9 by 8 a last batch of one image, of which one process has it and the others have none."""
    whole, parts = tenfold(rows, size), []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        parts.append(tenfold(rows, size))
    assert [sum(shares, []) for shares in zip(*parts, strict=True)] == whole  # noqa: RUF017
    if rows == 9:
        assert sorted(len(part[-1]) for part in parts) == [0] * (processes - 1) + [1]


def test_a_share_without_rows_is_a_batch_all_the_same(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    one = tree.train.subset(torch.tensor([5]))
    ((images, labels),) = TrainingImages(one, READING).batches(0)
    assert images.shape == (0, 3, 16, 16)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
    assert list(centres(one, READING)) == []


def test_a_view_is_a_pure_function_of_seed_epoch_and_index(tree: Tree) -> None:
    dataset = Views(tree.train, training_view(READING), READING)
    torch.manual_seed(1)
    first, label = dataset[2, 11]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, _ = Views(tree.train, training_view(READING), READING)[2, 11]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, first)
    assert label == 1
    others = [dataset[3, 11], Views(tree.train, training_view(READING), replace(READING, seed=8))[2, 11]]
    assert not any(torch.equal(other, first) for other, _ in others)


def test_an_unreadable_image_has_the_label_below_0(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "flowers", train=2, validation=1)
    spoil(root / "train" / "n02" / "n02_1.JPEG")
    catalogue = load_tree(root).train
    view, label = Views(catalogue, training_view(READING), READING)[0, 3]
    assert (view.shape, label) == ((3, 16, 16), -1)
    ((_, labels),) = centres(catalogue, READING)
    assert labels.tolist() == [0, 0, 1, -1, 2, 2]


@pytest.mark.parametrize("shape", [(300, 400), (500, 333), (180, 200)])
def test_the_centre_is_that_of_torchvision_and_pillow(shape: tuple[int, int]) -> None:
    """evaluate.py takes Resize(256), CenterCrop(224) of a PIL image; of a tensor they round a few pixels otherwise."""
    from torchvision.transforms import v2

    image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    published = v2.Compose([v2.ToPILImage(), v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = (centre_view(replace(READING, image_size=224))(image) * std + mean) * 255
    assert found.shape == (3, 224, 224)
    assert float((found - published(image)).abs().max()) < 1.01


def test_a_view_is_a_bilinear_crop_as_torchvision_takes_it() -> None:
    from torchvision.transforms import v2

    image = torch.randint(256, (3, 90, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    published = v2.Compose([v2.ToPILImage(), v2.RandomResizedCrop(64), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for seed in range(5):
        torch.manual_seed(seed)
        expected = published(image)
        torch.manual_seed(seed)
        found = (training_view(replace(READING, image_size=64))(image) * std + mean) * 255
        assert float((found - expected).abs().max()) < 1.01
