"""The layout of Pascal VOC: VOC2007/ and VOC2012/, each with Annotations/, ImageSets/Main/ and JPEGImages/.

Trained on the trainval parts of 2007 and 2012, tested on the test part of 2007. As in detectron2, the annotated
coordinates count pixels from 1, with the last one inside; difficult objects are trained on, and in the test they are
neither found nor missed. Precision is averaged at 11 points of recall, the metric of 2007, at IoU 0.5 to 0.95.

Two differences remain from detectron2's figures: a difficult object ignores every detection that lies in it by half of
the detection's area, as COCO's crowds do, where VOC asks for the IoU; and an IoU counts no pixel more to each side.

Sources: ``data/datasets/pascal_voc.py`` and ``evaluation/pascal_voc_evaluation.py`` of facebookresearch/detectron2.
"""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from barlow_recipes.detection.annotations import (
    Box,
    DetectionData,
    Example,
    Split,
    Unusable,
    clipped,
    example_of,
    read_text,
    size_of,
    to_train_on,
)
from barlow_recipes.errors import UsageError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
TRAIN, TEST = (("VOC2007", "trainval"), ("VOC2012", "trainval")), ("VOC2007", "test")
PUBLISHED = {"box": {"AP": 56.8, "AP50": 82.6, "AP75": 63.4}}  # Zbontar et al. (2021), transfer to detection
RECALL_POINTS = 11
Object = tuple[str, Box, bool]  # class, box, difficult


def find_voc(root: Path) -> Path | None:
    """The folder with VOC2007/ and VOC2012/."""
    folders = [folder for folder in (root, root / "VOCdevkit") if (folder / "VOC2007").is_dir()]
    return folders[0] if folders else None


def read_voc(root: Path) -> DetectionData:
    """Read every annotation; what cannot be used is counted.

    Raises:
        UsageError: a list of images is absent.
    """
    tested = root / TEST[0] / "ImageSets" / "Main" / f"{TEST[1]}.txt"
    if not tested.is_file():
        raise UsageError(f"--data {root}: expected {tested.relative_to(root)}, the images of the test; it is absent")
    present = [part for part in TRAIN if (root / part[0]).is_dir()]
    notes = () if len(present) == len(TRAIN) else (f"{root / 'VOC2012'} is absent: training on 2007 alone",)
    train, left_out = _read([(root / year, split) for year, split in present])
    test, left_out_of_test = _read([(root / TEST[0], TEST[1])])
    names = {name for _, _, objects in train for name, _, _ in objects}
    published = names <= set(CLASSES)
    classes = CLASSES if published else tuple(sorted(names))
    return DetectionData(
        name="VOC07+12" if len(present) > 1 else "VOC07",
        classes=classes,
        train=to_train_on(_split(train, left_out, classes), ignored=True),
        test=_split(test, left_out_of_test, classes),
        masks=False,
        recall_points=RECALL_POINTS,
        published=PUBLISHED if published and len(present) > 1 else None,
        notes=notes,
    )


Image = tuple[Path, tuple[int, int], list[Object]]


def _read(parts: list[tuple[Path, str]]) -> tuple[list[Image], Counter[str]]:
    images, left_out = [], Counter[str]()
    for folder, split in parts:
        photographs = {path.name for path in (folder / "JPEGImages").glob("*.jpg")}
        for line in read_text(folder / "ImageSets" / "Main" / f"{split}.txt").splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            try:
                if f"{name}.jpg" not in photographs:
                    raise Unusable("image whose file is absent")
                size, objects = _annotation(folder / "Annotations" / f"{name}.xml", left_out)
            except Unusable as error:
                left_out[str(error)] += 1
            else:
                images.append((folder / "JPEGImages" / f"{name}.jpg", size, objects))
    return images, left_out


def _annotation(path: Path, left_out: Counter[str]) -> tuple[tuple[int, int], list[Object]]:
    """An image's size and its objects.

    Raises:
        Unusable: there is no such file, or no annotation in it.
    """
    try:
        tree = ET.fromstring(path.read_bytes())
    except OSError:
        raise Unusable("image without an annotation file") from None
    except (ET.ParseError, ValueError, LookupError):
        raise Unusable("image whose annotation is no XML") from None
    size = size_of(tree.findtext("size/height"), tree.findtext("size/width"))
    return size, list(_usable(tree.findall("object"), lambda element: _object(element, *size), left_out))


def _usable(
    elements: list[ET.Element], read: Callable[[ET.Element], Object], left_out: Counter[str]
) -> Iterator[Object]:
    for element in elements:
        try:
            yield read(element)
        except Unusable as error:
            left_out[str(error)] += 1


def _object(element: ET.Element, height: int, width: int) -> Object:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise Unusable("object without a class")
    sides = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(side or "") for side in sides)
    except ValueError:
        raise Unusable("box that is not four numbers") from None
    box = clipped((left - 1, top - 1, right, bottom), height, width)
    return name, box, (element.findtext("difficult") or "0").strip() == "1"


def _split(images: list[Image], left_out: Counter[str], classes: tuple[str, ...]) -> Split:
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    left_out = left_out.copy()

    def example(path: Path, size: tuple[int, int], objects: list[Object]) -> Example:
        known = [(box, numbers[name], difficult, None) for name, box, difficult in objects if name in numbers]
        if unknown := len(objects) - len(known):
            left_out["object of a class that the training part lacks"] += unknown
        return example_of(path, *size, known)

    return Split([example(*image) for image in images], left_out)
