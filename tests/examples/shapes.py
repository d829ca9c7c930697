"""Small data sets of coloured shapes, in the true layouts of Pascal VOC and of COCO.

The form decides about the class, the colour about nothing: foreground and background are textures of random colours.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cross", "disc", "triangle")
CORNERS = {"cross": 12, "disc": 24, "triangle": 3}


class Shape(NamedTuple):
    name: str
    outline: list[tuple[float, float]]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, with every pixel inside."""
        xs, ys = zip(*self.outline, strict=True)
        return math.floor(min(xs)), math.floor(min(ys)), math.floor(max(xs)) + 1, math.floor(max(ys)) + 1

    def touches(self, other: "Shape") -> bool:
        (left, top, right, bottom), theirs = self.box, other.box
        return left < theirs[2] and theirs[0] < right and top < theirs[3] and theirs[1] < bottom


def picture(rng: np.random.Generator, side: int, most: int = 2) -> tuple[Image.Image, list[Shape]]:
    """A square image with one to ``most`` shapes that do not touch."""
    background = rng.uniform(30, 225, 3)
    canvas, shapes, wanted = texture(rng, side, background), list[Shape](), int(rng.integers(1, most + 1))
    for _ in range(20):
        if len(shapes) == wanted:
            break
        shape = _shape(rng, side)
        if not any(map(shape.touches, shapes)):
            while np.abs((color := rng.uniform(30, 225, 3)) - background).max() < 80:
                pass  # another one than the background's
            mask = Image.new("L", (side, side), 0)
            ImageDraw.Draw(mask).polygon(shape.outline, fill=255)
            canvas.paste(texture(rng, side, color), mask=mask)
            shapes.append(shape)
    return canvas, shapes


def texture(rng: np.random.Generator, side: int, color: Any = 128.0) -> Image.Image:
    """A colour, with coarse and fine noise on it."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    large = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    noise = 0.15 * (large - 128) + rng.normal(0, 8, (side, side, 3))
    return Image.fromarray((color + noise).clip(0, 255).astype(np.uint8))


def _shape(rng: np.random.Generator, side: int) -> Shape:
    name = CLASSES[rng.integers(len(CLASSES))]
    radius = rng.uniform(0.16, 0.28) * side
    x, y = rng.uniform(radius + 1, side - radius - 2, 2)
    turn = rng.uniform(-0.3, 0.3) + math.pi / 6
    angles = [turn + 2 * math.pi * corner / CORNERS[name] for corner in range(CORNERS[name])]
    reach = [radius * (0.4 if name == "cross" and corner % 3 == 0 else 1.0) for corner in range(CORNERS[name])]
    return Shape(name, [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)])


def pictures(
    folder: Path, count: int, side: int = 64, seed: int = 7, most: int = 1
) -> Iterator[tuple[str, list[Shape]]]:
    """Save images in a folder; the name of each, without its suffix, and what is on it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, shapes = picture(np.random.default_rng([seed, number]), side, most)
        image.save(folder / f"{seed:02}{number:06}.jpg", quality=92)
        yield f"{seed:02}{number:06}", shapes


def voc_tree(root: Path, train: int = 8, test: int = 4, side: int = 96) -> Path:
    """VOC2007/ with trainval and test, VOC2012/ with trainval; ``train`` images in both together.

    The first object of the last test image is difficult.
    """
    counts = {
        ("VOC2007", "trainval"): train // 2,
        ("VOC2012", "trainval"): train - train // 2,
        ("VOC2007", "test"): test,
    }
    for seed, ((year, part), count) in enumerate(counts.items()):
        names: list[str] = []
        for folder in ("Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        for name, shapes in pictures(root / year / "JPEGImages", count, side, seed, most=2):
            names.append(name)
            annotation = _annotation(side, shapes, difficult=part == "test" and len(names) == count)
            (root / year / "Annotations" / f"{name}.xml").write_text(annotation)
        (root / year / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def _annotation(side: int, shapes: list[Shape], difficult: bool) -> str:
    """As in the devkit: pixels counted from 1, the last one inside."""
    objects = ""
    for number, shape in enumerate(shapes):
        left, top, right, bottom = shape.box
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        flag = f"<difficult>{int(difficult and not number)}</difficult>"
        objects += f"<object><name>{shape.name}</name>{flag}<bndbox>{corners}</bndbox></object>"
    return (
        f"<annotation><size><width>{side}</width><height>{side}</height><depth>3</depth></size>{objects}</annotation>"
    )


def coco_tree(root: Path, train: int = 8, test: int = 4, side: int = 96) -> Path:
    """annotations/instances_{train,val}2017.json with polygons, and one RLE of a crowd in each; the images beside."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 10 * k + 3, "name": name} for k, name in enumerate(CLASSES)]  # with gaps, as COCO's
    columns = {"size": [side, side], "counts": [0, 4 * side, (side - 4) * side]}  # the first four
    crowd = {"image_id": 0, "category_id": 3, "bbox": [0, 0, 4, side], "segmentation": columns, "iscrowd": 1}
    for seed, (part, count) in enumerate({"train2017": train, "val2017": test}.items(), start=10):
        images, objects = [], []
        for number, (name, shapes) in enumerate(pictures(root / part, count, side, seed, most=2)):
            images.append({"id": number, "file_name": f"{name}.jpg", "height": side, "width": side})
            for shape in shapes:
                left, top, right, bottom = shape.box
                place = {"image_id": number, "category_id": 10 * CLASSES.index(shape.name) + 3, "iscrowd": 0}
                outline = [value for point in shape.outline for value in point]
                objects.append(place | {"bbox": [left, top, right - left, bottom - top], "segmentation": [outline]})
        content = {"images": images, "annotations": [*objects, crowd], "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root
