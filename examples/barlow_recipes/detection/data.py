"""Pascal VOC and COCO as one: images with boxes, labels and, of COCO, masks.

VOC's XML is taken to what COCO's JSON would say; from there on there is one path. What cannot be used is left out, and
counted. As in detectron2, VOC's difficult objects are trained on, COCO's crowds are not, and in the test both are
neither found nor missed. Different from its figures of VOC: a difficult object ignores every detection that lies in it
by half, as COCO's crowds do, where VOC asks for the IoU; and an IoU counts no pixel more to each side.
"""

import contextlib
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barlow_recipes.errors import UsageError, first_line, require

THINNEST = 0.01  # pixels; float32 would make nothing of much less, and torchvision refuses nothing
FARTHEST = 1e5  # pixels of an image or a polygon; pycocotools would take endless memory for more
BROKEN = (LookupError, TypeError, ValueError, OverflowError, MemoryError)  # what a broken annotation raises
Size = tuple[int, int]  # height, width
Content = dict[str, list[Any]]  # of COCO's JSON: images, annotations and categories


class Example(NamedTuple):
    """An image and its N objects. No tensors: a hundred thousand of them would not pass to worker processes."""

    path: Path
    size: Size
    boxes: npt.NDArray[np.float32]  # (N, 4): left, top, right, bottom, in pixels
    labels: npt.NDArray[np.int64]  # (N,) from 1; 0 is the background
    ignored: npt.NDArray[np.int64]  # (N,) 1 for what is neither found nor missed in the test
    runs: tuple[bytes, ...]  # the compressed run lengths of N masks


class Split(NamedTuple):
    """The images of a part of a data set, and how many images and objects of it are left out."""

    examples: list[Example]
    left_out: dict[str, int]

    def counts(self) -> dict[str, int]:
        boxes = sum(len(example.boxes) for example in self.examples)
        return {"images": len(self.examples), "boxes": boxes, **self.left_out}

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in self.counts().items())


class DetectionData(NamedTuple):
    """A data set of one of the two layouts."""

    name: str
    classes: list[str]  # class k has label k + 1
    train: Split
    test: Split
    masks: bool
    recall_points: int  # at which precision is averaged

    def __str__(self) -> str:
        return f"{self.name}, {len(self.classes)} classes; to train on: {self.train}; in the test: {self.test}"


def find_layout(root: Path) -> str:
    """Recognise a folder as "voc" or "coco", or raise UsageError."""
    for layout, folder in (("voc", "VOC2007"), ("coco", "annotations")):
        if (root / folder).is_dir():
            return layout
    expected = "VOC2007/ (and VOC2012/) of Pascal VOC, or annotations/, train2017/ and val2017/ of COCO"
    raise UsageError(f"--data {root}: expected a folder with {expected}")


def load_data(root: Path) -> DetectionData:
    """Read the annotations of either layout; UsageError: a file of them is absent or broken, or no box can be used."""
    try:
        data = _voc(root) if find_layout(root) == "voc" else _coco(root)
    except (*BROKEN, OSError) as error:
        raise UsageError(f"--data {root}: cannot read the annotations: {first_line(error)}") from None
    if not all(split.counts()["boxes"] for split in (data.train, data.test)):
        raise UsageError(f"--data {root}: expected boxes to train on and boxes to find, got {data}")
    return data


def _voc(root: Path) -> DetectionData:
    """Trained on the trainval parts of 2007 and 2012, tested on the test part of 2007 by the metric of that year."""
    folders = [root / year for year in ("VOC2007", "VOC2012") if (root / year).is_dir()]
    train, test = _voc_content(folders, "trainval"), _voc_content(folders[:1], "test")
    classes = sorted({annotation["category_id"] for annotation in train["annotations"]} - {""})
    labels = {name: label for label, name in enumerate(classes, 1)}
    parts = [_split(part, root, labels, masks=False, learn=part is train) for part in (train, test)]
    return DetectionData("VOC07+12" if len(folders) > 1 else "VOC07", classes, *parts, masks=False, recall_points=11)


def _voc_content(folders: list[Path], part: str) -> Content:
    """What COCO's JSON would say: a class is its name, a difficult object a crowd."""
    images, annotations = [], []
    for folder in folders:
        for name in (folder / "ImageSets" / "Main" / f"{part}.txt").read_text(encoding="utf-8").split():
            key, tree = f"{folder.name}/JPEGImages/{name}.jpg", ET.Element("annotation")
            with contextlib.suppress(OSError, ET.ParseError, ValueError, LookupError):  # then it lacks a size
                tree = ET.parse(folder / "Annotations" / f"{name}.xml").getroot()
            size = {side: tree.findtext(f"size/{side}") for side in ("height", "width")}
            images.append({"id": key, "file_name": key, **size})
            annotations += [_voc_object(element, key) for element in tree.iterfind("object")]
    return {"images": images, "annotations": annotations}


def _voc_object(element: ET.Element, key: str) -> dict[str, Any]:
    box, corners = None, (element.findtext(f"bndbox/{corner}") or "" for corner in ("xmin", "ymin", "xmax", "ymax"))
    with contextlib.suppress(ValueError):  # pixels count from 1, and the last one is inside
        left, top, right, bottom = map(float, corners)
        box = left - 1, top - 1, right - left + 1, bottom - top + 1
    name, difficult = ((element.findtext(tag) or "").strip() for tag in ("name", "difficult"))
    return {"image_id": key, "category_id": name, "bbox": box, "iscrowd": int(difficult == "1")}


def _coco(root: Path) -> DetectionData:
    train, test = (_json(root / "annotations" / f"instances_{part}.json") for part in ("train2017", "val2017"))
    names = {int(category["id"]): str(category["name"]) for category in train["categories"]}
    labels = {number: label for label, number in enumerate(sorted(names), 1)}  # without the gaps in COCO's numbers
    learned = _split(train, root / "train2017", labels, masks=True, learn=True)
    tested = _split(test, root / "val2017", labels, masks=True, learn=False)
    return DetectionData("COCO", [names[number] for number in labels], learned, tested, masks=True, recall_points=101)


def _json(path: Path) -> Content:
    """Python reads NaN and Infinity too: the checks of boxes and polygons find them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: [*content[key]] for key in ("images", "annotations", "categories")}
    except (*BROKEN, RecursionError) as error:
        raise ValueError(f"expected images, annotations and categories in {path} ({first_line(error)})") from None


def _split(content: Content, folder: Path, labels: dict[Any, int], *, masks: bool, learn: bool) -> Split:
    """The images in the folder, with their objects of the labelled categories.

    To learn from, crowds are left away (of COCO: VOC's difficult objects are learned), and images without an object.
    """
    left_out = {"images_left_out": 0, "objects_left_out": 0}
    places: dict[Any, tuple[Path, Size, list[tuple[Any, ...]]]] = {}
    for image in content["images"]:
        try:
            path, size = folder / str(image["file_name"]), (int(image["height"]), int(image["width"]))
            if not (0 < min(size) <= max(size) < FARTHEST and path.is_file()):
                raise ValueError("no such file, or no such size")
            places[image["id"]] = path, size, []
        except BROKEN:
            left_out["images_left_out"] += 1
    for annotation in content["annotations"]:
        try:
            (_, size, objects), label = places[annotation["image_id"]], labels[annotation["category_id"]]
            box, crowd = clipped(annotation["bbox"], size), annotation.get("iscrowd") == 1
            runs = run_lengths(annotation["segmentation"], size) if masks else b""
            if not (learn and masks and crowd):
                objects.append((box, label, crowd, runs))
        except BROKEN:
            left_out["objects_left_out"] += 1
    examples = []
    for path, size, objects in places.values():
        if objects or not learn:  # as detectron2's FILTER_EMPTY_ANNOTATIONS
            boxes, numbers, crowds, runs = zip(*objects, strict=True) if objects else [()] * 4
            arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(numbers, np.int64), np.array(crowds, np.int64)
            examples.append(Example(path, size, *arrays, runs))
    left_out["images_left_out"] += len(places) - len(examples)
    return Split(examples, left_out)


def clipped(box: Any, size: Size) -> tuple[float, float, float, float]:
    """What of a box (left, top, width, height) lies in the image: left, top, right, bottom; if nothing, ValueError."""
    left, top, across, down = map(float, box)
    inside = max(left, 0.0), max(top, 0.0), min(left + across, size[1]), min(top + down, size[0])
    wide = inside[2] - inside[0] >= THINNEST and inside[3] - inside[1] >= THINNEST
    if not (wide and math.isfinite(left + top + across + down)):
        raise ValueError("no box in the image")
    return inside


def run_lengths(segmentation: Any, size: Size) -> bytes:
    """The compressed run lengths of a mask, of COCO's polygons or run lengths; if broken or empty, one of BROKEN."""
    coding = require("pycocotools.mask", "masks")
    if isinstance(segmentation, list) and all(map(_is_polygon, segmentation)):
        runs = coding.merge(coding.frPyObjects(segmentation, *size))
    elif segmentation["size"] == [*size]:
        listed = isinstance(segmentation["counts"], list)
        mask = coding.decode(coding.frPyObjects(segmentation, *size) if listed else segmentation)
        runs = coding.encode(np.asfortranarray(mask))  # as pycocotools itself would write them
    else:
        raise ValueError("a mask of another size")
    if not coding.area(runs):
        raise ValueError("no mask in the image")
    return bytes(runs["counts"])


def _is_polygon(points: Any) -> bool:
    values = np.asarray(points, dtype=float)
    return values.ndim == 1 and len(values) >= 6 and len(values) % 2 == 0 and bool((abs(values) < FARTHEST).all())
