"""From the bytes of an image file, or what a Dataset gives, to pixels."""

import io
import struct
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_recipes.errors import require
from barlow_recipes.pixels import USUAL, PixelSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes
SIXTEEN_BITS = 65535  # what is white where an integer has more than eight bits


class UnfitError(OSError):
    """A whole image that the flags of :class:`PixelSettings` do not describe; the message names the flag."""


def decode(content: Any, name: str, pixels: PixelSettings = USUAL) -> Tensor:
    """Decode an image to (C, H, W): uint8 where the file has 8 bits and no range is declared, else float32 in [0, 1].

    Args:
        content: of a file (whatever Pillow reads, .npy, TIFF of any bands), a Pillow image, an array or a Tensor.
            EXIF orientation is applied. Transparency is dropped, as torchvision's folders do, unless there are 4
            channels; so the colour that a transparent pixel hides is seen.
        name: for messages.
        pixels: how many channels, and what their values mean.

    Raises:
        OSError: it is not a whole image; the message has its ``name``.
        UnfitError: it has other channels or values than declared; nothing is clipped.
    """
    return _scaled(raw(content, name, pixels), name, pixels)


def raw(content: Any, name: str, pixels: PixelSettings) -> Tensor:
    """The same with the values as they are, in any type."""
    pillow: Any = require("PIL.Image", "--data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            opened = _opened(content, name, pixels, pillow) if isinstance(content, bytes) else content
            if isinstance(opened, pillow.Image):
                opened = _of_pillow(opened, name, pixels.channels)
    except UnfitError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, pillow.DecompressionBombError) as error:
        raise OSError(f"{name} is not a readable image: {error}") from None
    return _planes(opened, name, pixels.channels)


def _opened(content: bytes, name: str, pixels: PixelSettings, pillow: Any) -> "Image | NDArray[Any]":
    """By Pillow where it can: it cuts 16 bits in several channels to 8, and knows no other number than 1 to 4."""
    if content.startswith(NPY):
        return require("numpy", "--data").load(io.BytesIO(content), allow_pickle=False)
    tiff = content.startswith(TIFF)
    try:
        image: Image = pillow.open(io.BytesIO(content))
        deep = image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)
        if not tiff and deep and pixels.value_range:
            raise UnfitError(
                f"{name}: of its 16 bits Pillow reads 8, too few for --value-range: save it as TIFF or .npy"
            )
        pages = getattr(image, "n_frames", 1)
        if not (tiff and (deep or pages > 1 or pixels.channels > len("RGBA"))):
            return image
    except pillow.UnidentifiedImageError:
        if not tiff:
            raise ValueError("in no format that is known") from None
    try:
        return require("tifffile", f"{name}, a TIFF that Pillow cannot read,").imread(io.BytesIO(content))
    except (IndexError, KeyError, TypeError) as error:  # of a damaged file
        raise ValueError(f"TIFF, {error}") from None


def _of_pillow(image: "Image", name: str, channels: int) -> "Tensor | NDArray[Any]":
    require("PIL.ImageOps", "--data").exif_transpose(image, in_place=True)
    bands = len(image.getbands())
    if image.mode.startswith(("I", "F")):  # one plane of more than 8 bits
        return require("numpy", "--data").asarray(image)
    if channels not in (1, 3) and bands != channels:
        raise _other_channels(name, bands, channels)
    to_tensor: Any = require("torchvision.transforms.v2.functional", "--data").pil_to_tensor
    planes: Tensor = to_tensor(image.convert({1: "L", 3: "RGB"}.get(channels, image.mode)))
    return planes


def _planes(values: "Tensor | NDArray[Any]", name: str, channels: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) to (C, H, W); one plane serves as three."""
    last_first = not isinstance(values, Tensor)  # if both could be the channels
    if not isinstance(values, Tensor):
        numpy = require("numpy", "--data")
        try:
            values = torch.from_numpy(numpy.array(values, numpy.asarray(values).dtype.newbyteorder("=")))
        except TypeError as error:
            raise UnfitError(f"{name}: expected an array of numbers ({error})") from None
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.numel():
        raise UnfitError(f"{name}: expected an image of (H, W), (H, W, C) or (C, H, W), got {tuple(values.shape)}")
    wanted = (channels, 1) if channels == 3 else (channels,)
    first, last = values.shape[0], values.shape[2]
    if last in wanted and (last_first or first not in wanted) and values.shape[1] != 1:
        values = values.permute(2, 0, 1)
    elif first not in wanted:
        raise _other_channels(name, min(first, last), channels)
    return values.expand(channels, -1, -1)


def _other_channels(name: str, found: int, wanted: int) -> UnfitError:
    return UnfitError(f"{name}: {found} channels, but --channels is {wanted}")


def _scaled(image: Tensor, name: str, pixels: PixelSettings) -> Tensor:
    if image.dtype == torch.uint8 and pixels.value_range in (None, (0, 255)):
        return image
    whole = not image.is_floating_point() and image.dtype != torch.bool
    low, high = pixels.value_range or (0.0, SIXTEEN_BITS if whole else 1.0)
    values = image.float()
    least, most = (value.item() for value in values.aminmax())
    if least != least:
        raise UnfitError(f"{name}: has pixels that are not a number: give them a value within the range")
    if not (low <= least and most <= high):
        raise UnfitError(
            f"{name}: values from {least:g} to {most:g}, expected {low:g} to {high:g}: give --value-range LOW HIGH"
        )
    return (values - low) / (high - low)
