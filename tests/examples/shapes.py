"""Small data sets of coloured shapes, in the true layouts of Pascal VOC and of COCO.

The form decides about the class, the colour about nothing: foreground and background are textures of random colours.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cross", "disc", "triangle")
CORNERS = {"cross": 12, "disc": 24, "triangle": 3}
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    name: str
    outline: list[Point]
    crowd: bool = False  # or difficult

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, with every pixel inside."""
        xs, ys = zip(*self.outline, strict=True)
        return math.floor(min(xs)), math.floor(min(ys)), math.floor(max(xs)) + 1, math.floor(max(ys)) + 1


def picture(rng: np.random.Generator, side: int, most: int = 2) -> tuple[Image.Image, list[Shape]]:
    """A square image with one to ``most`` shapes that do not touch."""
    background = rng.uniform(30, 225, 3)
    canvas = texture(rng, side, background)
    shapes: list[Shape] = []
    wanted = int(rng.integers(1, most + 1))
    for _ in range(20):
        if len(shapes) == wanted:
            break
        shape = _shape(rng, side)
        if any(_touch(shape.box, other.box) for other in shapes):
            continue
        mask = Image.new("L", (side, side), 0)
        ImageDraw.Draw(mask).polygon(shape.outline, fill=255)
        canvas.paste(texture(rng, side, _unlike(rng, background)), mask=mask)
        shapes.append(shape)
    return canvas, shapes


def _unlike(rng: np.random.Generator, color: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """A random colour that can be told from another."""
    while np.abs((other := rng.uniform(30, 225, 3)) - color).max() < 80:
        pass
    return other


def texture(rng: np.random.Generator, side: int, color: "np.ndarray[Any, Any] | float" = 128.0) -> Image.Image:
    """A colour, with coarse and fine noise on it."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noise = 0.15 * (np.asarray(coarse, dtype=np.float64) - 128) + rng.normal(0, 8, (side, side, 3))
    return Image.fromarray((color + noise).clip(0, 255).astype(np.uint8))


def _shape(rng: np.random.Generator, side: int) -> Shape:
    name = CLASSES[rng.integers(len(CLASSES))]
    radius = rng.uniform(0.16, 0.28) * side
    center = rng.uniform(radius + 1, side - radius - 2, 2)
    turn = rng.uniform(-0.3, 0.3) + math.pi / 6
    angles = [turn + 2 * math.pi * corner / CORNERS[name] for corner in range(CORNERS[name])]
    reach = [radius * (0.4 if name == "cross" and corner % 3 == 0 else 1.0) for corner in range(CORNERS[name])]
    outline = [(center[0] + r * math.cos(a), center[1] + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)]
    return Shape(name, outline)


def _touch(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _pictures(seed: int, count: int, side: int) -> Iterator[tuple[int, Image.Image, list[Shape]]]:
    for number in range(count):
        yield number, *picture(np.random.default_rng([seed, number]), side)


def class_folder(root: Path, count: int, side: int = 64, seed: int = 7) -> Path:
    """Unlabelled images of one shape each, to pretrain on."""
    folder = root / "all"
    folder.mkdir(parents=True)
    for number in range(count):
        picture(np.random.default_rng([seed, number]), side, most=1)[0].save(folder / f"{number:05}.jpg", quality=92)
    return root


def voc_tree(root: Path, train: int = 8, test: int = 4, side: int = 96) -> Path:
    """VOC2007/ with trainval and test, VOC2012/ with trainval; ``train`` images in both together.

    The first object of the last test image is difficult.
    """
    halves = {
        ("VOC2007", "trainval"): train // 2,
        ("VOC2012", "trainval"): train - train // 2,
        ("VOC2007", "test"): test,
    }
    for seed, ((year, part), count) in enumerate(halves.items()):
        names = []
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        for number, image, shapes in _pictures(seed, count, side):
            name = f"{seed:02}{number:04}"
            image.save(root / year / "JPEGImages" / f"{name}.jpg", quality=92)
            difficult = part == "test" and number == count - 1
            (root / year / "Annotations" / f"{name}.xml").write_text(_annotation(side, shapes, difficult))
            names.append(name)
        (root / year / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def _annotation(side: int, shapes: list[Shape], difficult: bool) -> str:
    """As in the devkit: pixels counted from 1, the last one inside."""
    objects = []
    for number, shape in enumerate(shapes):
        left, top, right, bottom = shape.box
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        flag = f"<difficult>{int(difficult and not number)}</difficult>"
        objects.append(f"<object><name>{shape.name}</name>{flag}<bndbox>{corners}</bndbox></object>")
    size = f"<size><width>{side}</width><height>{side}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def coco_tree(root: Path, train: int = 8, test: int = 4, side: int = 96) -> Path:
    """annotations/instances_{train,val}2017.json with polygons, and one RLE of a crowd in each; the images beside."""
    (root / "annotations").mkdir(parents=True)
    for seed, (part, count) in enumerate({"train2017": train, "val2017": test}.items(), start=10):
        (root / part).mkdir()
        categories = [{"id": 10 * k + 3, "name": name} for k, name in enumerate(CLASSES)]  # with gaps, as COCO's
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": categories}
        for number, image, shapes in _pictures(seed, count, side):
            name = f"{seed}{number:06}.jpg"
            image.save(root / part / name, quality=92)
            content["images"].append({"id": number, "file_name": name, "height": side, "width": side})
            for shape in shapes:
                left, top, right, bottom = shape.box
                category, box = 10 * CLASSES.index(shape.name) + 3, [left, top, right - left, bottom - top]
                outline = [[value for point in shape.outline for value in point]]
                content["annotations"].append(_coco_object(number, category, box, outline))
        columns = {"size": [side, side], "counts": [0, 4 * side, (side - 4) * side]}  # the first four
        content["annotations"].append(_coco_object(0, 3, [0, 0, 4, side], columns) | {"iscrowd": 1})
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def _coco_object(image: int, category: int, box: list[float], segmentation: object) -> dict[str, object]:
    content = {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    return {**content, "segmentation": segmentation}
