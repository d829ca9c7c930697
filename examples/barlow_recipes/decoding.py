"""From the bytes of an image file to its pixels."""

import io
import struct
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from barlow_recipes.errors import require

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(content: bytes, name: str) -> Tensor:
    """Decode an image file to (3, H, W) uint8, with Pillow: torchvision's own decoders are deprecated.

    Raises:
        OSError: it is not a whole image; the message has its ``name``.
    """
    pillow: Any = require("PIL.Image", "--data")
    to_tensor: Any = require("torchvision.transforms.v2.functional", "--data").pil_to_tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            with pillow.open(io.BytesIO(content)) as image:
                return to_tensor(_eight_bits(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, pillow.DecompressionBombError) as error:
        raise OSError(f"{name} is not a readable image: {error}") from None


def _eight_bits(image: "Image") -> "Image":
    """Pillow clips 16 bits where it should divide."""
    return image.point(lambda value: value / 257).convert("L") if image.mode.startswith("I") else image
