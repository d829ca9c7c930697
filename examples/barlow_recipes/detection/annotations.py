"""What an annotated image is, and which boxes and masks can be used."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barlow_recipes.errors import UsageError, first_line, require

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
THINNEST = 0.01  # pixels; float32 would make nothing of much less, and torchvision refuses nothing


class Unusable(ValueError):
    """A part of the annotations that is left out and counted; its message is the kind that it is counted as."""


@dataclass(frozen=True)
class Example:
    """An image and its objects. No tensors: a hundred thousand of them would not pass to worker processes."""

    path: Path
    height: int
    width: int
    boxes: npt.NDArray[np.float32]  # (N, 4)
    labels: npt.NDArray[np.int64]  # (N,) from 1; 0 is the background
    ignored: npt.NDArray[np.bool_]  # (N,) neither found nor missed in the test: VOC's difficult ones, COCO's crowds
    segmentations: bytes = b""  # of all objects, in JSON: the polygons or the RLE of each

    def without(self, objects: npt.NDArray[np.bool_]) -> "Example":
        kept = ~objects
        segmentations = b""
        if self.segmentations:
            each = json.loads(self.segmentations)
            segmentations = json.dumps([each[number] for number in np.flatnonzero(kept)]).encode()
        return Example(
            self.path,
            self.height,
            self.width,
            self.boxes[kept],
            self.labels[kept],
            self.ignored[kept],
            segmentations,
        )


@dataclass(frozen=True)
class Split:
    """The images of a part of a data set, and what of it was left out: how many of which kind."""

    examples: list[Example]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def boxes(self) -> int:
        return sum(len(example.boxes) for example in self.examples)


@dataclass(frozen=True)
class DetectionData:
    """A data set of one of the two layouts."""

    name: str
    classes: tuple[str, ...]  # class k has label k + 1
    train: Split
    test: Split
    masks: bool
    recall_points: int  # at which precision is averaged
    published: Mapping[str, Mapping[str, float]] | None  # Barlow Twins' scores, where these are the published data
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Of what is there; processes that disagree cannot share batches."""
        parts = [f"{len(split.examples)} images with {split.boxes} boxes" for split in (self.train, self.test)]
        return f"{self.name}: {' and '.join(parts)} of {len(self.classes)} classes"


def example_of(path: Path, height: int, width: int, objects: Iterable[tuple[Box, int, bool, Any]]) -> Example:
    """Of (box, label, ignored, segmentation or None) for each object."""
    columns = list(zip(*objects, strict=True)) or [(), (), (), ()]
    boxes, labels, ignored, segmentations = columns
    masks = any(segmentation is not None for segmentation in segmentations)
    return Example(
        path,
        height,
        width,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(ignored, dtype=np.bool_),
        json.dumps(segmentations).encode() if masks else b"",
    )


def size_of(height: Any, width: Any) -> tuple[int, int]:
    """An image's size as it is annotated.

    Raises:
        Unusable: not two positive whole numbers.
    """
    try:
        size = int(height), int(width)
    except (TypeError, ValueError, OverflowError):
        size = 0, 0
    if min(size) < 1:
        raise Unusable("image without a size")
    return size


def clipped(box: Iterable[Any], height: int, width: int) -> Box:
    """The part of a box that lies in the image.

    Args:
        box: left, top, right, bottom.
        height: of the image.
        width: of the image.

    Raises:
        Unusable: not four finite numbers, no width or no height, or outside the image.
    """
    try:
        left, top, right, bottom = (float(number) for number in box)
    except (TypeError, ValueError):
        raise Unusable("box that is not four numbers") from None
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise Unusable("box with a number that is not finite")
    if right - left < THINNEST or bottom - top < THINNEST:
        raise Unusable("box without width or height")
    inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if inside[2] - inside[0] < THINNEST or inside[3] - inside[1] < THINNEST:
        raise Unusable("box outside its image")
    return inside


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Whether :func:`decoded` can make a mask of COCO's polygons or run lengths.

    Raises:
        Unusable: it cannot, or nothing of it lies in the image.
    """
    if isinstance(segmentation, list) and segmentation:
        check_polygons(segmentation, height, width)
    elif isinstance(segmentation, dict):
        check_run_lengths(segmentation, height, width)
    else:
        raise Unusable("object without a mask")


def check_polygons(polygons: Sequence[Any], height: int, width: int) -> None:
    inside = False
    for polygon in polygons:
        try:
            xs, ys = [*map(float, polygon[0::2])], [*map(float, polygon[1::2])]
        except (TypeError, ValueError):
            raise Unusable("mask whose polygon is not numbers") from None
        if len(xs) != len(ys) or len(xs) < 3:
            raise Unusable("mask whose polygon has fewer than three points, or half a point")
        if not all(map(math.isfinite, [*xs, *ys])):
            raise Unusable("mask whose polygon has a number that is not finite")
        inside |= max(xs) > 0 and max(ys) > 0 and min(xs) < width and min(ys) < height
    if not inside:
        raise Unusable("mask outside its image")


def check_run_lengths(rle: Mapping[str, Any], height: int, width: int) -> None:
    counts, broken = rle.get("counts"), Unusable("mask whose run lengths are broken")
    if rle.get("size") != [height, width]:
        raise Unusable("mask whose run lengths are of another size than its image")
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and count >= 0 for count in counts)
        if not whole or sum(counts) != height * width:
            raise broken
        if not any(counts[1::2]):
            raise Unusable("mask without a pixel")
        return
    if not isinstance(counts, str):
        raise broken
    try:
        decoded([rle], height, width)
    except (TypeError, ValueError, OverflowError, MemoryError, UnicodeError):
        raise broken from None


def decoded(segmentations: Sequence[Any], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The masks of the objects of an image: (N, H, W), 0 or 1."""
    coding = require("pycocotools.mask", "masks")
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # pycocotools' own
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for number, segmentation in enumerate(segmentations):
        runs = segmentation
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            runs = coding.frPyObjects(segmentation, height, width)
        mask = coding.decode(runs)
        masks[number] = mask.any(axis=2) if mask.ndim == 3 else mask
    return masks


def to_train_on(split: Split, *, ignored: bool) -> Split:
    """The images with something on them; with ``ignored``, what the test ignores is learned too.

    As detectron2's FILTER_EMPTY_ANNOTATIONS.
    """
    left_out = split.left_out.copy()
    examples = [example if ignored else example.without(example.ignored) for example in split.examples]
    kept = [example for example in examples if len(example.boxes)]
    if empty := len(examples) - len(kept):
        left_out["image without an object to learn"] += empty
    return Split(kept, left_out)


def require_use(split: Split, name: str, root: Path) -> None:
    """Refuse a part without a box.

    Raises:
        UsageError: with what was left out of it.
    """
    if split.boxes:
        return
    why = f" ({told(split.left_out)})" if split.left_out else ""
    raise UsageError(f"--data {root}: expected boxes to {name}, found none that can be used{why}")


def told(left_out: Mapping[str, int]) -> str:
    """What was left out, in one line."""
    return ", ".join(f"{kind} × {count:,}" for kind, count in sorted(left_out.items()))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"--data: cannot read {path}: {reason}") from None
