"""Batches, splits, digits and image folders: deterministic, complete, and unmoved by a broken file."""

import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from outcomes import EXAMPLES
from PIL import Image, UnidentifiedImageError, features
from sources import fill, jpeg_2000, load, masked_tiff, npy, ome_set, packed_tiff, png_16, same, saved, tiff
from torch import Tensor
from torch.utils.data import Dataset

from barlow_recipes.data import EpochBatches, hold_out, seed_of
from barlow_recipes.digits import augment_digits, crop, load_digits
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.files import index_folder
from barlow_recipes.images import Augmented, Loader
from barlow_recipes.pixels import PixelSettings, UnfitError, _black_is_zero, decode
from barlow_recipes.program import exit_status
from programs import Nursery

MORE = (None, None, None, 5, 5)  # sides of views of digits


def test_a_seed_is_a_function_of_every_number_and_of_their_order() -> None:
    seeds = {seed_of(*numbers) for numbers in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**62, 7)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == 6520558355739401531  # on every platform and in every version


def test_an_epoch_visits_every_image_once_and_drops_the_incomplete_batch() -> None:
    order = EpochBatches(images=23, batch_size=5, seed=0)
    batches = list(order)
    assert len(batches) == len(order) == 4
    keys = {key for batch in batches for key in batch}
    assert len(keys) == 20
    assert keys <= {(0, index) for index in range(23)}

    def indices(seed: int, epoch: int, first_step: int = 0) -> list[list[int]]:
        order = EpochBatches(100, 10, seed)
        order.epoch, order.first_step = epoch, first_step
        return [[index for _, index in batch] for batch in order]

    assert indices(0, 1) == indices(0, 1)
    assert indices(0, 1) != indices(0, 2) != indices(1, 2)
    assert indices(0, 1, first_step=7) == indices(0, 1)[7:]


def test_hold_out_takes_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [2] * 30 + [1] * 9)
    chosen = hold_out(labels, 1 / 10, seed=3)
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [5, 0, 3]
    assert torch.bincount(labels[hold_out(labels, 1 / 10, seed=3, at_most=4)], minlength=3).tolist() == [4, 0, 3]
    assert torch.equal(chosen, hold_out(labels, 1 / 10, seed=3))
    assert not torch.equal(chosen, hold_out(labels, 1 / 10, seed=4))


def test_no_digit_is_in_two_parts() -> None:
    data = load_digits(batch_size=256, seed=0, monitor=True)

    def images(batches: object) -> list[bytes]:
        return [image.numpy().tobytes() for images, _ in batches for image in images]  # type: ignore[attr-defined]

    assert data.monitor
    assert data.final
    pretrained, watched = images(data.monitor.bank), images(data.monitor.queries)
    train, test = images(data.final.bank), images(data.final.queries)
    assert (len(pretrained), len(watched), len(test)) == (1302, 140, 355)
    assert len(train) + len(test) == 1797
    assert not set(pretrained) & set(watched)
    assert set(pretrained) | set(watched) == set(train)
    assert not set(train) & set(test)
    assert data.images == len(pretrained) == data.pairs.order.images  # type: ignore[attr-defined]


def test_digits_resume_in_the_middle_of_an_epoch_bit_for_bit() -> None:
    pairs = load_digits(batch_size=200, seed=5, monitor=False).pairs
    whole, rest = list(pairs.batches(3)), list(pairs.batches(3, first_step=4))
    assert len(whole) == len(pairs)
    assert same(whole[4:], rest)
    assert not torch.equal(*whole[0].views)


def test_the_first_two_of_more_views_of_digits_are_those_of_two() -> None:
    two, more = (next(load_digits(9, 0, False, sides=sides).pairs.batches(1)).views for sides in ((None,) * 2, MORE))
    assert same(two, more[:2])
    assert [tuple(view.shape) for view in more] == [(9, 1, 8, 8)] * 3 + [(9, 1, 5, 5)] * 2
    assert not torch.equal(*more[3:])


def test_a_local_crop_is_any_window() -> None:
    images = torch.arange(400 * 64.0).view(400, 1, 8, 8)
    windows = crop(images, 5, torch.Generator().manual_seed(0))
    corners = windows[:, 0, 0, 0].long() - 64 * torch.arange(400)
    assert set(corners.tolist()) == {8 * row + column for row in range(4) for column in range(4)}
    for image, window, corner in zip(images, windows, corners.tolist(), strict=True):
        row, column = divmod(corner, 8)
        assert torch.equal(window, image[:, row : row + 5, column : column + 5])


def test_every_digit_is_moved_in_its_own_way_and_stays_in_sight() -> None:
    ring = torch.zeros(500, 1, 8, 8)
    ring[:, :, 2:6, 2:6] = 1
    state = torch.get_rng_state()
    views, again = (augment_digits(ring, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(views, again)
    assert views.shape == ring.shape
    assert len({view.numpy().tobytes() for view in views}) == 500
    ink = views.clamp(0, 1).sum(dim=(1, 2, 3))
    assert (ink > 5).all()  # of 16
    assert views.mean(0)[0, 3:5, 3:5].min() > 0.7  # centred on average


FORMATS = [
    "RGB JPEG",
    "L JPEG",
    "CMYK JPEG",
    "RGB PNG",
    "RGBA PNG",
    "P PNG",
    "LA PNG",
    "RGB WEBP",
    "RGB TIFF",
    "RGB BMP",
]


@pytest.mark.parametrize("kind", FORMATS)
def test_any_usual_format_becomes_three_channels_of_eight_bits(kind: str) -> None:
    mode, file_format = kind.split()
    grey = torch.linspace(0, 255, 1200).view(30, 40)
    content = saved(Image.fromarray(grey.to(torch.uint8).numpy()).convert(mode), file_format)
    for channels in (3, 1):
        decoded = decode(content, "image", PixelSettings(channels=channels))
        assert (decoded.shape, decoded.dtype) == ((channels, 30, 40), torch.uint8)
        assert (decoded - grey).abs().mean() < 4


RAMP = np.linspace(0, 1, 320).reshape(16, 20)
BANDS = np.stack([RAMP * (band + 1) / 13 for band in range(13)])  # (C, H, W)
COLORS = (65535 * BANDS[:3]).astype("u2").transpose(1, 2, 0).copy()
FOUR = (65535 * BANDS[:4]).astype("u2").transpose(1, 2, 0).copy()
FROM_CMYK = ((1 - FOUR[..., :3] / 65535) * (1 - FOUR[..., 3:] / 65535)).transpose(2, 0, 1)
DEEP: dict[str, tuple[bytes, Any, dict[str, Any]]] = {
    "uint16": (tiff((65535 * RAMP).astype("<u2")), RAMP, {}),
    "uint16, big-endian": (tiff((65535 * RAMP).astype(">u2"), byteorder=">"), RAMP, {}),
    "int16, big-endian, compressed": (
        tiff((2000 * RAMP - 1000).astype(">i2"), byteorder=">", compression="deflate"),
        RAMP,
        {"value_range": (-1000, 1000)},
    ),
    "float32, big-endian, compressed": (tiff(RAMP.astype(">f4"), byteorder=">", compression="deflate"), RAMP, {}),
    "int16, white is zero": (
        tiff((-2000 * RAMP + 999).astype("i2"), photometric="miniswhite"),
        RAMP,
        {"value_range": (-1000, 1000)},
    ),
    "pages, white is zero": (
        tiff((65535 - 65535 * BANDS).astype("u2"), photometric="miniswhite"),
        BANDS,
        {"channels": 13},
    ),
    "12 bits in 16": (tiff((4095 * RAMP).astype("u2")), RAMP, {"value_range": (0, 4095)}),
    "int16, negative": (tiff((2000 * RAMP - 1000).astype("i2")), RAMP, {"value_range": (-1000, 1000)}),
    "int8, negative": (tiff((200 * RAMP - 100).astype("i1")), RAMP, {"value_range": (-100, 100)}),
    "uint32, large": (tiff((4e9 * RAMP).astype("u4")), RAMP, {"value_range": (0, 4e9)}),
    "float32": (tiff(RAMP.astype("f4")), RAMP, {}),
    "float64": (tiff(RAMP), RAMP, {}),
    "float32, of temperatures": (tiff((40 * RAMP + 270).astype("f4")), RAMP, {"value_range": (270, 310)}),
    "uint16 in colours": (tiff(COLORS, photometric="rgb"), BANDS[:3], {}),
    "uint16 in colours, in planes": (
        tiff(COLORS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        BANDS[:3],
        {},
    ),
    "uint16 in colours, in planes, with alpha": (
        tiff(FOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]),
        FOUR.transpose(2, 0, 1) / 65535,
        {"channels": 4},
    ),
    "CMYK of 16 bits": (tiff(FOUR, photometric="separated"), FROM_CMYK, {}),
    "CMYK of 16 bits in planes, with a range": (
        tiff(FOUR.transpose(2, 0, 1), photometric="separated", planarconfig="separate"),
        FROM_CMYK,
        {"value_range": (0, 65535)},
    ),
    "CMYK of 16 bits as it is": (
        tiff(FOUR, photometric="separated"),
        FOUR.transpose(2, 0, 1) / 65535,
        {"channels": 4, "value_range": (0, 65535)},
    ),
    "packed 12 bits": (packed_tiff((4095 * RAMP).astype("u2"), 1), RAMP, {"value_range": (0, 4095)}),
    "uint16 beside a mask": (masked_tiff((65535 * RAMP).astype("u2")), RAMP, {}),
    "colours beside a mask": (masked_tiff(COLORS, photometric="rgb"), BANDS[:3], {}),
    "bands in planes": (tiff((65535 * BANDS).astype("u2"), planarconfig="separate"), BANDS, {"channels": 13}),
    "pages": (tiff((65535 * BANDS).astype("u2")), BANDS, {"channels": 13}),
    "(C, H, W)": (npy((4095 * BANDS).astype("u2")), BANDS, {"channels": 13, "value_range": (0, 4095)}),
    "(H, W, C), big-endian": (npy((65535 * BANDS).astype(">u2").transpose(1, 2, 0)), BANDS, {"channels": 13}),
    "two channels of floats": (npy(BANDS[:2].astype("f2")), BANDS[:2], {"channels": 2}),
    "grey .npy": (npy(RAMP), RAMP, {"channels": 1}),
    "8 bits of another range": (npy((100 * RAMP).astype("u1")), RAMP, {"value_range": (0, 100)}),
}


@pytest.mark.parametrize(("content", "expected", "flags"), DEEP.values(), ids=DEEP)
def test_values_mean_what_is_declared(content: bytes, expected: Any, flags: dict[str, Any]) -> None:
    decoded = decode(content, "image", PixelSettings(**flags))
    assert decoded.dtype == torch.float32
    wanted = torch.from_numpy(np.array(expected)).float()
    torch.testing.assert_close(decoded, wanted.expand(flags.get("channels", 3), 16, 20), rtol=0, atol=0.011)


GREY = (65535 * RAMP).astype("u2")
SIXTEEN: dict[str, Any] = {
    f"TIFF, {order}, {photometric}, {compression}": tiff(
        (GREY if photometric == "minisblack" else ~GREY).astype(f"{order}u2"),
        photometric=photometric,
        byteorder=order,
        compression=compression,
    )
    for order in "<>"
    for photometric in ("minisblack", "miniswhite")
    for compression in (None, "deflate")
}
SIXTEEN |= {kind: saved(Image.fromarray(GREY), kind) for kind in ("PNG", "PPM", "TIFF")}
SIXTEEN |= {
    f"Pillow's {mode}": Image.frombytes(mode, (20, 16), GREY.astype(order).tobytes())
    for mode, order in {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}.items()
}
SIXTEEN |= {
    "numpy's": GREY.astype(">u2"),
    "torchvision's": torchvision.io.decode_image(
        torch.frombuffer(bytearray(SIXTEEN["PNG"]), dtype=torch.uint8), "UNCHANGED"
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("content", SIXTEEN.values(), ids=SIXTEEN)
def test_sixteen_bits_of_grey_are_the_same_from_everywhere(content: Any, channels: int) -> None:
    """From the bytes of a file, and opened by a Dataset."""
    pixels = PixelSettings(channels=channels)
    given = [content]
    if isinstance(content, bytes):
        with suppress(UnidentifiedImageError):  # white is zero, big-endian
            given.append(Image.open(io.BytesIO(content)))
    wanted = torch.from_numpy(GREY / np.float32(65535)).expand(channels, 16, 20)
    for each in given:
        torch.testing.assert_close(decode(each, "image", pixels), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("order", "<>")
def test_white_is_zero_with_eight_bits_as_with_sixteen(order: str) -> None:
    """Pillow inverts the former by itself."""
    values = np.arange(256, dtype="u1").reshape(16, 16)
    images = [
        tiff(each.astype(each.dtype.newbyteorder(order)), photometric="miniswhite", byteorder=order)
        for each in (values, values.astype("u2") * 257)
    ]
    eight, sixteen = (decode(content, "image").double() for content in images)
    torch.testing.assert_close(eight / 255, sixteen, rtol=0, atol=1e-7)
    assert eight[0, 0, 0] == 255


RGB = saved(Image.new("RGB", (8, 6)))
UNFIT: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "negative": (tiff((RAMP * 9 - 5).astype("i2")), {}, "values from -5 to 4 of int32, .* white: give --value-range"),
    "beyond what is declared": (
        tiff((RAMP * 9 - 5).astype("i2")),
        {"value_range": (0, 9)},
        "-5 to 4, expected 0 to 9:",
    ),
    "above": (tiff((RAMP * 300).astype("f4")), {}, "values from 0 to 300, expected 0 to 1: give --value-range"),
    "not a number": (tiff(np.where(RAMP > 0.5, np.nan, RAMP).astype("f4")), {}, "has pixels that are not a number"),
    "beyond what was declared": (npy(RAMP * 5000), {"value_range": (0, 4095)}, "values from 0 to 5000"),
    "many bands": (npy(BANDS), {}, "13 channels, but --channels is 3"),
    "too few": (RGB, {"channels": 13}, "3 channels, but --channels is 13"),
    "no alpha": (RGB, {"channels": 4}, "3 channels, but --channels is 4"),
    "one dimension": (npy(RAMP[0]), {}, r"expected an image of .* got \(20,\)"),
    "words": (npy(np.array([["a", "b"]])), {}, "expected an array of numbers"),
    "white is zero, of floats": (
        tiff(RAMP.astype("f4"), photometric="miniswhite"),
        {},
        r"white is zero.*photometric 1",
    ),
    "white is zero, of doubles": (tiff(RAMP, photometric="miniswhite"), {}, "white is zero"),
    "what Pillow cuts off": (png_16(), {"value_range": (0, 4095)}, "TIFF or .npy"),
    "and in PPM": (b"P6 2 1 65535\n" + bytes(12), {"value_range": (0, 4095)}, "TIFF or .npy"),
    "what it makes black": (jpeg_2000(), {}, "white black.*TIFF or .npy"),
    "what it takes for unsigned": (jpeg_2000().replace(b"\x0f\x01\x01", b"\x8f\x01\x01"), {}, "a sign.*TIFF or .npy"),
}


WITHOUT_WHITE = {"int8": 100, "int16": 4095, "int32": 65535, "uint32": 65535, "int64": 255}


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize(("kind", "most"), WITHOUT_WHITE.items())
def test_a_type_without_a_white_wants_a_range(kind: str, most: int, channels: int) -> None:
    """Its values may look like 8 or 16 bits: they would be scaled by a guess."""
    values = (most * BANDS[:channels]).astype(kind)
    grey = values[0] if channels == 1 else values
    given: list[Any] = [npy(grey), torch.from_numpy(grey), grey]
    if kind != "int64":  # photometric is that of grey pages
        given += [tiff(grey, byteorder=order) for order in "<>"]
    if (kind, channels) == ("int32", 1):
        given.append(Image.fromarray(grey))
    pixels, names = PixelSettings(channels=channels), "(int16|int32)" if kind == "int16" else kind  # Pillow widens it
    for content in given:
        with pytest.raises(
            UnfitError, match=rf"image: values from 0 to \d+ of {names}, .*: give --value-range LOW HIGH"
        ):
            decode(content, "image", pixels)
        decoded = decode(content, "image", replace(pixels, value_range=(0, most)))
        torch.testing.assert_close(decoded.double(), torch.from_numpy(values / most), rtol=0, atol=1e-6)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_what_an_avif_has_beyond_eight_bits_is_asked_for_in_vain() -> None:
    """Pillow reads 8 bits of each, and does not tell how many there were."""
    content = saved(Image.new("RGB", (8, 6)), "AVIF")
    for most in (1023, 4095):
        with pytest.raises(UnfitError, match=r"of its 16 bits Pillow reads 8, .*: save it as TIFF or \.npy"):
            decode(content, "image", PixelSettings(value_range=(0, most)))
    assert decode(content, "image").dtype == torch.uint8
    assert decode(content, "image", PixelSettings(value_range=(0, 100))).max() < 0.05


def test_white_is_zero_in_the_bits_that_there_are() -> None:
    """Of 12 bits white is 4,095 below black, not 65,535. tifffile asks for imagecodecs to unpack them."""
    values = (4095 * RAMP).astype("u2")
    assert (_black_is_zero(4095 - values, "image", 0, 12) == values).all()
    content, pixels = packed_tiff(4095 - values, 0), PixelSettings(channels=1, value_range=(0, 4095))
    if find_spec("imagecodecs"):
        torch.testing.assert_close(decode(content, "image", pixels)[0], torch.from_numpy(values / 4095).float())
    else:
        with pytest.raises(OSError, match=r"image is not a readable image: .*imagecodecs"):
            decode(content, "image", pixels)


def test_a_mask_beside_an_image_of_eight_bits_is_left_alone() -> None:
    values = (255 * RAMP).astype("u1")
    decoded = decode(masked_tiff(values), "image", PixelSettings(channels=1))
    assert torch.equal(decoded, torch.from_numpy(values)[None])


@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
@pytest.mark.parametrize("files", [1, 2, 4])
def test_a_file_of_an_ome_set_has_its_own_planes(files: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """tifffile alone gives black for those of the other files."""
    white, own = 255 if kind == "u1" else 65535, 4 // files
    values = (white * BANDS[:4]).astype(kind)
    for content, planes in zip(ome_set(values, files), np.split(values, files), strict=True):
        decoded = decode(content, "image", PixelSettings(channels=own, value_range=(0, white)))
        scale = 255 if decoded.dtype == torch.uint8 else 1
        torch.testing.assert_close(decoded / scale, torch.from_numpy(planes / white).float())
        if files > 1:
            with pytest.raises(UnfitError, match=f"{own} channels, but --channels is 4"):
                decode(content, "image", PixelSettings(channels=4, value_range=(0, white)))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_colour_image_of_an_ome_set_is_one_image(kind: str) -> None:
    values = np.stack([COLORS, COLORS[::-1]]).astype(kind)
    for content, image in zip(ome_set(values, 2), values, strict=True):
        decoded = decode(content, "image") * (1 if kind == "u1" else 65535)
        torch.testing.assert_close(decoded.double(), torch.from_numpy(image.astype("f8")).permute(2, 0, 1))


@pytest.mark.parametrize(("content", "flags", "message"), UNFIT.values(), ids=UNFIT)
def test_nothing_is_clipped_in_silence(content: bytes, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UnfitError, match=message):
        decode(content, "image", PixelSettings(**flags))


def test_orientation_is_applied_and_transparency_dropped() -> None:
    grey = torch.linspace(0, 255, 1200).view(30, 40).to(torch.uint8)
    image = Image.fromarray(grey.numpy())
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    assert torch.equal(decode(saved(image, exif=exif), "image")[0], grey.rot90(-1))
    red = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert decode(red, "image")[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(red, "image", PixelSettings(channels=4))[:, 0, 0].tolist() == [255, 0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mean": (0.5,)}, "--mean: expected 3 numbers"),
        ({"channels": 2, "std": (1.0, 1.0, 1.0)}, "--std: expected 2 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "--std: expected numbers above 0"),
        ({"value_range": (5.0, 5.0)}, "--value-range 5 5"),
    ],
)
def test_flags_of_pixels_are_checked(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PixelSettings(**flags).check_pixels()


BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "cut": saved(Image.effect_noise((32, 32), 50))[:300],
    "zeros": b"\xff\xd8\xff" + bytes(50),
    "cut TIFF": tiff((65535 * BANDS).astype("u2"))[:300],
    "cut .npy": npy(RAMP)[:300],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_oserror(content: bytes) -> None:
    with pytest.raises(OSError, match=r"a\.png is not a readable image"):
        decode(content, "a.png")


def test_a_view_depends_on_seed_epoch_index_and_number_alone(jpegs: Path) -> None:
    def noisy(image: Tensor) -> Tensor:
        return image + torch.rand(image.shape)

    def views(seed: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        return Augmented(catalogue, (noisy, noisy), seed, tolerated=5)[epoch, index][:2]

    catalogue = index_folder(jpegs / "train")
    first = views(0, 2, 3)
    torch.rand(100)  # whatever was drawn before
    assert same(first, views(0, 2, 3))
    assert not torch.equal(*first)
    assert not any(same(first, other) for other in (views(0, 1, 3), views(0, 2, 4), views(1, 2, 3)))


def test_a_catalogue_knows_each_file_and_numbers_a_part_anew(jpegs: Path) -> None:
    root = jpegs / "train"
    catalogue = index_folder(root)
    paths = [*sorted(root.glob("bluebell/*")), *sorted(root.glob("poppy/*"))]
    assert [catalogue.read(index) for index in range(40)] == [(path.read_bytes(), str(path)) for path in paths]
    assert catalogue.labels.tolist() == [0] * 20 + [1] * 20
    part = catalogue.subset(torch.tensor([39, 5]))
    assert len(part) == 2
    assert [part.read(index)[1] for index in range(2)] == [str(paths[39]), str(paths[5])]
    assert part.labels.tolist() == [1, 0]


LOSS: dict[str, Callable[[Path], object]] = {
    "vanished": lambda path: path.unlink(),
    "a folder now": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "cut off": lambda path: os.truncate(path, 40),
}


@pytest.mark.parametrize("damage", LOSS.values(), ids=LOSS)
def test_an_image_that_is_lost_gives_way_to_the_next(damage: Callable[[Path], object], tmp_path: Path) -> None:
    fill(tmp_path / "all", 4)
    dataset = Augmented(index_folder(tmp_path), (torch.clone, torch.clone), seed=0, tolerated=2)
    (before, _, none, _), (following, *_) = dataset[0, 1], dataset[0, 2]
    damage(tmp_path / "all" / "001.png")
    view, _, unreadable, reason = dataset[0, 1]
    assert torch.equal(view, following)
    assert not torch.equal(view, before)
    assert (none, unreadable) == (0, 1)
    assert "001.png" in reason  # and why
    for number in (0, 2, 3):
        (tmp_path / "all" / f"{number:03}.png").unlink()
    assert dataset[0, 1][2] == 3  # more than tolerated, which ends the run


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_the_number_of_workers_changes_nothing(augment_on: str, jpegs: Path) -> None:
    epochs = []
    for workers in (0, 2):
        pairs = load(jpegs, workers=workers, augment_on=augment_on, views=3, local_crops=2, local_size=8).pairs
        list(islice(pairs.batches(0), 1))  # an epoch left early, as for the pictures
        epochs.append(list(pairs.batches(1)) + list(pairs.batches(2, first_step=2)))
    assert same(*epochs)
    assert len({batch.unreadable for batch in epochs[0]}) == 2
    assert [batch.unreadable for batch in epochs[0]] == [batch.unreadable for batch in epochs[1]]


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_the_first_two_of_more_views_are_those_of_two(augment_on: str, jpegs: Path) -> None:
    more = {"views": 3, "local_crops": 2, "local_size": 12}
    two, all_of_them = (load(jpegs, augment_on=augment_on, **flags).pairs.batches(1) for flags in ({}, more))
    for few, many in zip(two, all_of_them, strict=True):
        assert same(few, many.views[:2])
        pixels = [view if isinstance(view, Tensor) else view.pixels for view in many.views]
        assert [view.shape[-1] for view in pixels] == [16, 16, 16, 12, 12]
        assert len({view.numpy().tobytes() for view in pixels}) == 5


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_workers_that_are_spawned_get_the_same(augment_on: str, jpegs: Path) -> None:
    """Python 3.14 starts them so that they have to be sent the dataset."""
    dataset = load(jpegs, augment_on=augment_on).pairs.loader.dataset  # type: ignore[attr-defined]
    assert same(dataset[0, 3][:2], pickle.loads(pickle.dumps(dataset))[0, 3][:2])


def test_a_folder_is_split_into_disjoint_parts(jpegs: Path) -> None:
    data = load(jpegs)
    assert data.final
    bank, queries = (loader.dataset.images for loader in data.final[:2])  # type: ignore[attr-defined]

    def names(catalogue: Any) -> set[str]:
        return {catalogue.read(index)[1] for index in range(len(catalogue))}

    pretraining = names(data.pairs.loader.dataset.images)  # type: ignore[attr-defined]
    assert data.images == len(pretraining) == 36
    assert queries.labels.tolist() == [0, 0, 1, 1]
    assert not pretraining & names(queries)
    assert names(bank) <= pretraining
    assert (data.final.linear, data.final.labels_per_class) == (True, ())
    assert load(jpegs, probe=False).images == 40
    with pytest.raises(UsageError, match="--batch-size 64 is more than the 36 images"):
        load(jpegs, batch_size=64)


@pytest.mark.parametrize("busy", [False, True], ids=["waiting for images", "with something else"])
def test_the_death_of_a_worker_ends_the_run_whatever_it_does(
    busy: bool, jpegs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once: where nobody listened to signals, it would be DataLoader's next look, here after an hour."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 3600.0)
    pairs = load(jpegs, workers=1).pairs
    next(pairs.batches(0))

    def kill() -> None:
        os.kill(pairs.loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]

    def train() -> None:
        threading.Timer(0.1, kill).start()
        for epoch in range(10**6):
            time.sleep(3600 * busy)
            list(pairs.batches(epoch))

    assert exit_status(train) == 1
    assert re.fullmatch("error: a process that reads images has died.*\n", capsys.readouterr().err)


class Disconnected(Dataset[int]):
    """Its storage hangs up."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ConnectionResetError


def test_a_pipe_that_closes_is_the_death_of_a_worker_and_a_storage_that_hangs_up_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConnectionResetError, match="in DataLoader worker process"):
        list(Loader(Disconnected(), patience=60, num_workers=1))
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        closed = Loader(Disconnected(), patience=60)
        monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", Mock(side_effect=error))
        with pytest.raises(Aborted, match="a process that reads images has died"):
            list(closed)


HANGING = f"""
import multiprocessing, os, sys, time
from pathlib import Path
sys.path[:0] = [{str(EXAMPLES)!r}, {str(Path(__file__).parent)!r}]
from barlow_recipes.errors import Aborted
from sources import load
from torch.utils.data import _utils

_utils.MP_STATUS_CHECK_INTERVAL = 3600.0  # torch waits as long for every worker that is alive, Python without end
root = Path(sys.argv[1])
data = load(root, batch_size=2, workers=2, loader_timeout=2)
batches = data.pairs.batches(0)
next(batches)
for path in root.rglob("*.png"):
    path.unlink()
    os.mkfifo(path)
started = time.monotonic()
try:
    list(iter(data.final.bank) if sys.argv[2] == "probe" else batches)
except Aborted as error:
    seconds = time.monotonic() - started
    print(error, seconds, len(multiprocessing.active_children()), sep="\\n", flush=True)
"""


@pytest.mark.parametrize("part", ["training", "probe"])
def test_workers_that_hang_end_the_run_and_the_process(part: str, tmp_path: Path, nursery: Nursery) -> None:
    """As where the storage does not answer: to open a pipe that nobody writes to takes for ever."""
    for name in ("cat", "dog"):
        fill(tmp_path / name, 20)
    with nursery.start(["-c", HANGING, tmp_path, part], tmp_path) as done:
        assert done.wait() == 0, done.errors
    message, waited, alive = done.output.splitlines()
    assert re.fullmatch(r"no image has come from the workers for 2 seconds.*--loader-timeout", message)
    assert 2 <= float(waited) < 60
    assert int(alive) == 0


class Unlucky(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise KeyError(index)


def test_a_loader_that_fails_leaves_the_callers_other_children_alone() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    try:
        with pytest.raises(KeyError):
            list(Loader(Unlucky(), 30, num_workers=1, batch_size=2))
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
