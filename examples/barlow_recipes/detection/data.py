"""Pascal VOC and COCO as one: images with boxes, labels and, of COCO, masks.

VOC's XML is taken to what COCO's JSON would say; from there on there is one path. What cannot be used is left out, and
counted by its kind. As in detectron2, VOC's difficult objects are trained on, COCO's crowds are not, and in the test
both are neither found nor missed. Different from its figures of VOC: a difficult object ignores every detection that
lies in it by half, as COCO's crowds do, where VOC asks for the IoU; and an IoU counts no pixel more to each side.
"""

import contextlib
import json
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barlow_recipes.errors import UsageError, first_line, require

THINNEST = 0.01  # pixels; float32 would make nothing of much less, and torchvision refuses nothing
FARTHEST = 1e5  # pixels of an image or a polygon; pycocotools would take endless memory for more
CORNERS = ("xmin", "ymin", "xmax", "ymax")  # of VOC
BROKEN = (LookupError, TypeError, ValueError, OverflowError, MemoryError)  # what reading a broken annotation raises
Size = tuple[int, int]  # height, width
Content = dict[str, list[Any]]  # of COCO's JSON: images, annotations and categories


class Unusable(Exception):
    """A part of the annotations that is left out; its message is the kind that it is counted as."""


class Example(NamedTuple):
    """An image and its objects. No tensors: a hundred thousand of them would not pass to worker processes."""

    path: Path
    size: Size
    boxes: npt.NDArray[np.float32]  # (N, 4): left, top, right, bottom, in pixels
    labels: npt.NDArray[np.int64]  # (N,) from 1; 0 is the background
    ignored: npt.NDArray[np.bool_]  # (N,) neither found nor missed in the test
    runs: bytes  # the compressed run lengths of every mask, with spaces between


class Split(NamedTuple):
    """The images of a part of a data set, and what of it was left out: how many of which kind."""

    examples: list[Example]
    left_out: dict[str, int]

    @property
    def boxes(self) -> int:
        return sum(len(example.boxes) for example in self.examples)

    def told(self) -> str:
        return ", ".join(f"{kind} × {count:,}" for kind, count in sorted(self.left_out.items()))


@dataclass(frozen=True)
class DetectionData:
    """A data set of one of the two layouts."""

    name: str
    classes: tuple[str, ...]  # class k has label k + 1
    train: Split
    test: Split
    masks: bool
    recall_points: int  # at which precision is averaged

    def fingerprint(self) -> str:
        """Of what is there; processes that disagree cannot share batches."""
        parts = [f"{len(split.examples)} images with {split.boxes} boxes" for split in (self.train, self.test)]
        return f"{self.name}: {' and '.join(parts)} of {len(self.classes)} classes"


def find_layout(root: Path) -> str:
    """Recognise a folder as "voc" or "coco", or raise UsageError."""
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    if (_devkit(root) / "VOC2007").is_dir():
        return "voc"
    if (root / "annotations").is_dir():
        return "coco"
    expected = "VOC2007/ (and VOC2012/) of Pascal VOC, or annotations/, train2017/ and val2017/ of COCO"
    raise UsageError(f"--data {root}: expected {expected}")


def _devkit(root: Path) -> Path:
    return root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root


def load_data(root: Path) -> DetectionData:
    """Read the annotations of either layout; UsageError: a file of them is absent or broken, or no box can be used."""
    data = _voc(_devkit(root)) if find_layout(root) == "voc" else _coco(root)
    for use, split in (("train on", data.train), ("find in the test", data.test)):
        if not split.boxes:
            why = split.told() or "no image"
            raise UsageError(f"--data {root}: expected boxes to {use}, found none that can be used ({why})")
    return data


def _voc(root: Path) -> DetectionData:
    """Trained on the trainval parts of 2007 and 2012, tested on the test part of 2007 by the metric of that year."""
    years = [year for year in ("VOC2007", "VOC2012") if (root / year).is_dir()]
    train = _voc_content([(root / year, "trainval") for year in years])
    test = _voc_content([(root / "VOC2007", "test")])
    classes = sorted({annotation["category_id"] for annotation in train["annotations"]} - {""})
    labels = {name: label for label, name in enumerate(classes, 1)}
    parts = [_split(part, root, labels, masks=False, learn=part is train) for part in (train, test)]
    return DetectionData("VOC07+12" if len(years) > 1 else "VOC07", tuple(classes), *parts, False, 11)


def _voc_content(parts: list[tuple[Path, str]]) -> Content:
    """What COCO's JSON would say: a class is its name, a difficult object a crowd."""
    images, annotations = [], []
    for folder, part in parts:
        lines = _text(folder / "ImageSets" / "Main" / f"{part}.txt").splitlines()
        for name in (line.split()[0] for line in lines if line.strip()):
            key, tree = f"{folder.name}/JPEGImages/{name}.jpg", ET.Element("annotation")
            with contextlib.suppress(OSError, ET.ParseError, ValueError, LookupError):  # then it lacks a size
                tree = ET.parse(folder / "Annotations" / f"{name}.xml").getroot()
            size = {side: tree.findtext(f"size/{side}") for side in ("height", "width")}
            images.append({"id": key, "file_name": key, **size})
            annotations += [_voc_object(element, key) for element in tree.iterfind("object")]
    return {"images": images, "annotations": annotations}


def _voc_object(element: ET.Element, key: str) -> dict[str, Any]:
    box = None
    with contextlib.suppress(ValueError):  # pixels count from 1, and the last one is inside
        left, top, right, bottom = (float(element.findtext(f"bndbox/{corner}") or "") for corner in CORNERS)
        box = left - 1, top - 1, right - left + 1, bottom - top + 1
    name, difficult = ((element.findtext(tag) or "").strip() for tag in ("name", "difficult"))
    return {"image_id": key, "category_id": name, "bbox": box, "iscrowd": int(difficult == "1")}


def _coco(root: Path) -> DetectionData:
    train, test = _json(root, "train2017"), _json(root, "val2017")
    names = {}
    with contextlib.suppress(*BROKEN):
        names = {int(category["id"]): str(category["name"]) for category in train["categories"]}
    if not names:
        raise UsageError(f"--data {root}: expected categories with id and name in instances_train2017.json")
    labels = {number: label for label, number in enumerate(sorted(names), 1)}  # without the gaps in COCO's numbers
    parts = [
        _split(part, root / folder, labels, masks=True, learn=part is train)
        for part, folder in ((train, "train2017"), (test, "val2017"))
    ]
    return DetectionData("COCO", tuple(names[number] for number in labels), *parts, True, 101)


def _json(root: Path, part: str) -> Content:
    path = root / "annotations" / f"instances_{part}.json"
    try:
        content = json.loads(_text(path))  # Python's reads NaN and Infinity too: the checks of boxes find them
        if all(isinstance(content[key], list) for key in ("images", "annotations", "categories")):
            return content
        reason = "no lists of images, annotations and categories"
    except (*BROKEN, RecursionError) as error:
        reason = first_line(error)
    raise UsageError(f"--data {root}: expected the JSON of COCO in {path} ({reason})")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data: cannot read {path}: {first_line(error)}") from None


def _split(content: Content, folder: Path, labels: dict[Any, int], *, masks: bool, learn: bool) -> Split:
    """The images in the folder, with their objects of the labelled categories.

    To learn from, crowds are left away (of COCO: VOC's difficult objects are learned), and images without an object.
    """
    left_out: Counter[str] = Counter()
    places: dict[Any, tuple[Path, Size]] = {}
    for image in content["images"]:
        with _counted(left_out, "image without file or size"):
            path, size = folder / str(image["file_name"]), (int(image["height"]), int(image["width"]))
            if not (0 < min(size) <= max(size) < FARTHEST and path.is_file()):
                raise ValueError
            places[image["id"]] = path, size
    objects: dict[Any, list[tuple[Any, ...]]] = {key: [] for key in places}
    for annotation in content["annotations"]:
        with _counted(left_out, "object without image or class"):
            (_, size), label = places[annotation["image_id"]], labels[annotation["category_id"]]
            crowd = annotation.get("iscrowd") == 1
            box = clipped(annotation.get("bbox"), size)
            runs = run_lengths(annotation.get("segmentation"), size) if masks else b""
            if not (learn and masks and crowd):
                objects[annotation["image_id"]].append((box, label, crowd, runs))
    examples = [_example(*place, objects[key]) for key, place in places.items() if objects[key] or not learn]
    if len(examples) < len(places):  # as detectron2's FILTER_EMPTY_ANNOTATIONS
        left_out["image without an object to learn"] = len(places) - len(examples)
    return Split(examples, dict(left_out))


@contextlib.contextmanager
def _counted(left_out: Counter[str], otherwise: str) -> Iterator[None]:
    try:
        yield
    except Unusable as error:
        left_out[str(error)] += 1
    except BROKEN:
        left_out[otherwise] += 1


def clipped(box: Any, size: Size) -> tuple[float, float, float, float]:
    """What of a box (left, top, width, height) lies in the image: left, top, right, bottom; Unusable if nothing."""
    try:
        left, top, across, down = map(float, box)
    except BROKEN:
        left = top = across = down = math.nan
    inside = max(left, 0.0), max(top, 0.0), min(left + across, size[1]), min(top + down, size[0])
    wide = inside[2] - inside[0] >= THINNEST and inside[3] - inside[1] >= THINNEST
    if not (wide and all(map(math.isfinite, (left, top, across, down)))):
        raise Unusable("object without a box in its image")
    return inside


def run_lengths(segmentation: Any, size: Size) -> bytes:
    """The compressed run lengths of a mask, of COCO's polygons or run lengths; Unusable if broken or empty."""
    coding = require("pycocotools.mask", "masks")
    runs = None
    with contextlib.suppress(*BROKEN):
        if isinstance(segmentation, list) and all(map(_is_polygon, segmentation)):
            runs = coding.merge(coding.frPyObjects(segmentation, *size))
        elif isinstance(segmentation, dict) and segmentation["size"] == [*size]:
            listed = isinstance(segmentation["counts"], list)
            mask = coding.decode(coding.frPyObjects(segmentation, *size) if listed else segmentation)
            runs = coding.encode(np.asfortranarray(mask))  # as pycocotools itself would write them
    if runs is None or not coding.area(runs):
        raise Unusable("object without a mask in its image")
    return bytes(runs["counts"])


def _is_polygon(points: Any) -> bool:
    values = np.asarray(points, dtype=float)
    return values.ndim == 1 and len(values) >= 6 and len(values) % 2 == 0 and bool((abs(values) < FARTHEST).all())


def _example(path: Path, size: Size, objects: list[tuple[Any, ...]]) -> Example:
    boxes, labels, ignored, runs = zip(*objects, strict=True) if objects else [()] * 4
    shaped = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Example(path, size, shaped, np.array(labels, dtype=np.int64), np.array(ignored, np.bool_), b" ".join(runs))
