"""From the bytes of an image file, or what a Dataset gives, to pixels."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from barlow_recipes.errors import require
from barlow_recipes.pixels import USUAL, PixelSettings

NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes
OF_DAMAGE = OSError, EOFError, SyntaxError, ValueError, struct.error, IndexError, KeyError, TypeError
SAMPLE_FORMAT, UNSIGNED, SIGNED = 339, 1, 2  # a tag of TIFF, and two of its values
SIXTEEN_BITS = 65535  # what is white where an integer has more than eight bits


class UnfitError(OSError):
    """A whole image that the flags of :class:`PixelSettings` do not describe; the message names the flag."""


def decode(content: Any, name: str, pixels: PixelSettings = USUAL) -> Tensor:
    """Decode an image to (C, H, W): uint8 where the file has 8 bits and no range is declared, else float32 in [0, 1].

    ``content`` is a file's (whatever Pillow reads, .npy, TIFF of any bands), a Pillow image, an array or a Tensor.
    EXIF orientation is applied. Unless there are 4 channels, transparency is dropped, as torchvision's folders do.

    Raises:
        OSError: it is not a whole image; the message has its ``name``.
        UnfitError: it has other channels or values than declared; nothing is clipped.
    """
    image = raw(content, name, pixels)
    if image.dtype == torch.uint8 and pixels.value_range in (None, (0, 255)):
        return image
    low, high = pixels.value_range or (0.0, white(image.dtype))
    values = image.float()
    least, most = (value.item() for value in values.aminmax())
    if least != least:
        raise UnfitError(f"{name}: has pixels that are not a number: give them a value within the range")
    if not (low <= least and most <= high):
        raise UnfitError(
            f"{name}: values from {least:g} to {most:g}, expected {low:g} to {high:g}: give --value-range LOW HIGH"
        )
    return (values - low) / (high - low)


def white(kind: torch.dtype) -> float:
    """The value that is 1 where no range is declared."""
    return 255.0 if kind == torch.uint8 else 1.0 if kind.is_floating_point or kind == torch.bool else SIXTEEN_BITS


def raw(content: Any, name: str, pixels: PixelSettings) -> Tensor:
    """The same with the values as they are, in any type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            opened = _opened(content, name, pixels) if isinstance(content, bytes) else content
            if isinstance(opened, Image.Image):
                opened = _of_pillow(opened, name, pixels.channels)
    except UnfitError:
        raise
    except (*OF_DAMAGE, Image.DecompressionBombError) as error:
        raise OSError(f"{name} is not a readable image: {error}") from None
    return _planes(opened, name, pixels.channels)


def _opened(content: bytes, name: str, pixels: PixelSettings) -> Any:
    """By Pillow where it can: it cuts 16 bits in several channels to 8, and knows no other number than 1 to 4."""
    if content.startswith(NPY):
        return np.load(io.BytesIO(content), allow_pickle=False)
    tiff = content.startswith(TIFF)
    try:
        image = Image.open(io.BytesIO(content))
        deep = image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)
        if not tiff and deep and pixels.value_range:
            raise UnfitError(
                f"{name}: of its 16 bits Pillow reads 8, too few for --value-range: save it as TIFF or .npy"
            )
        many = getattr(image, "n_frames", 1) > 1 or pixels.channels > len("RGBA")
        if not tiff or not (deep or many or _has_wrong_signs(image)):
            return image
    except UnidentifiedImageError:
        if not tiff:
            raise ValueError("in no format that is known") from None
    return require("tifffile", f"{name}, a TIFF that Pillow cannot read,").imread(io.BytesIO(content))


def _has_wrong_signs(tiff: Any) -> bool:
    """Pillow 13 takes int8 for uint8 and uint32 for int32: findings/pillow_reads_signed_tiff_bytes_as_unsigned.sh."""
    return (tiff.mode, *tiff.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[:1]) in (("L", SIGNED), ("I", UNSIGNED))


def _of_pillow(image: Image.Image, name: str, channels: int) -> Any:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # one plane of more than 8 bits
        return np.asarray(image)
    if channels not in (1, 3) and len(image.getbands()) != channels:
        raise UnfitError(f"{name}: {len(image.getbands())} channels, but --channels is {channels}")
    values = np.array(image.convert({1: "L", 3: "RGB"}.get(channels, image.mode)))
    return torch.from_numpy(values).view(image.height, image.width, channels).permute(2, 0, 1)


def _planes(values: Any, name: str, channels: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) to (C, H, W); one plane serves as three."""
    if last_first := not isinstance(values, Tensor):  # where both could be the channels
        try:
            values = torch.from_numpy(np.array(values, np.asarray(values).dtype.newbyteorder("=")))
        except TypeError as error:
            raise UnfitError(f"{name}: expected an array of numbers ({error})") from None
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.numel():
        raise UnfitError(f"{name}: expected an image of (H, W), (H, W, C) or (C, H, W), got {tuple(values.shape)}")
    wanted = (channels, 1) if channels == 3 else (channels,)
    first, _, last = values.shape
    if last in wanted and (last_first or first not in wanted):
        values = values.permute(2, 0, 1)
    elif first not in wanted:
        raise UnfitError(f"{name}: {min(first, last)} channels, but --channels is {channels}")
    return values.expand(channels, -1, -1)
