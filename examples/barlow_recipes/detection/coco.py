"""The layout of COCO: annotations/instances_{train,val}2017.json, and the images in train2017/ and val2017/.

As in detectron2, crowds are not trained on, and in the test they are neither found nor missed. Precision is averaged at
101 points of recall, at IoU 0.5 to 0.95.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from barlow_recipes.detection.annotations import (
    Box,
    DetectionData,
    Split,
    Unusable,
    check_segmentation,
    clipped,
    example_of,
    read_text,
    size_of,
    to_train_on,
)
from barlow_recipes.errors import UsageError, first_line

TRAIN, TEST = "train2017", "val2017"
PUBLISHED = {  # Zbontar et al. (2021), transfer to detection
    "box": {"AP": 39.2, "AP50": 59.0, "AP75": 42.5},
    "mask": {"AP": 34.3, "AP50": 56.0, "AP75": 36.5},
}
RECALL_POINTS = 101
PUBLISHED_CLASSES = 80
Object = tuple[Box, int, bool, Any]


def is_coco(root: Path) -> bool:
    return (root / "annotations").is_dir()


def read_coco(root: Path) -> DetectionData:
    """Read every annotation; what cannot be used is counted.

    Raises:
        UsageError: a file is absent, is no JSON, or has no images, annotations and categories.
    """
    train, test = _load(root, TRAIN), _load(root, TEST)
    names = _categories(root, train)
    numbers = {number: label for label, number in enumerate(sorted(names), start=1)}
    classes = tuple(names[number] for number in sorted(names))
    return DetectionData(
        name="COCO",
        classes=classes,
        train=to_train_on(_split(root, TRAIN, train, numbers), ignored=False),
        test=_split(root, TEST, test, numbers),
        masks=True,
        recall_points=RECALL_POINTS,
        published=PUBLISHED if len(classes) == PUBLISHED_CLASSES and "toothbrush" in classes else None,
    )


def _path(root: Path, part: str) -> Path:
    return root / "annotations" / f"instances_{part}.json"


def _load(root: Path, part: str) -> dict[str, list[Any]]:
    path = _path(root, part)
    try:
        content = json.loads(read_text(path))  # Python's reads NaN and Infinity too: the checks of boxes find them
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--data {root}: expected JSON in {path}: {first_line(error)}") from None
    keys = "images", "annotations", "categories"
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UsageError(f"--data {root}: expected lists of images, annotations and categories in {path}")
    if not (root / part).is_dir():
        raise UsageError(f"--data {root}: expected the images in {root / part}; there is no such folder")
    return content


def _categories(root: Path, content: dict[str, list[Any]]) -> dict[int, str]:
    try:
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (KeyError, TypeError, ValueError):
        names = {}
    if not names:
        raise UsageError(f"--data {root}: expected categories with id and name in {_path(root, TRAIN)}")
    return names


def _split(root: Path, part: str, content: dict[str, list[Any]], numbers: dict[int, int]) -> Split:
    left_out: Counter[str] = Counter()
    files = {path.name for path in (root / part).iterdir()}
    sizes: dict[Any, tuple[Path, int, int]] = {}
    for image in content["images"]:
        try:
            key, name, size = _image(image)
        except Unusable as error:
            left_out[str(error)] += 1
            continue
        sizes[key] = (root / part / name, *size)
    objects: defaultdict[Any, list[Object]] = defaultdict(list)
    for annotation in content["annotations"]:
        try:
            key = _image_of(annotation, sizes)
            objects[key].append(_object(annotation, *sizes[key][1:], numbers))
        except Unusable as error:
            left_out[str(error)] += 1
    absent = [key for key, (path, _, _) in sizes.items() if path.name not in files]
    if absent:
        left_out["image whose file is absent"] += len(absent)
    for key in absent:
        del sizes[key]
    return Split([example_of(*image, objects[key]) for key, image in sizes.items()], left_out)


def _image(image: Any) -> tuple[Any, str, tuple[int, int]]:
    try:
        key, name = image["id"], Path(str(image["file_name"])).name
        hash(key)
    except (KeyError, TypeError):
        raise Unusable("image without id or file_name") from None
    return key, name, size_of(image.get("height"), image.get("width"))


def _image_of(annotation: Any, sizes: dict[Any, Any]) -> Any:
    key = annotation.get("image_id") if isinstance(annotation, dict) else None
    try:
        listed = key in sizes
    except TypeError:  # a list, say
        listed = False
    if not listed:
        raise Unusable("annotation of an image that is not listed")
    return key


def _object(annotation: dict[str, Any], height: int, width: int, numbers: dict[int, int]) -> Object:
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in numbers:
        raise Unusable("annotation of a category that is not listed")
    try:
        left, top, across, down = annotation["bbox"]
        corners = left, top, left + across, top + down
    except (KeyError, TypeError, ValueError):
        raise Unusable("box that is not four numbers") from None
    box = clipped(corners, height, width)
    segmentation = annotation.get("segmentation")
    check_segmentation(segmentation, height, width)
    return box, numbers[category], annotation.get("iscrowd", 0) == 1, segmentation
