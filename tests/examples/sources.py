"""Small images on disk in many forms, and how the tests read them as a run does."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from barlow_recipes.data import PretrainingData
from barlow_recipes.images import load_images
from barlow_recipes.views import PAPER


def load(source: object, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": PAPER, "image_size": 16, "batch_size": 4, "seed": 0, "workers": 0}
    settings |= {"timeout": 60, "monitor": True, "pin_memory": False}
    return load_images(str(source), **(settings | changes))


def fill(folder: Path, images: int) -> Path:
    """PNG files, each of one colour of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        (folder / f"{number:03}.png").write_bytes(saved(Image.new("RGB", (12, 10), (number, 255 - number, 100))))
    return folder


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def tiff(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack"} | options)
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tensors(batches: Any) -> list[Tensor]:
    """What is in views, unfinished ones too, or in batches of a probe."""
    if isinstance(batches, Tensor):
        return [batches]
    return [tensor for part in batches if not isinstance(part, int) for tensor in tensors(part)]


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(*pair) for pair in pairs)
