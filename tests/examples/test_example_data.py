"""Batches, splits, digits and image folders: deterministic, complete, and unmoved by a broken file."""

import io
import os
import pickle
import re
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from outcomes import EXAMPLES
from PIL import Image
from torch import Tensor

from barlow_recipes.data import EpochBatches, PretrainingData, hold_out, seed_of
from barlow_recipes.decoding import UnfitError, decode
from barlow_recipes.digits import augment_digits, load_digits
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.files import index_folder
from barlow_recipes.images import TwoViews, load_images
from barlow_recipes.pixels import PixelSettings
from barlow_recipes.views import PAPER, UnfinishedView
from programs import Nursery


def test_a_seed_is_a_function_of_every_number_and_of_their_order() -> None:
    seeds = {seed_of(*numbers) for numbers in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**62, 7)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == 6520558355739401531  # on every platform and in every version


def test_an_epoch_visits_every_image_once_and_drops_the_incomplete_batch() -> None:
    order = EpochBatches(images=23, batch_size=5, seed=0)
    batches = list(order)
    assert len(batches) == len(order) == 4
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == 20
    assert {epoch for epoch, _ in keys} == {0}
    assert {index for _, index in keys} <= set(range(23))


def test_epochs_and_seeds_differ_and_repeat() -> None:
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
    for batch, again in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(view, same) for view, same in zip(batch.views, again.views, strict=True))
    assert not torch.equal(*whole[0].views)


def test_digits_depend_on_the_generator_alone() -> None:
    images = torch.rand(16, 1, 8, 8)
    views = []
    for _ in range(2):
        state = torch.get_rng_state()
        views.append(augment_digits(images, torch.Generator().manual_seed(7)))
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(3)
    assert torch.equal(*views)
    assert not torch.equal(views[0], augment_digits(images, torch.Generator().manual_seed(8)))


def test_every_digit_is_moved_in_its_own_way_and_stays_in_sight() -> None:
    ring = torch.zeros(500, 1, 8, 8)
    ring[:, :, 2:6, 2:6] = 1
    views = augment_digits(ring, torch.Generator().manual_seed(0))
    assert views.shape == ring.shape
    assert len({view.numpy().tobytes() for view in views}) == 500
    ink = views.clamp(0, 1).sum(dim=(1, 2, 3))
    assert (ink > 5).all()  # of 16
    assert views.mean(0)[0, 3:5, 3:5].min() > 0.7  # centred on average


FORMATS: dict[str, tuple[str, str]] = {
    "jpeg": ("RGB", "JPEG"),
    "grey jpeg": ("L", "JPEG"),
    "cmyk jpeg": ("CMYK", "JPEG"),
    "png": ("RGB", "PNG"),
    "png with alpha": ("RGBA", "PNG"),
    "png with a palette": ("P", "PNG"),
    "webp": ("RGB", "WEBP"),
    "tiff": ("RGB", "TIFF"),
    "bmp": ("RGB", "BMP"),
}


@pytest.mark.parametrize(("mode", "file_format"), FORMATS.values(), ids=FORMATS)
def test_any_usual_format_becomes_three_channels_of_eight_bits(mode: str, file_format: str) -> None:
    grey = torch.linspace(0, 255, 1200).view(30, 40)
    file = io.BytesIO()
    Image.fromarray(grey.to(torch.uint8).numpy()).convert(mode).save(file, format=file_format)
    for channels in (3, 1):
        decoded = decode(file.getvalue(), "image", PixelSettings(channels=channels))
        assert (decoded.shape, decoded.dtype) == ((channels, 30, 40), torch.uint8)
        assert (decoded - grey).abs().mean() < 4


def tiff(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack"} | options)
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


RAMP = np.linspace(0, 1, 320).reshape(16, 20)
BANDS = np.stack([RAMP * (band + 1) / 13 for band in range(13)])  # (C, H, W)
COLORS = (65535 * BANDS[:3]).astype("u2").transpose(1, 2, 0).copy()
DEEP: dict[str, tuple[bytes, Any, dict[str, Any]]] = {
    "uint16": (tiff((65535 * RAMP).astype("<u2")), RAMP, {}),
    "uint16, big-endian": (tiff((65535 * RAMP).astype(">u2"), byteorder=">"), RAMP, {}),
    "12 bits in 16": (tiff((4095 * RAMP).astype("u2")), RAMP, {"value_range": (0, 4095)}),
    "int16, negative": (tiff((2000 * RAMP - 1000).astype("i2")), RAMP, {"value_range": (-1000, 1000)}),
    "float32": (tiff(RAMP.astype("f4")), RAMP, {}),
    "float64": (tiff(RAMP), RAMP, {}),
    "float32, of temperatures": (tiff((40 * RAMP + 270).astype("f4")), RAMP, {"value_range": (270, 310)}),
    "uint16 in colours": (tiff(COLORS, photometric="rgb"), BANDS[:3], {}),
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


def png_16() -> bytes:
    """RGB of 16 bits, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + struct.pack(">12H", *[32768] * 12) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def rgb(mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 6)).save(file, format="PNG")
    return file.getvalue()


UNFIT: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "negative": (tiff((RAMP * 9 - 5).astype("i2")), {}, "values from -5 to 4, expected 0 to 65535: give --value-range"),
    "above": (tiff((RAMP * 300).astype("f4")), {}, "values from 0 to 300, expected 0 to 1: give --value-range"),
    "not a number": (tiff(np.where(RAMP > 0.5, np.nan, RAMP).astype("f4")), {}, "has pixels that are not a number"),
    "beyond what was declared": (npy(RAMP * 5000), {"value_range": (0, 4095)}, "values from 0 to 5000"),
    "many bands": (npy(BANDS), {}, "13 channels, but --channels is 3"),
    "too few": (rgb(), {"channels": 13}, "3 channels, but --channels is 13"),
    "no alpha": (rgb(), {"channels": 4}, "3 channels, but --channels is 4"),
    "one dimension": (npy(RAMP[0]), {}, r"expected an image of .* got \(20,\)"),
    "words": (npy(np.array([["a", "b"]])), {}, "expected an array of numbers"),
    "what Pillow cuts off": (png_16(), {"value_range": (0, 4095)}, "TIFF or .npy"),
}


@pytest.mark.parametrize(("content", "flags", "message"), UNFIT.values(), ids=UNFIT)
def test_nothing_is_clipped_in_silence(content: bytes, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UnfitError, match=message):
        decode(content, "image", PixelSettings(**flags))


def test_orientation_is_applied_and_transparency_dropped() -> None:
    grey = torch.linspace(0, 255, 1200).view(30, 40).to(torch.uint8)
    image, file = Image.fromarray(grey.numpy()), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(file, format="PNG", exif=exif)
    assert torch.equal(decode(file.getvalue(), "image")[0], grey.rot90(-1))
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
def test_flags_of_pixels_are_checked(flags: dict[str, Any], message: str, jpegs: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(jpegs, pixels=PixelSettings(**flags))


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", png_bytes()[:300], b"\xff\xd8\xff" + bytes(50)],
    ids=["empty", "text", "cut", "zeros"],
)
def test_a_broken_file_is_an_oserror(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(OSError, match="not a readable image"):
        decode(path.read_bytes(), str(path))


def random_views(image: Tensor) -> Tensor:
    return image[:, :8, :8] + torch.rand(3, 8, 8)


def test_a_view_depends_on_seed_epoch_index_and_number_alone(jpegs: Path) -> None:
    catalogue = index_folder(jpegs / "train")

    def dataset(seed: int) -> TwoViews:
        return TwoViews(catalogue, (random_views, random_views), seed, tolerated=5)

    def equal(left: tuple[Tensor, Tensor, int], right: tuple[Tensor, Tensor, int]) -> bool:
        return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])

    first = dataset(0)[2, 3]
    torch.rand(100)  # whatever was drawn before
    assert equal(first, dataset(0)[2, 3])
    assert not torch.equal(first[0], first[1])
    assert not any(equal(first, other) for other in (dataset(0)[1, 3], dataset(0)[2, 4], dataset(1)[2, 3]))


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


def vanish(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def point_at_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def lose_permissions(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


def be_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("damage", [vanish, become_a_folder, point_at_itself, lose_permissions, be_cut_off])
def test_an_image_that_is_lost_gives_way_to_the_next(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for number in range(4):
        Image.effect_noise((16, 16), 50).save(tmp_path / "all" / f"{number}.png")
    dataset = TwoViews(index_folder(tmp_path), (torch.clone, torch.clone), seed=0, tolerated=2)
    (before, _, none, _), (following, *_) = dataset[0, 1], dataset[0, 2]
    damage(tmp_path / "all" / "1.png")
    view, _, unreadable, reason = dataset[0, 1]
    assert torch.equal(view, following)
    assert not torch.equal(view, before)
    assert (none, unreadable) == (0, 1)
    assert "1.png" in reason  # and why
    for number in (0, 2, 3):
        (tmp_path / "all" / f"{number}.png").unlink()
    assert dataset[0, 1][2] == 3  # more than tolerated, which ends the run


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "all" / "folder.png").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "all" / "folder.png" / "image.png")
    assert index_folder(tmp_path).read(0)[1] == str(tmp_path / "all" / "folder.png" / "image.png")
    assert len(index_folder(tmp_path)) == 1


def load(root: Path | str, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": PAPER, "image_size": 32, "batch_size": 8, "seed": 0, "workers": 0}
    settings |= {"timeout": 60, "monitor": True, "pin_memory": False, "augment_on": "workers"}
    return load_images(str(root), **(settings | changes))


def parts(view: Tensor | UnfinishedView) -> tuple[Tensor, ...]:
    return (view,) if isinstance(view, Tensor) else tuple(view)


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_the_number_of_workers_changes_nothing(augment_on: str, jpegs: Path) -> None:
    epochs = []
    for workers in (0, 2):
        pairs = load(jpegs, workers=workers, augment_on=augment_on).pairs
        list(islice(pairs.batches(0), 1))  # an epoch left early, as for the pictures
        epochs.append(list(pairs.batches(1)) + list(pairs.batches(2, first_step=2)))
    for one, other in zip(*epochs, strict=True):
        for view, same in zip(one.views, other.views, strict=True):
            assert all(torch.equal(*pair) for pair in zip(parts(view), parts(same), strict=True))
        assert one.unreadable == other.unreadable


def test_views_for_the_device_are_pixels_and_what_is_to_be_done(jpegs: Path) -> None:
    for view in next(load(jpegs, augment_on="device").pairs.batches(0)).views:
        assert isinstance(view, UnfinishedView)
        assert (view.pixels.shape, view.pixels.dtype) == ((8, 3, 32, 32), torch.uint8)
        assert view.decisions.shape[0] == len(view.decisions.unique(dim=0)) == 8
        assert view.decisions.ndim == 2


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_workers_that_are_spawned_get_the_same(augment_on: str, jpegs: Path) -> None:
    """Python 3.14 starts them so that they have to be sent the dataset."""
    dataset = load(jpegs, augment_on=augment_on).pairs.loader.dataset  # type: ignore[attr-defined]
    for view, same in zip(dataset[0, 3][:2], pickle.loads(pickle.dumps(dataset))[0, 3][:2], strict=True):
        assert all(torch.equal(*pair) for pair in zip(parts(view), parts(same), strict=True))


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
    assert load(jpegs, monitor=False).images == 40


def test_small_images_stay_small(tmp_path: Path) -> None:
    """As CIFAR's: PNG files of 32×32."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(8):
            Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / name / f"{number}.png")
    (batch,) = load(tmp_path, batch_size=16).pairs.batches(0)
    assert [view.shape for view in batch.views if isinstance(view, Tensor)] == [(16, 3, 32, 32)] * 2
    assert batch.unreadable == 0


@pytest.mark.parametrize("busy", [False, True], ids=["waiting for images", "with something else"])
def test_the_death_of_a_worker_ends_the_run_whatever_it_does(
    busy: bool, jpegs: Path, monkeypatch: pytest.MonkeyPatch
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

    with pytest.raises(Aborted, match="a process that reads images has died"):
        train()


HANGING = f"""
import multiprocessing, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
from barlow_recipes.views import PAPER
from barlow_recipes.errors import Aborted
from barlow_recipes.images import load_images
from torch.utils.data import _utils

_utils.MP_STATUS_CHECK_INTERVAL = 3600.0  # torch waits as long for every worker that is alive, Python without end
root = Path(sys.argv[1])
data = load_images(
    str(root), recipes=PAPER, image_size=16, batch_size=2, seed=0, workers=2, timeout=2, monitor=True, pin_memory=False,
    augment_on="workers",
)
batches = data.pairs.batches(0)
next(batches)
if sys.argv[2] == "a pipe":
    for path in root.rglob("*.png"):
        path.unlink()
        os.mkfifo(path)
else:
    time.sleep(0.5)  # until a few batches lie ready: of these, too, the workers still hold the tensors
    for worker in data.pairs.loader._iterator._workers:
        os.kill(worker.pid, signal.SIGSTOP)
started = time.monotonic()
try:
    list(iter(data.final.bank) if sys.argv[3] == "probe" else batches)
except Aborted as error:
    seconds = time.monotonic() - started
    print(error, seconds, len(multiprocessing.active_children()), sep="\\n", flush=True)
"""


@pytest.mark.parametrize(("fault", "part"), [("a stopped worker", "training"), ("a pipe", "probe")])
def test_workers_that_hang_end_the_run_and_the_process(fault: str, part: str, tmp_path: Path, nursery: Nursery) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.effect_noise((16, 16), 50).save(tmp_path / name / f"{number}.png")
    with nursery.start(["-c", HANGING, tmp_path, fault, part], tmp_path) as done:
        assert done.wait() == 0, done.errors
    message, waited, alive = done.output.splitlines()
    assert re.fullmatch(r"no image has come from the workers for 2 seconds.*--loader-timeout", message)
    assert 2 <= float(waited) < 60
    assert int(alive) == 0


def test_fewer_images_than_a_batch_are_an_error(jpegs: Path) -> None:
    with pytest.raises(UsageError, match="36 images to pretrain on, but --batch-size is 64"):
        load(jpegs, batch_size=64)
