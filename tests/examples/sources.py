"""Small images on disk in many forms, and how the tests read them as a run does."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from barlow_recipes.data import WHOLE, PretrainingData
from barlow_recipes.images import load_images
from barlow_recipes.settings import Settings


def load(source: object, *, rows: slice = WHOLE, **changes: Any) -> PretrainingData:
    flags: dict[str, Any] = {"image_size": 16, "batch_size": 4, "workers": 0, "loader_timeout": 60}
    return load_images(Settings(data=str(source), **(flags | changes)), rows)


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


def png_16() -> bytes:
    """RGB of 16 bits, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + struct.pack(">12H", *[32768] * 12) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def jpeg_2000() -> bytes:
    """A fifth of white beside white, 16 bits, 4 × 4 in RGB, which Pillow does not write; by OpenJPEG 2.5.4."""
    return base64.b64decode(
        "/0//UQAvAAAAAAAEAAAABAAAAAAAAAAAAAAABAAAAAQAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAl"
        "AAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAAtAAH/k8/8MGQRT8QAAJgsQhIIqbHYZ+KOifDsM/FHRPh/gID/2Q=="
    )


def packed_tiff(values: Any, photometric: int) -> bytes:
    """Grey in 12 bits a pixel, one after the other, which tifffile does not write."""
    height, width = values.shape
    pairs = values.reshape(-1, 2).astype("u4")
    content = ((pairs[:, :1] << 12 | pairs[:, 1:]) >> np.array([16, 8, 0]) & 255).astype("u1").tobytes()
    tags = (
        (256, width), (257, height), (258, 12), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
        (279, len(content)),
    )  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def masked_tiff(values: Any, **options: Any) -> bytes:
    """An image, and in a second page a mask of one bit, as GDAL writes them."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(values, metadata=None, **{"photometric": "minisblack"} | options)
        writer.write(np.ones(values.shape[:2], bool), metadata=None, subfiletype=4)
    return file.getvalue()


def ome_set(values: Any, files: int) -> list[bytes]:
    """Planes (C, H, W), or colour images (T, H, W, 3), in several files, each with its share and the plan of all."""
    count, height, width, *samples = values.shape
    own, axis, colors = count // files, "T" if samples else "C", 3 if samples else count
    channels = '<Channel SamplesPerPixel="3"/>' if samples else '<Channel SamplesPerPixel="1"/>' * count
    places = "".join(
        f'<TiffData First{axis}="{k}" IFD="{k % own}" PlaneCount="1"><UUID FileName="{k // own}.ome.tif">'
        f"urn:uuid:{UUID(int=k // own)}</UUID></TiffData>"
        for k in range(count)
    )
    plan = (
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{values.dtype}" SizeX="{width}" '
        f'SizeY="{height}" SizeC="{colors}" SizeZ="1" SizeT="{count if samples else 1}">{channels}{places}'
        "</Pixels></Image></OME>"
    )
    heads = (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{UUID(int=number)}">'
        for number in range(files)
    )
    kind = "rgb" if samples else "minisblack"
    parts = zip(np.split(values, files), heads, strict=True)
    return [tiff(part, description=head + plan, metadata=None, photometric=kind) for part, head in parts]


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
