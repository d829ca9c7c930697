"""From the bytes of an image file, or what a Dataset gives, to pixels, and how an encoder is to see them."""

import io
import logging
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from barlow_recipes.command_line import Positive
from barlow_recipes.errors import UsageError, require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes
OF_DAMAGE = (
    OSError, EOFError, SyntaxError, ValueError, struct.error, IndexError, KeyError, TypeError,
    NotImplementedError,  # of tifffile without imagecodecs
)  # fmt: skip
SAMPLE_FORMAT, UNSIGNED, SIGNED = 339, 1, 2  # a tag of TIFF, and two of its values
PHOTOMETRIC, WHITE_IS_ZERO, SEPARATED = 262, 0, 5  # likewise; SEPARATED is CMYK
BITS = 258  # likewise, of each sample
JPEG_2000 = b"\xff\x4f\xff\x51"  # the markers before its header: 40 bytes from there, the number of its samples
SIXTEEN_BITS = 65535  # what is white in uint16


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """Flags of every program that reads images."""

    # of an image; files with another number are converted where that is usual (grey, palette, CMYK), else refused
    channels: Positive = 3
    # the values that become 0 and 1; without it those of the files' type: 0 and 255, 65535, or 1 of floats. Signed
    # integers and those of 32 bits have none
    value_range: tuple[float, float] | None = None
    # of each channel, to be subtracted; without it ImageNet's, or 0.5 for other than three channels
    mean: tuple[float, ...] = ()
    # of each channel, to divide by; without it ImageNet's, or 0.25 for other than three channels
    std: tuple[float, ...] = ()

    def normalized(self, images: Tensor) -> Tensor:
        """By mean and deviation of each channel, in place: (..., C, H, W) float32 in [0, 1]."""
        for channel, mean, std in zip(images.unbind(-3), *self.statistics(), strict=True):
            channel.sub_(mean).div_(std)
        return images

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        usual = (MEAN, STD) if self.channels == 3 else ((0.5,) * self.channels, (0.25,) * self.channels)
        return self.mean or usual[0], self.std or usual[1]

    def check_pixels(self) -> None:
        for flag, values in zip(("--mean", "--std"), self.statistics(), strict=True):
            if len(values) != self.channels:
                raise UsageError(f"{flag}: expected {self.channels} numbers, as many as --channels, got {len(values)}")
        if self.std and min(self.std) <= 0:
            raise UsageError(f"--std: expected numbers above 0, got {min(self.std):g}")
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise UsageError("--value-range {:g} {:g}: expected the lower value first".format(*self.value_range))


USUAL = PixelSettings()
normalized = USUAL.normalized


def as_float(images: Tensor) -> Tensor:
    """A float32 copy in [0, 1] of uint8, or of what is in [0, 1]."""
    copy = torch.empty(images.shape, device=images.device).copy_(images)  # planes, however the pixels lie in memory
    return copy.div_(255) if images.dtype == torch.uint8 else copy


class UnfitError(OSError):
    """A whole image that the flags of :class:`PixelSettings` do not describe; the message names the flag."""


def decode(content: Any, name: str, pixels: PixelSettings = USUAL) -> Tensor:
    """Decode an image to (C, H, W): uint8 where the file has 8 bits and no range is declared, else float32 in [0, 1].

    OSError where it is not a whole image; nothing is clipped: UnfitError.
    """
    image = raw(content, name, pixels)
    if image.dtype == torch.uint8 and pixels.value_range in (None, (0, 255)):
        return image
    values = image.float()
    least, most = (value.item() for value in values.aminmax())
    found = f"{name}: values from {least:g} to {most:g}"
    low, high = pixels.value_range or (0.0, white(image.dtype))
    if least != least:
        raise UnfitError(f"{name}: has pixels that are not a number: give them a value within the range")
    if high is None:
        kind = str(image.dtype).removeprefix("torch.")
        raise UnfitError(f"{found} of {kind}, a type without a value for white: give --value-range LOW HIGH")
    if not (low <= least and most <= high):
        raise UnfitError(f"{found}, expected {low:g} to {high:g}: give --value-range LOW HIGH")
    return (values - low) / (high - low)


def white(kind: torch.dtype) -> float | None:
    """The value that becomes 1 where no range is declared: none of a type whose largest value is not white."""
    whites: dict[torch.dtype, float] = {torch.uint8: 255, torch.uint16: SIXTEEN_BITS, torch.bool: 1}
    return 1.0 if kind.is_floating_point else whites.get(kind)


def raw(content: Any, name: str, pixels: PixelSettings) -> Tensor:
    """The values as they are: (C, H, W) of the file's type.

    ``content`` is a file's (whatever Pillow reads, .npy, TIFF of any bands), a Pillow image, an array or a Tensor.
    EXIF orientation is applied. Unless there are 4 channels, transparency is dropped, as torchvision's folders do.
    """
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
        if not tiff:
            _check_depth(image, content, name, pixels)
            return image
        bits = image.tag_v2.get(BITS, (1,))
        deep = len(bits) > 1 and max(bits) > 8
        if not (deep or pixels.channels > len("RGBA") or _has_more(image) or _misread(image)):
            return image
    except UnidentifiedImageError:
        if not tiff:
            raise ValueError("in no format that is known") from None
    tifffile = require("tifffile", f"{name}, a TIFF that Pillow cannot read,")
    logging.getLogger("tifffile").setLevel(logging.ERROR)  # or of a set of files a line is printed for each
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        values = _black_is_zero(_own_planes(file), name, page.photometric, page.bitspersample)
    return _without_black(values) if (page.photometric, pixels.channels) == (SEPARATED, 3) else values


def _own_planes(file: Any) -> Any:
    """Of the first image in a TIFF. Those that are in the other files of an OME set tifffile makes black."""
    pages = [*file.series[0].pages]
    if None not in pages:
        return file.asarray()
    planes = [page.asarray() for page in pages if page is not None]
    return np.stack(planes) if len(planes) > 1 else planes[0]


def _check_depth(image: Any, content: bytes, name: str, pixels: PixelSettings) -> None:
    """UnfitError: of more than 8 bits of colour Pillow 13 reads 8, where a range wants all; or it reads others."""
    remedy = "save it as TIFF or .npy"
    start = content.find(JPEG_2000) if image.format == "JPEG2000" else -1
    if start >= 0:  # of each sample a byte: whether it is signed, and its bits less one
        samples = int.from_bytes(content[start + 40 : start + 42], "big")
        depths = content[start + 42 : start + 42 + 3 * samples : 3]
        if max(depths) > 127:
            raise UnfitError(f"{name}: JPEG 2000 with a sign, which Pillow drops: {remedy}")
        if samples > 1 and max(depths) >= 8:
            raise UnfitError(
                f"{name}: JPEG 2000 of more than 8 bits of colour, of which Pillow makes white black: {remedy}"
            )
    if image.mode.startswith(("I", "F")) or not pixels.value_range:
        return
    deep = ";16" in str([tile.args for tile in image.tile])
    if image.format == "PPM" and isinstance(scaled := image.tile[0].args, tuple):
        deep = scaled[1] > 255
    if deep or (image.format == "AVIF" and pixels.value_range[1] > 255):  # it does not tell how many bits there are
        raise UnfitError(f"{name}: of its 16 bits Pillow reads 8, too few for --value-range: {remedy}")


def _has_more(image: Any) -> bool:
    """Whether a TIFF has more pages; Pillow 13 raises where one is of a kind that it does not know, as a mask is."""
    try:
        return bool(image.n_frames > 1)
    except OF_DAMAGE:
        return True


def _without_black(values: Any) -> Any:
    """CMYK to RGB as Pillow does it, in as many bits as there are."""
    planes = np.moveaxis(values, -1, 0) if values.shape[-1] == len("CMYK") else values
    if values.ndim != 3 or values.dtype.kind != "u" or len(planes) != len("CMYK"):
        return values
    most = float(np.iinfo(values.dtype).max)
    return np.rint((most - planes[:3]) * (most - planes[3]) / most).astype(values.dtype)


def _misread(image: Any) -> bool:
    """Whether Pillow 13 takes the numbers of a TIFF for others: see findings/pillow_reads_*.

    It takes int8 for uint8, uint32 for int32, and of what is compressed it does not swap the bytes.
    """
    sign = image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    swapped = image.tag_v2.prefix == b"MM" and image.mode in ("I", "F") and image.info.get("compression") != "raw"
    return swapped or (image.mode, sign) in (("L", SIGNED), ("I", UNSIGNED))


def _black_is_zero(values: Any, name: str, photometric: int | None, bits: int) -> Any:
    """The values of a TIFF, inverted in their bits if it says that white is zero: Pillow does so with 8 bits alone."""
    if photometric != WHITE_IS_ZERO:
        return values
    if values.dtype.kind == "f":
        raise UnfitError(f"{name}: white is zero, which floats do not define: save it as black is zero (photometric 1)")
    packed = values.dtype.kind == "u" and bits < 8 * values.dtype.itemsize  # 12 in 16, say
    return 2**bits - 1 - values if packed else ~values


def _of_pillow(image: Image.Image, name: str, channels: int) -> Any:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # one plane of more than 8 bits
        values = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # 32 bits for their 16
            values = values.astype("u2")
        tags = getattr(image, "tag_v2", {})
        return _black_is_zero(values, name, tags.get(PHOTOMETRIC), tags.get(BITS, (8 * values.itemsize,))[0])
    if channels not in (1, 3) and len(image.getbands()) != channels:
        raise UnfitError(f"{name}: {len(image.getbands())} channels, but --channels is {channels}")
    mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
    values = np.array(image if image.mode == mode else image.convert(mode))  # convert copies in any case
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
