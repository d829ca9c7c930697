"""Annotations of detection: what is read of the two layouts, and what is left out, counted, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools")

import shapes

from barlow_recipes.detection.annotations import DetectionData, Split, Unusable, check_segmentation, clipped, decoded
from barlow_recipes.detection.coco import read_coco
from barlow_recipes.detection.data import find_layout
from barlow_recipes.detection.images import TestImages, TrainingBatches, TrainingImages, flipped
from barlow_recipes.detection.images import test_batches as batches_of_test
from barlow_recipes.detection.voc import CLASSES, read_voc
from barlow_recipes.errors import Aborted, UsageError

NAN, INF = float("nan"), float("inf")
LOADING = {"workers": 0, "timeout": 60, "pin_memory": False}


@pytest.fixture(scope="module")
def voc_origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.voc_tree(tmp_path_factory.mktemp("voc"), train=6, test=3, side=48)


@pytest.fixture(scope="module")
def coco_origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.coco_tree(tmp_path_factory.mktemp("coco"), train=4, test=3, side=48)


@pytest.fixture
def voc(voc_origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(voc_origin, tmp_path / "voc"))


@pytest.fixture
def coco(coco_origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coco_origin, tmp_path / "coco"))


def drawn(seed: int, count: int, side: int = 48) -> list[list[shapes.Shape]]:
    """What the generator drew."""
    return [shapes.picture(np.random.default_rng([seed, number]), side)[1] for number in range(count)]


def boxes(split: Split) -> list[list[list[float]]]:
    return [example.boxes.tolist() for example in split.examples]


def test_voc_is_read_as_it_was_drawn(voc: Path) -> None:
    """Pixels count from 1 in the files and from 0 here; the parts of 2007 and 2012 follow each other."""
    data = read_voc(voc)
    assert data.classes == shapes.CLASSES
    assert not data.masks
    assert data.published is None
    assert boxes(data.train) == [[[*shape.box] for shape in image] for seed in (0, 1) for image in drawn(seed, 3)]
    names = [[shapes.CLASSES.index(shape.name) + 1 for shape in image] for image in drawn(2, 3)]
    assert [example.labels.tolist() for example in data.test.examples] == names
    ignored = [example.ignored.tolist() for example in data.test.examples]
    assert [sum(objects) for objects in ignored] == [0, 0, 1]
    assert not data.train.left_out
    assert not data.test.left_out


def test_coco_is_read_as_it_was_drawn(coco: Path) -> None:
    """A crowd is not trained on, and ignored in the test; categories are numbered without gaps."""
    data = read_coco(coco)
    assert data.masks
    assert data.recall_points == 101
    assert boxes(data.train) == [[[*shape.box] for shape in image] for image in drawn(10, 4)]
    assert not any(example.ignored.any() for example in data.train.examples)
    assert data.test.examples[0].ignored.tolist() == [False] * len(drawn(11, 1)[0]) + [True]
    assert {label for example in data.train.examples for label in example.labels} <= {1, 2, 3}
    _, target = TestImages(data.test.examples, masks=True).read(0)
    assert target["masks"].shape == (len(target["boxes"]), 48, 48)
    assert target["masks"][-1].nonzero()[:, 1].unique().tolist() == [0, 1, 2, 3]  # the crowd's columns
    for mask, box in zip(target["masks"][:-1], target["boxes"], strict=False):
        ys, xs = mask.nonzero(as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found - box).abs().max() <= 1.5  # half pixels of the polygon


def test_published_classes_bring_the_published_scores(voc: Path) -> None:
    for path in voc.glob("*/Annotations/*.xml"):
        path.write_text(path.read_text().replace("disc", "cat").replace("cross", "dog").replace("triangle", "bird"))
    data = read_voc(voc)
    assert data.classes == CLASSES
    assert data.published is not None
    assert data.published["box"]["AP50"] == 82.6
    assert data.recall_points == 11


def test_without_2012_it_is_told(voc: Path) -> None:
    shutil.rmtree(voc / "VOC2012")
    data = read_voc(voc)
    assert data.name == "VOC07"
    assert "VOC2012 is absent" in data.notes[0]


@pytest.mark.parametrize(
    ("box", "expected"),
    {
        "inside": ((1, 2, 3, 4), (1, 2, 3, 4)),
        "cut": ((-5, -5, 100, 5), (0, 0, 10, 5)),
        "no width": ((3, 1, 3, 4), "box without width or height"),
        "negative height": ((1, 4, 3, 2), "box without width or height"),
        "less than float32 keeps": ((1, 1, 1 + 1e-9, 4), "box without width or height"),
        "left of it": ((-5, 1, 0, 4), "box outside its image"),
        "below it": ((1, 20, 3, 40), "box outside its image"),
        "NaN": ((NAN, 1, 3, 4), "box with a number that is not finite"),
        "infinite": ((1, 1, INF, 4), "box with a number that is not finite"),
        "three numbers": ((1, 2, 3), "box that is not four numbers"),
        "words": (("a", 2, 3, 4), "box that is not four numbers"),
        "nothing": ((None, 2, 3, 4), "box that is not four numbers"),
    }.values(),
)
def test_boxes_are_cut_to_the_image_or_refused(box: Any, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(Unusable, match=f"^{expected}$"):
            clipped(box, 20, 10)
    else:
        assert clipped(box, 20, 10) == expected


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    {
        "a polygon": ([[0, 0, 4, 0, 4, 4]], None),
        "run lengths": ({"size": [4, 6], "counts": [4, 8, 12]}, None),
        "compressed": ({"size": [4, 6], "counts": "48"}, None),
        "none": (None, "object without a mask"),
        "an empty list": ([], "object without a mask"),
        "two points": ([[0, 0, 4, 0]], "fewer than three points"),
        "half a point": ([[0, 0, 4, 0, 4, 4, 1]], "half a point"),
        "NaN": ([[0, 0, 4, 0, NAN, 4]], "not finite"),
        "words": ([["a"] * 6], "not numbers"),
        "a number": ([5], "not numbers"),
        "outside": ([[10, 10, 14, 10, 14, 14]], "mask outside its image"),
        "of another size": ({"size": [6, 4], "counts": [4, 8, 12]}, "another size"),
        "too short": ({"size": [4, 6], "counts": [4, 8]}, "run lengths are broken"),
        "too long": ({"size": [4, 6], "counts": [4, 80]}, "run lengths are broken"),
        "negative": ({"size": [4, 6], "counts": [-4, 28]}, "run lengths are broken"),
        "compressed and broken": ({"size": [4, 6], "counts": "zzzz"}, "run lengths are broken"),
        "no counts": ({"size": [4, 6]}, "run lengths are broken"),
        "empty": ({"size": [4, 6], "counts": [24]}, "mask without a pixel"),
    }.values(),
)
def test_masks_are_checked_before_they_are_decoded(segmentation: Any, expected: str | None) -> None:
    if expected is None:
        check_segmentation(segmentation, 4, 6)
        assert decoded([segmentation], 4, 6).shape == (1, 4, 6)
    else:
        with pytest.raises(Unusable, match=expected):
            check_segmentation(segmentation, 4, 6)


def edit_xml(change: Callable[[ET.Element], Any]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "VOC2007" / "Annotations" / "000000.xml"
        tree = ET.parse(path)
        change(tree.getroot())
        tree.write(path)

    return edit


def put(path: str, text: str) -> Callable[[ET.Element], None]:
    def change(root: ET.Element) -> None:
        element = root.find(path)
        assert element is not None
        element.text = text

    return change


@pytest.mark.parametrize(
    ("edit", "expected"),
    {
        "no width": (edit_xml(put("object/bndbox/xmax", "0")), "box without width or height"),
        "NaN": (edit_xml(put("object/bndbox/xmin", "nan")), "box with a number that is not finite"),
        "words": (edit_xml(put("object/bndbox/xmin", "left")), "box that is not four numbers"),
        "no class": (edit_xml(put("object/name", " ")), "object without a class"),
        "no size": (edit_xml(put("size/width", "0")), "image without a size"),
        "no XML": (
            lambda root: (root / "VOC2007" / "Annotations" / "000000.xml").write_text("<annotation>"),
            "image whose annotation is no XML",
        ),
        "no annotation": (
            lambda root: (root / "VOC2007" / "Annotations" / "000000.xml").unlink(),
            "image without an annotation file",
        ),
        "no image": (
            lambda root: (root / "VOC2007" / "JPEGImages" / "000000.jpg").unlink(),
            "image whose file is absent",
        ),
    }.values(),
)
def test_what_voc_cannot_use_is_counted(edit: Callable[[Path], Any], expected: str, voc: Path) -> None:
    before = read_voc(voc)
    edit(voc)
    data = read_voc(voc)
    assert data.train.left_out[expected] == 1
    assert data.train.boxes < before.train.boxes
    assert boxes(data.test) == boxes(before.test)


def test_a_class_that_training_lacks_is_counted(voc: Path) -> None:
    path = voc / "VOC2007" / "Annotations" / "020000.xml"
    path.write_text(re.sub("<name>[a-z]+", "<name>star", path.read_text()))
    test = read_voc(voc).test
    assert test.left_out["object of a class that the training part lacks"] == len(drawn(2, 1)[0])
    assert len(test.examples) == 3  # what is found on it is wrong


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def first(**values: object) -> Callable[[Path], None]:
    return edit_json(lambda content: content["annotations"][0].update(values))


@pytest.mark.parametrize(
    ("edit", "expected"),
    {
        "no width": (first(bbox=[3, 3, 0, 5]), "box without width or height"),
        "negative": (first(bbox=[3, 3, -2, 5]), "box without width or height"),
        "outside": (first(bbox=[100, 3, 5, 5]), "box outside its image"),
        "NaN": (first(bbox=[NAN, 3, 5, 5]), "box with a number that is not finite"),
        "three": (first(bbox=[3, 3, 5]), "box that is not four numbers"),
        "no box": (first(bbox=None), "box that is not four numbers"),
        "mask": (first(segmentation=[[1, 2]]), "mask whose polygon has fewer than three points, or half a point"),
        "no mask": (first(segmentation=None), "object without a mask"),
        "category": (first(category_id=4), "annotation of a category that is not listed"),
        "category of another type": (first(category_id=[3]), "annotation of a category that is not listed"),
        "image": (first(image_id=99), "annotation of an image that is not listed"),
        "image of another type": (first(image_id=[0]), "annotation of an image that is not listed"),
        "no annotation": (edit_json(lambda content: content["annotations"].append(5)), "annotation of an image that"),
        "no size": (edit_json(lambda content: content["images"][0].update(width=None)), "image without a size"),
        "no name": (edit_json(lambda content: content["images"][0].pop("file_name")), "image without id or file_name"),
        "no file": (lambda root: (root / "train2017" / "10000000.jpg").unlink(), "image whose file is absent"),
        "empty": (
            edit_json(lambda content: content["images"].append(content["images"][0] | {"id": 9})),
            "image without an object to learn",
        ),
    }.values(),
)  # fmt: skip
def test_what_coco_cannot_use_is_counted(edit: Callable[[Path], Any], expected: str, coco: Path) -> None:
    edit(coco)
    data = read_coco(coco)
    counted = {kind: count for kind, count in data.train.left_out.items() if kind.startswith(expected)}
    assert sum(counted.values()) == 1
    assert not data.test.left_out


@pytest.mark.parametrize(
    ("edit", "expected"),
    {
        "no JSON": (lambda root: (root / "annotations/instances_val2017.json").write_text("{"), "expected JSON in"),
        "a list": (lambda root: (root / "annotations/instances_val2017.json").write_text("[]"), "expected lists of"),
        "no file": (lambda root: (root / "annotations/instances_val2017.json").unlink(), "cannot read"),
        "no images": (lambda root: shutil.rmtree(root / "val2017"), "expected the images in"),
        "no categories": (edit_json(lambda content: content["categories"].clear()), "expected categories"),
    }.values(),
)  # fmt: skip
def test_coco_that_is_unusable_is_refused(edit: Callable[[Path], Any], expected: str, coco: Path) -> None:
    edit(coco)
    with pytest.raises(UsageError, match=expected):
        read_coco(coco)


def test_a_layout_is_recognized_by_its_folders(voc: Path, coco: Path, tmp_path: Path) -> None:
    (tmp_path / "devkit").mkdir()
    voc_elsewhere = shutil.move(voc, tmp_path / "devkit" / "VOCdevkit")
    assert find_layout(voc_elsewhere) == find_layout(tmp_path / "devkit") == "voc"
    assert find_layout(coco) == "coco"
    with pytest.raises(UsageError, match=r"expected VOC2007/ \(and VOC2012/\) of Pascal VOC, or annotations/"):
        find_layout(tmp_path)


def test_a_flip_takes_boxes_and_masks_along() -> None:
    image = torch.arange(2 * 6).view(1, 2, 6).expand(3, 2, 6).to(torch.uint8)
    masks = torch.zeros(1, 2, 6, dtype=torch.uint8)
    masks[0, :, 1:3] = 1
    target = {"boxes": torch.tensor([[1.0, 0.0, 3.0, 2.0]]), "labels": torch.tensor([1]), "masks": masks}
    mirrored, moved = flipped(image, target)
    assert moved["boxes"].tolist() == [[3.0, 0.0, 5.0, 2.0]]
    assert moved["masks"].nonzero()[:, 2].unique().tolist() == [3, 4]
    assert torch.equal(mirrored[:, :, 3:5].flip(2), image[:, :, 1:3])
    back, target_back = flipped(mirrored, moved)
    assert torch.equal(back, image)
    assert torch.equal(target_back["boxes"], target["boxes"])


def test_training_images_are_a_function_of_epoch_and_index(coco: Path) -> None:
    examples = read_coco(coco).train.examples
    one, two = (TrainingImages(examples, masks=True, seed=3) for _ in range(2))
    for key in ((0, 1), (7, 2)):
        torch.manual_seed(key[0])
        first_image, first_target, _ = one[key]
        torch.manual_seed(99)
        second_image, second_target, _ = two[key]
        assert first_image is not None
        assert second_image is not None
        assert torch.equal(first_image, second_image)
        assert all(torch.equal(first_target[name], second_target[name]) for name in first_target)
    flips = {bool((one[epoch, 0][1]["boxes"] != one[0, 0][1]["boxes"]).any()) for epoch in range(12)}
    assert flips == {False, True}


def data_with(root: Path, broken: list[str]) -> DetectionData:
    data = read_coco(root)
    for name in broken:
        path = root / name
        path.write_bytes(path.read_bytes()[:100])
    return data


def test_unreadable_images_are_replaced_in_training_and_left_out_of_the_test(coco: Path) -> None:
    data = data_with(coco, ["train2017/10000001.jpg", "val2017/11000000.jpg"])
    (epoch,) = TrainingBatches(data.train.examples, masks=True, batch_size=4, seed=0, **LOADING).batches(0)
    assert len(epoch.images) == 4
    assert epoch.unreadable == 1
    (test,) = batches_of_test(data.test.examples, masks=True, batch_size=4, **LOADING)
    assert (len(test.images), len(test.targets), test.unreadable) == (2, 2, 1)


def test_an_image_of_another_size_than_annotated_counts_as_unreadable(coco: Path) -> None:
    data = read_coco(coco)
    shapes.texture(np.random.default_rng(0), 30).save(coco / "val2017" / "11000001.jpg")
    (test,) = batches_of_test(data.test.examples, masks=True, batch_size=4, **LOADING)
    assert (len(test.images), test.unreadable) == (2, 1)


def test_no_readable_image_ends_the_run(coco: Path) -> None:
    data = data_with(coco, [f"train2017/1000000{number}.jpg" for number in range(4)])
    with pytest.raises(Aborted, match="cannot be read"):
        next(TrainingBatches(data.train.examples, masks=True, batch_size=2, seed=0, **LOADING).batches(0))


def test_fewer_images_than_a_batch_are_refused(coco: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size 5: expected at most the number of annotated images, 4"):
        TrainingBatches(read_coco(coco).train.examples, masks=True, batch_size=5, seed=0, **LOADING)
