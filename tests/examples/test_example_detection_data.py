"""Annotations of detection: what is read of the two layouts, and what is left out, counted, or refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools")

import shapes
from pycocotools import mask as coding

from barlow_recipes.detection.data import (
    BROKEN,
    DetectionData,
    Images,
    Split,
    clipped,
    flipped,
    load_data,
    read,
    run_lengths,
)
from barlow_recipes.detection.settings import COCO
from barlow_recipes.errors import Aborted, UsageError

NAN, INF = float("nan"), float("inf")
XML = "VOC2007/Annotations/00000000.xml"  # of the first image, and of the first part
JSON = "annotations/instances_train2017.json"
ANOTHER = '"images": [{"id": 9, "file_name": "10000000.jpg", "height": 48, "width": 48}, '
Edit = Callable[[Path], Any]


def runs(counts: Any) -> dict[str, Any]:
    return {"size": [4, 6], "counts": counts}


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return shapes.voc_tree(tmp_path / "voc", train=6, test=3, side=48)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return shapes.coco_tree(tmp_path / "coco", train=4, test=3, side=48)


def drawn(seed: int, count: int) -> list[list[shapes.Shape]]:
    """What the generator drew."""
    return [shapes.picture(np.random.default_rng([seed, number]), 48)[1] for number in range(count)]


def boxes(split: Split) -> list[list[list[float]]]:
    return [example.boxes.tolist() for example in split.examples]


def test_voc_is_read_as_it_was_drawn(voc: Path) -> None:
    """Pixels count from 1 in the files and from 0 here; the parts of 2007 and 2012 follow each other."""
    data = load_data(voc)
    assert (data.name, (*data.classes,), data.masks, data.recall_points) == ("VOC07+12", shapes.CLASSES, False, 11)
    assert boxes(data.train) == [[[*shape.box] for shape in image] for seed in (0, 1) for image in drawn(seed, 3)]
    names = [[shapes.CLASSES.index(shape.name) + 1 for shape in image] for image in drawn(2, 3)]
    assert [example.labels.tolist() for example in data.test.examples] == names
    assert [sum(example.ignored) for example in data.test.examples] == [0, 0, 1]
    assert data.train.left_out == data.test.left_out == {"images_left_out": 0, "objects_left_out": 0}
    shutil.rmtree(voc / "VOC2012")
    assert load_data(voc).name == "VOC07"


def test_coco_is_read_as_it_was_drawn(coco: Path) -> None:
    """A crowd is not trained on, and ignored in the test; categories are numbered without gaps."""
    data = load_data(coco)
    assert (data.masks, data.recall_points) == (True, 101)
    assert boxes(data.train) == [[[*shape.box] for shape in image] for image in drawn(10, 4)]
    assert not any(example.ignored.any() for example in data.train.examples)
    assert data.test.examples[0].ignored.tolist() == [False] * len(drawn(11, 1)[0]) + [True]
    assert {label for example in data.train.examples for label in example.labels} <= {1, 2, 3}
    _, target = read(data.test.examples[0], masks=True)
    assert target["masks"].shape == (len(target["boxes"]), 48, 48)
    assert target["masks"][-1].nonzero()[:, 1].unique().tolist() == [0, 1, 2, 3]  # the crowd's columns
    for mask, box in zip(target["masks"][:-1], target["boxes"], strict=False):
        ys, xs = mask.nonzero(as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found - box).abs().max() <= 1.5  # half pixels of the polygon


def test_boxes_are_cut_to_the_image() -> None:
    assert clipped((1, 2, 2, 2), (20, 10)) == (1, 2, 3, 4)
    assert clipped((-5, -5, 105, 10), (20, 10)) == (0, 0, 10, 5)
    empty = (
        (3, 1, 0, 3),
        (1, 4, 2, -2),
        (1, 1, 1e-9, 3),
        (-5, 1, 5, 3),
        (1, 20, 2, 20),
        (NAN, 1, 2, 3),
        (1, 1, INF, 3),
    )
    for box in empty:
        assert clipped(box, (20, 10)) is None
    for box in ((1, 2, 3), ("a", 2, 3, 4), (10**400, 2, 3, 4), None, 5):
        with pytest.raises(BROKEN):
            clipped(box, (20, 10))


def test_masks_are_read() -> None:
    for segmentation in ([[0, 0, 4, 0, 4, 4]], runs([4, 8, 12]), runs("48<")):
        assert 0 < coding.area({"size": (4, 6), "counts": run_lengths(segmentation, (4, 6))}) <= 10


@pytest.mark.parametrize("segmentation", [[], [[0, 0, 4, 0]], [[10, 10, 14, 10, 14, 14]], runs([24])])
def test_masks_without_a_pixel_in_the_image_are_none(segmentation: Any) -> None:
    assert run_lengths(segmentation, (4, 6)) == b""


@pytest.mark.parametrize(
    "segmentation",
    [
        None, [5], [["a"] * 6], [[0, 0, 4, 0, 4, 4, 1]], [[0, 0, 4, 0, NAN, 4]], [[0, 0, 1e300, 0, 4, 4]],
        {"size": [6, 4], "counts": [4, 8, 12]}, {"size": [4, 6]},
        *map(runs, ([4, 80], [-4, 28], "zzzz", ["a"], None, 5)),
    ],
)  # fmt: skip
def test_broken_masks_are_refused(segmentation: Any) -> None:
    with pytest.raises(BROKEN):
        run_lengths(segmentation, (4, 6))


def replaced(name: str, old: str, new: str) -> Edit:
    """Change the first of this text in a file."""

    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return edit


def first(part: str, **values: object) -> Edit:
    """Change the first of COCO's images, annotations or categories."""

    def edit(root: Path) -> None:
        content = json.loads((root / JSON).read_text())
        content[part][0].update(values)
        (root / JSON).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("layout", "edit", "kind"),
    [
        ("voc", replaced(XML, "<xmax>", "<xmax>-"), "objects"),
        ("voc", lambda root: (root / "VOC2007/JPEGImages/00000000.jpg").unlink(), "images"),
        ("coco", first("annotations", bbox=[100, 3, 5, 5]), "objects"),
        ("coco", first("annotations", segmentation=[]), "objects"),
        ("coco", first("annotations", category_id=4), "objects"),
        ("coco", lambda root: (root / "train2017/10000000.jpg").unlink(), "images"),
        ("coco", replaced(JSON, '"images": [', ANOTHER), "images"),  # without an object to learn
    ],
)
def test_what_cannot_be_used_is_counted(layout: str, edit: Edit, kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    before = load_data(root)
    edit(root)
    data = load_data(root)
    assert data.train.counts()[f"{kind}_left_out"] == 1
    assert f"1 {kind} left out" in str(data.train)
    assert boxes(data.test) == boxes(before.test)


@pytest.mark.parametrize(
    ("layout", "edit", "expected"),
    [
        ("voc", replaced(XML, "<xmin>", "<xmin>left"), "ValueError: could not convert string to float"),
        ("voc", replaced(XML, "<width>", "<width>x"), "ValueError: invalid literal for int"),
        ("voc", replaced(XML, "<annotation>", "<"), "ParseError: "),
        ("voc", lambda root: (root / XML).unlink(), "No such file .*00000000.xml"),
        ("coco", lambda root: (root / JSON).write_text("{"), "JSONDecodeError: "),
        ("coco", lambda root: (root / JSON).write_text("[]"), "TypeError: "),
        ("coco", replaced(JSON, '"images": [', '"images": 5, "others": ['), "TypeError: "),
        ("coco", first("images", width=None), "TypeError: "),
        ("coco", replaced(JSON, "file_name", "name"), "KeyError: 'file_name'"),
        ("coco", first("annotations", segmentation=None), "TypeError: "),
        ("coco", lambda root: (root / JSON).unlink(), "No such file .*instances_train2017.json"),
        ("coco", lambda root: shutil.rmtree(root / "val2017"), "in the test: 0 images, 0 boxes, 3 images left"),
        ("coco", first("categories", id="x"), "cannot read the annotations: ValueError: invalid literal"),
    ],
)
def test_what_cannot_be_read_is_refused(layout: str, edit: Edit, expected: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    edit(root)
    with pytest.raises(UsageError, match=expected):
        load_data(root)


def test_a_flip_takes_boxes_and_masks_along() -> None:
    image = torch.arange(2 * 6).view(1, 2, 6).expand(3, 2, 6).to(torch.uint8)
    masks = torch.zeros(1, 2, 6, dtype=torch.uint8)
    masks[0, :, 1:3] = 1
    target = {"boxes": torch.tensor([[1.0, 0.0, 3.0, 2.0]]), "labels": torch.tensor([1]), "masks": masks}
    mirrored, moved = flipped(image, target)
    assert moved["boxes"].tolist() == [[3.0, 0.0, 5.0, 2.0]]
    assert moved["masks"].nonzero()[:, 2].unique().tolist() == [3, 4]
    assert torch.equal(mirrored[:, :, 3:5].flip(2), image[:, :, 1:3])


def test_training_images_are_a_function_of_epoch_and_index(coco: Path) -> None:
    one, two = (Images(load_data(coco), replace(COCO, batch_size=4, seed=3)) for _ in range(2))
    for key in ((0, 1), (7, 2)):
        (image, target, _), (again, same, _) = one[key], two[key]
        assert torch.equal(image, again)  # type: ignore[arg-type]
        assert all(torch.equal(target[name], same[name]) for name in target)
    assert {bool((one[epoch, 0][1]["boxes"] != one[0, 0][1]["boxes"]).any()) for epoch in range(12)} == {False, True}


def broken(root: Path, *names: str) -> DetectionData:
    data = load_data(root)
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:100])
    return data


def test_unreadable_images_are_replaced_in_training_and_left_out_of_the_test(coco: Path) -> None:
    """As is one of another size than the annotated."""
    data = broken(coco, "train2017/10000001.jpg", "val2017/11000000.jpg")
    shapes.texture(np.random.default_rng(0), 30).save(coco / "val2017" / "11000001.jpg")
    images = Images(data, replace(COCO, batch_size=4, workers=0))
    epoch = next(images.from_step(0))
    assert (len(epoch.images), epoch.unreadable) == (4, 1)
    (test,) = images.of_test()
    assert (len(test.images), len(test.targets), test.unreadable) == (1, 1, 2)


def test_no_readable_image_ends_the_run(coco: Path) -> None:
    data = broken(coco, *(f"train2017/1000000{number}.jpg" for number in range(4)))
    with pytest.raises(Aborted, match="cannot be read"):
        next(Images(data, replace(COCO, batch_size=2, workers=0)).from_step(0))
