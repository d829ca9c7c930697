"""Batches, splits, digits and image folders: deterministic, complete, and unmoved by a broken file."""

import io
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import EXAMPLES
from PIL import Image
from torch import Tensor

from barlow_recipes.data import EpochBatches, PretrainingData, hold_out, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.digits import load_digits
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.files import index_folder
from barlow_recipes.images import TwoViews, load_images
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
    assert data.images == len(pretrained) == len(data.pairs.images)  # type: ignore[attr-defined]


def test_digits_resume_in_the_middle_of_an_epoch_bit_for_bit() -> None:
    pairs = load_digits(batch_size=200, seed=5, monitor=False).pairs
    whole, rest = list(pairs.batches(3)), list(pairs.batches(3, first_step=4))
    assert len(whole) == len(pairs)
    for batch, again in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(view, same) for view, same in zip(batch.views, again.views, strict=True))
    assert not torch.equal(*whole[0].views)


FORMATS: dict[str, tuple[str, str]] = {
    "jpeg": ("RGB", "JPEG"),
    "grey jpeg": ("L", "JPEG"),
    "cmyk jpeg": ("CMYK", "JPEG"),
    "png": ("RGB", "PNG"),
    "png with alpha": ("RGBA", "PNG"),
    "png with a palette": ("P", "PNG"),
    "png of 16 bits": ("I;16", "PNG"),
    "webp": ("RGB", "WEBP"),
    "tiff": ("RGB", "TIFF"),
    "bmp": ("RGB", "BMP"),
}


@pytest.mark.parametrize(("mode", "file_format"), FORMATS.values(), ids=FORMATS)
def test_any_usual_format_becomes_three_channels_of_eight_bits(mode: str, file_format: str, tmp_path: Path) -> None:
    grey = torch.linspace(0, 255, 1200).view(30, 40)
    pixels = (grey * 257).to(torch.uint16) if mode == "I;16" else grey.to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    path = tmp_path / "image"
    (image if mode == "I;16" else image.convert(mode)).save(path, format=file_format)
    decoded = decode(path.read_bytes(), str(path))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 30, 40)
    assert (decoded - grey).abs().mean() < 4


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
    (before, _, none), (following, _, _) = dataset[0, 1], dataset[0, 2]
    damage(tmp_path / "all" / "1.png")
    view, _, unreadable = dataset[0, 1]
    assert torch.equal(view, following)
    assert not torch.equal(view, before)
    assert (none, unreadable) == (0, 1)
    for number in (0, 2, 3):
        (tmp_path / "all" / f"{number}.png").unlink()
    assert dataset[0, 1][2] == 3  # more than tolerated, which ends the run


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "all" / "folder.png").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "all" / "folder.png" / "image.png")
    assert index_folder(tmp_path).read(0)[1] == str(tmp_path / "all" / "folder.png" / "image.png")
    assert len(index_folder(tmp_path)) == 1


def load(root: Path, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": PAPER, "image_size": 32, "batch_size": 8, "seed": 0, "workers": 0}
    settings |= {"timeout": 60, "monitor": True, "pin_memory": False, "augment_on": "workers"}
    return load_images(root, **(settings | changes))


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
        assert view.parameters.shape[0] == len(view.parameters.unique(dim=0)) == 8
        assert view.parameters.ndim == 2


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_workers_that_are_spawned_get_the_same(augment_on: str, jpegs: Path) -> None:
    """Python 3.14 starts them so that they have to be sent the dataset."""
    dataset = load(jpegs, augment_on=augment_on).pairs.loader.dataset  # type: ignore[attr-defined]
    for view, same in zip(dataset[0, 3][:2], pickle.loads(pickle.dumps(dataset))[0, 3][:2], strict=True):
        assert all(torch.equal(*pair) for pair in zip(parts(view), parts(same), strict=True))


def test_a_folder_is_split_into_disjoint_parts(jpegs: Path) -> None:
    data = load(jpegs)
    assert data.final
    bank, queries = (loader.dataset.catalogue for loader in data.final[:2])  # type: ignore[attr-defined]

    def names(catalogue: Any) -> set[str]:
        return {catalogue.read(index)[1] for index in range(len(catalogue))}

    pretraining = names(data.pairs.loader.dataset.catalogue)  # type: ignore[attr-defined]
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
    root, recipes=PAPER, image_size=16, batch_size=2, seed=0, workers=2, timeout=2, monitor=True, pin_memory=False,
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


def test_a_train_folder_is_found_and_one_class_has_no_neighbours(jpegs: Path, tmp_path: Path) -> None:
    assert load(jpegs).name == load(jpegs / "train").name == "flowers"
    (tmp_path / "all").symlink_to(jpegs / "train" / "bluebell")
    data = load(tmp_path)
    assert data.final is None
    assert "two classes" in data.notes[0]


def empty_class(root: Path) -> None:
    (root / "full").mkdir()
    Image.new("RGB", (8, 8)).save(root / "full" / "image.png")
    (root / "void").mkdir()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root.rmdir(), "no such folder"),
        (lambda root: Image.new("RGB", (8, 8)).save(root / "image.png"), "no class folders"),
        (empty_class, "no image in 1 of 2 class folders, the first is void"),
    ],
    ids=["missing", "flat", "empty"],
)
def test_a_folder_that_cannot_be_used_is_named(prepare: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


def test_fewer_images_than_a_batch_are_an_error(jpegs: Path) -> None:
    with pytest.raises(UsageError, match="36 images to pretrain on, but --batch-size is 64"):
        load(jpegs, batch_size=64)


def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for part in ("Train", "Val"):
        (tmp_path / part / "dog").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "dog" / "image.png")
    with pytest.raises(UsageError, match=r"Train, Val are no classes. Give the part to pretrain on, such as .*Train"):
        load(tmp_path)
