"""Pascal VOC and COCO as one: images with boxes, labels and, of COCO, masks; in batches, from worker processes.

VOC's XML is taken to what COCO's JSON would say; from there on there is one path. Objects without a pixel in the image,
and images without a file, are left out and counted. As in detectron2, VOC's
difficult objects are trained on, COCO's crowds are not, and in the test both are neither found nor missed. Different
from its figures of VOC: a difficult object ignores every detection that lies in it by half, as COCO's crowds do, where
VOC asks for the IoU; and an IoU counts no pixel more to each side.

No random state travels from step to step: the order is a function of (seed, epoch), a flip of (seed, epoch, index).
"""

import contextlib
import json
import math
import random
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset
from torchvision.transforms.v2.functional import horizontal_flip_bounding_boxes, to_dtype
from torchvision.tv_tensors import BoundingBoxFormat

from barlow_recipes import distributed
from barlow_recipes.data import EpochBatches, seed_of
from barlow_recipes.detection.settings import Settings, find_layout
from barlow_recipes.errors import Aborted, UsageError, first_line, require
from barlow_recipes.images import Loader
from barlow_recipes.pixels import decode

THINNEST = 0.01  # pixels; float32 would make nothing of much less, and torchvision refuses nothing
BROKEN = (LookupError, TypeError, ValueError, OverflowError, RecursionError)  # what a broken annotation raises
FARTHEST = 10  # times an image's longer side may a polygon reach
TRIES = 32  # images in a row that cannot be read end the run
Size = tuple[int, int]  # height, width
Target = dict[str, Tensor]
Item = tuple[Tensor | None, Target, int]  # of one image, as in a batch; None where none could be read


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


def load_data(root: Path) -> DetectionData:
    """Read the annotations of either layout; UsageError: they are absent or broken, or no box can be used."""
    try:
        data = _voc(root) if find_layout(root) == "voc" else _coco(root)
    except (*BROKEN, OSError, ET.ParseError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"--data {root}: cannot read the annotations: {reason}") from None
    if not all(split.counts()["boxes"] for split in (data.train, data.test)):
        raise UsageError(f"--data {root}: expected boxes to train on and boxes to find, got {data}")
    return data


def _voc(root: Path) -> DetectionData:
    """Trained on the trainval parts of 2007 and 2012, tested on the test part of 2007 by the metric of that year."""
    folders = [root / year for year in ("VOC2007", "VOC2012") if (root / year).is_dir()]
    train, test = _voc_content(folders, "trainval"), _voc_content(folders[:1], "test")
    classes = sorted({annotation["category_id"] for annotation in train["annotations"]})
    labels = {name: label for label, name in enumerate(classes, 1)}
    parts = [_split(part, root, labels, masks=False, learn=part is train) for part in (train, test)]
    return DetectionData("VOC07+12" if len(folders) > 1 else "VOC07", classes, *parts, masks=False, recall_points=11)


def _voc_content(folders: list[Path], part: str) -> dict[str, list[Any]]:
    """What COCO's JSON would say: a class is its name, a difficult object a crowd; pixels count from 0 instead of 1."""
    images, annotations = [], []
    for folder in folders:
        for name in (folder / "ImageSets" / "Main" / f"{part}.txt").read_text(encoding="utf-8").split():
            key, tree = f"{folder.name}/JPEGImages/{name}.jpg", ET.parse(folder / "Annotations" / f"{name}.xml")
            sides = {side: tree.findtext(f"size/{side}") for side in ("height", "width")}
            images.append({"id": key, "file_name": key, **sides})
            for element in tree.iterfind("object"):
                corners = [float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                left, top, right, bottom = corners  # the last pixel is inside
                box = left - 1, top - 1, right - left + 1, bottom - top + 1
                label, crowd = element.findtext("name", "").strip(), int(element.findtext("difficult", "0"))
                annotations.append({"image_id": key, "category_id": label, "bbox": box, "iscrowd": crowd})
    return {"images": images, "annotations": annotations}


def _coco(root: Path) -> DetectionData:
    files = [root / "annotations" / f"instances_{part}.json" for part in ("train2017", "val2017")]
    train, test = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    names = {int(category["id"]): str(category["name"]) for category in train["categories"]}
    labels = {number: label for label, number in enumerate(sorted(names), 1)}  # without the gaps in COCO's numbers
    learned = _split(train, root / "train2017", labels, masks=True, learn=True)
    tested = _split(test, root / "val2017", labels, masks=True, learn=False)
    return DetectionData("COCO", [names[number] for number in labels], learned, tested, masks=True, recall_points=101)


def _split(content: dict[str, list[Any]], folder: Path, labels: dict[Any, int], *, masks: bool, learn: bool) -> Split:
    """The images that are in the folder, with their objects of the labelled categories that are in the image.

    To learn from, crowds are left away (of COCO: VOC's difficult objects are learned), and images without an object.
    """
    objects_left_out = 0
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]}
    paths = {image["id"]: folder / image["file_name"] for image in content["images"]}
    objects: dict[Any, list[tuple[Any, ...]]] = {key: [] for key, path in paths.items() if path.is_file()}
    for annotation in content["annotations"]:
        key, crowd = annotation["image_id"], annotation.get("iscrowd") == 1
        if key not in objects or (learn and masks and crowd):
            continue
        box, label = clipped(annotation["bbox"], sizes[key]), labels.get(annotation["category_id"])
        runs = run_lengths(annotation["segmentation"], sizes[key]) if masks else b""
        if box and label and (runs or not masks):
            objects[key].append((box, label, crowd, runs))
        else:
            objects_left_out += 1
    examples = []
    for key, found in objects.items():
        if found or not learn:  # as detectron2's FILTER_EMPTY_ANNOTATIONS
            boxes, numbers, crowds, runs = zip(*found, strict=True) if found else [()] * 4
            arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(numbers, np.int64), np.array(crowds, np.int64)
            examples.append(Example(paths[key], sizes[key], *arrays, runs))
    images_left_out = len(content["images"]) - len(examples)
    return Split(examples, {"images_left_out": images_left_out, "objects_left_out": objects_left_out})


def clipped(box: Any, size: Size) -> tuple[float, float, float, float] | None:
    """What of a box (left, top, width, height) lies in the image: left, top, right, bottom; None: nothing."""
    left, top, across, down = map(float, box)
    inside = max(left, 0.0), max(top, 0.0), min(left + across, size[1]), min(top + down, size[0])
    wide = inside[2] - inside[0] >= THINNEST and inside[3] - inside[1] >= THINNEST
    return inside if wide and math.isfinite(left + top + across + down) else None


def run_lengths(segmentation: Any, size: Size) -> bytes:
    """The compressed run lengths of a mask, of COCO's polygons or run lengths; of an empty one nothing (ValueError)."""
    coding = require("pycocotools.mask", "masks")
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=float) for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return b""
        if not all(len(points) % 2 == 0 and (abs(points) <= FARTHEST * max(size)).all() for points in polygons):
            raise ValueError("a polygon without pairs of numbers, or far from the image")  # for which memory is endless
        runs = coding.merge(coding.frPyObjects([points.tolist() for points in polygons], *size))
    elif [*segmentation["size"]] != [*size]:
        raise ValueError("a mask of another size than its image")
    else:
        listed = isinstance(segmentation["counts"], list)
        runs = coding.frPyObjects(segmentation, *size) if listed else segmentation
        runs = coding.encode(np.asfortranarray(coding.decode(runs)))  # as pycocotools itself would write them
    return bytes(runs["counts"]) if coding.area(runs) else b""


class Batch(NamedTuple):
    """Images, (3, H, W) uint8 of any sizes, and what is on them; ``unreadable`` were replaced by others or left out."""

    images: list[Tensor]
    targets: list[Target]
    unreadable: int

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Target]]:
        """As torchvision's detectors take them: the images from 0 to 1."""
        on = partial(Tensor.to, device=device, non_blocking=True)
        targets = [{name: on(value) for name, value in target.items()} for target in self.targets]
        return [to_dtype(on(image), scale=True) for image in self.images], targets


class Images(Dataset[Item]):
    """The images of a run, by (epoch, index) those to train on, by (None, index) those of the test; and their batches.

    In training half of them are flipped, and one that cannot be read is replaced by the next; in the test it is not.
    Of every batch these are this process's rows.
    """

    def __init__(self, data: DetectionData, settings: Settings, *, pin_memory: bool = False) -> None:
        self.data, self.settings, self.pin_memory = data, settings, pin_memory
        count, batch_size, processes = len(data.train.examples), settings.batch_size, distributed.world_size()
        if not processes <= batch_size <= count:
            expected = f"from {processes}, one for each process, to {count}, all annotated images"
            raise UsageError(f"--batch-size {batch_size}: expected {expected}")
        self.rows = distributed.shard(batch_size)
        self.own = self.rows.stop - self.rows.start

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        epoch, index = key
        examples = self.data.test.examples if epoch is None else self.data.train.examples
        tries = 1 if epoch is None else min(TRIES, len(examples))
        for failures in range(tries):
            with contextlib.suppress(OSError):
                image, target = read(examples[(index + failures) % len(examples)], masks=self.data.masks)
                if epoch is not None and random.Random(seed_of(self.settings.seed, epoch, index)).random() < 0.5:
                    image, target = flipped(image, target)
                return image, target, failures
        return None, {}, tries

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches to train on from a step on, without an end; Aborted: too many images in a row cannot be read."""
        order = EpochBatches(len(self.data.train.examples), self.settings.batch_size, self.settings.seed, self.rows)
        order.epoch, order.first_step = divmod(step, len(order))

        def keys() -> Iterator[list[tuple[int, int]]]:
            while True:
                yield from order
                order.epoch, order.first_step = order.epoch + 1, 0

        for batch in self._batches(keys()):
            if len(batch.images) < self.own:
                raise Aborted(f"{TRIES} images in a row, or all of fewer, cannot be read: is --data whole?")
            yield batch

    def of_test(self) -> Iterator[Batch]:
        """Every image of the test once, spread over the processes."""
        own = range(distributed.rank(), len(self.data.test.examples), distributed.world_size())
        return self._batches(BatchSampler([(None, index) for index in own], self.own, drop_last=False))

    def _batches(self, keys: Any) -> Iterator[Batch]:
        how = {"num_workers": self.settings.workers, "pin_memory": self.pin_memory, "collate_fn": _collated}
        return iter(Loader(self, self.settings.loader_timeout, batch_sampler=keys, **how))


def read(example: Example, *, masks: bool) -> tuple[Tensor, Target]:
    """An image and its objects; OSError: it cannot be read, or is not of the size that is annotated."""
    path, size, boxes, labels, ignored, runs = example
    image = decode(path.read_bytes(), str(path))
    if image.shape[1:] != size:
        raise OSError(f"{path}: expected the annotated size")
    target = {"boxes": boxes, "labels": labels, "iscrowd": ignored}
    if masks:
        decoded = require("pycocotools.mask", "masks").decode
        each = [decoded({"size": size, "counts": counts}) for counts in runs]
        target["masks"] = np.array(each, np.uint8).reshape(-1, *size)
    return image, {name: torch.from_numpy(value) for name, value in target.items()}


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The mirror image, left to right."""
    boxes = horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, image.shape[1:])
    masks = {"masks": target["masks"].flip(2)} if "masks" in target else {}
    return image.flip(2), target | {"boxes": boxes} | masks


def _collated(items: list[Item]) -> Batch:
    read = [(image, target) for image, target, _ in items if image is not None]
    return Batch([image for image, _ in read], [target for _, target in read], sum(item[2] for item in items))
