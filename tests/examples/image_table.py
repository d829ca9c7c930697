"""What becomes of every kind of image file in three readers, as the table of docs/images.md: ``--write`` writes it.

    PYTHONPATH=.:examples:tests/examples python tests/examples/image_table.py --write

Each file is made here of one picture; a reader is right where it gives the picture back.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from sources import jpeg_2000, masked_tiff, png_16, saved, tiff
from torch import Tensor

from barlow_recipes.errors import UsageError
from barlow_recipes.files import Items
from barlow_recipes.images import look_at_some
from barlow_recipes.pixels import USUAL, PixelSettings, decode

PAGE = Path(__file__).parents[2] / "docs" / "images.md"
BEGIN, END = "<!-- images:begin -->\n", "<!-- images:end -->\n"
RAMP = np.linspace(0, 1, 320).reshape(16, 20)  # not square, and no mirror image of itself
EIGHT, SIXTEEN = np.round(255 * RAMP).astype("u1"), np.round(65535 * RAMP).astype("u2")
RGB = Image.fromarray(np.stack([EIGHT, EIGHT // 2, 255 - EIGHT], axis=2))
PALETTE = RGB.quantize(256)
GREY, GREY_OF_8, BLACK_AND_WHITE = RAMP[None], EIGHT[None] / 255, EIGHT[None] > 127


def planes(image: Image.Image) -> Any:
    return np.array(image.convert("RGB")).transpose(2, 0, 1) / 255


COLOR = planes(RGB)
Range = tuple[float, float] | None


def turned(image: Image.Image) -> bytes:
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    return saved(image, "JPEG", quality=100, subsampling=0, exif=exif)


def animated(kind: str) -> bytes:
    other = Image.new("RGB", RGB.size)
    return saved(RGB, kind, save_all=True, append_images=[other], **({"lossless": True} if kind == "WEBP" else {}))


def alpha() -> Image.Image:
    image = RGB.copy()
    image.putalpha(128)
    return image


# The file, the picture in [0, 1], and what --value-range has to say where the type has no white.
FILES: dict[str, tuple[bytes, Any, Range]] = {
    "JPEG, colour": (saved(RGB, "JPEG", quality=100, subsampling=0), COLOR, None),
    "JPEG, CMYK": (saved(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), COLOR, None),
    "JPEG, EXIF: a quarter turn": (turned(RGB), np.rot90(COLOR, -1, (1, 2)).copy(), None),
    "PNG, grey": (saved(Image.fromarray(EIGHT)), GREY_OF_8, None),
    "PNG, 1 bit": (saved(Image.fromarray(EIGHT > 127)), BLACK_AND_WHITE, None),
    "PNG, palette": (saved(PALETTE), planes(PALETTE), None),
    "PNG, alpha": (saved(alpha()), COLOR, None),
    "PNG, grey of 16 bits": (saved(Image.fromarray(SIXTEEN)), GREY, None),
    "PNG, colour of 16 bits": (png_16(), np.full((3, 4, 4), 32768 / 65535), None),
    "PNG, animated": (animated("PNG"), COLOR, None),
    "WebP, animated": (animated("WEBP"), COLOR, None),
    "PGM, 16 bits": (saved(Image.fromarray(SIXTEEN), "PPM"), GREY, None),
    "TIFF, 8 bits, white is zero": (tiff(255 - EIGHT, photometric="miniswhite"), GREY_OF_8, None),
    "TIFF, 16 bits": (tiff(SIXTEEN), GREY, None),
    "TIFF, 16 bits, big-endian": (tiff(SIXTEEN.astype(">u2"), byteorder=">"), GREY, None),
    "TIFF, 16 bits, white is zero": (tiff(~SIXTEEN, photometric="miniswhite"), GREY, None),
    "TIFF, colour of 16 bits": (
        tiff(np.stack([SIXTEEN] * 3, axis=2), photometric="rgb"), np.repeat(GREY, 3, 0), None
    ),
    "TIFF, colour of 16 bits, in planes": (
        tiff(np.stack([SIXTEEN] * 3), photometric="rgb", planarconfig="separate"), np.repeat(GREY, 3, 0), None
    ),
    "TIFF, CMYK of 16 bits": (
        tiff(np.stack([SIXTEEN] * 3 + [0 * SIXTEEN], axis=2), photometric="separated"), np.repeat(1 - GREY, 3, 0), None
    ),
    "TIFF, 16 bits, with a mask": (masked_tiff(SIXTEEN), GREY, None),
    "JPEG 2000, colour of 16 bits": (jpeg_2000(), np.full((3, 4, 4), [0.2, 0.2, 1, 1]), None),
    "TIFF, 12 bits in 16": (tiff((4095 * RAMP).astype("u2")), GREY, (0, 4095)),
    "TIFF, int16": (tiff((2000 * RAMP - 1000).astype("i2")), GREY, (-1000, 1000)),
    "TIFF, int16, big-endian, deflate": (
        tiff((2000 * RAMP - 1000).astype(">i2"), byteorder=">", compression="deflate"), GREY, (-1000, 1000)
    ),
    "TIFF, uint32": (tiff((4e9 * RAMP).astype("u4")), GREY, (0, 4e9)),
    "TIFF, float32": (tiff(RAMP.astype("f4")), GREY, None),
    "TIFF, float32, big-endian, deflate": (tiff(RAMP.astype(">f4"), byteorder=">", compression="deflate"), GREY, None),
    "TIFF, float64": (tiff(RAMP), GREY, None),
}  # fmt: skip


def ours(content: bytes, pixels: PixelSettings = USUAL) -> Tensor:
    """As a run reads images, after its look at some of them."""
    images = Items.of_dataset("image", [content], None, None)
    look_at_some(images, "image", pixels)
    return in_unit_range(decode(*images.read(0), pixels))


def of_torchvision(content: bytes) -> Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return in_unit_range(torchvision.io.decode_image(encoded, "RGB"))


def of_pillow(content: bytes) -> Tensor:
    """As torchvision's ImageFolder loads it."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return in_unit_range(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def in_unit_range(image: Tensor) -> Tensor:
    return image.double() / {torch.uint8: 255, torch.uint16: 65535}.get(image.dtype, 1)


READERS: dict[str, Callable[[bytes], Tensor]] = {
    "this program": ours,
    "`torchvision.io.decode_image`": of_torchvision,
    "Pillow's `convert('RGB')`": of_pillow,
}


def outcome(reader: str, name: str) -> str:
    content, picture, declared = FILES[name]
    lossy = name.startswith("JPEG")
    try:
        return judged(READERS[reader](content), picture, lossy)
    except UsageError as error:
        if declared is None or "--value-range" not in str(error):
            return "refused"
        return f"{judged(ours(content, PixelSettings(value_range=declared)), picture, lossy)} with `--value-range`"
    except (OSError, RuntimeError):
        return "refused"


def judged(got: Tensor, picture: Any, lossy: bool) -> str:
    """How far an image is from the picture, in words."""
    expected = torch.from_numpy(np.ascontiguousarray(picture)).double().expand(3, -1, -1)
    if got.shape != expected.shape:
        return "not turned" if got.shape[1:] == expected.shape[:0:-1] else f"of shape {tuple(got.shape)}"
    error = (got - expected).abs().max().item()
    if error < (0.025 if lossy else 1e-3):
        return "right"
    if error < 5e-3:
        return "8 bits of it"
    if (1 - got - expected).abs().max().item() < 0.01:
        return "inverted"
    if got.max() < 1 / 8:
        return "black"
    return "clipped" if (got == got.max()).double().mean() > 0.5 else "wrong"


def table() -> str:
    rows = [["file", *READERS], ["---"] * (1 + len(READERS))]
    rows += [[name, *(outcome(reader, name) for reader in READERS)] for name in FILES]
    made = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__.partition('+')[0]}."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{made}\n"


def written() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
