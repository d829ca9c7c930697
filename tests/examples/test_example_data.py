"""Batches, splits, digits and image folders: deterministic, complete, and unmoved by a broken file."""

import io
import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pretraining.data import EpochBatches, hold_out, seed_of
from pretraining.decoding import decode
from pretraining.digits import load_digits
from pretraining.errors import Aborted, UsageError
from pretraining.folder import TwoViews, load_folder


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
    paths = [str(path) for path in sorted(jpegs.rglob("*.jpg"))]

    def dataset(seed: int) -> TwoViews:
        return TwoViews(paths, (random_views, random_views), seed, tolerated=5)

    def equal(left: tuple[Tensor, Tensor, int], right: tuple[Tensor, Tensor, int]) -> bool:
        return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])

    first = dataset(0)[2, 3]
    torch.rand(100)  # whatever was drawn before
    assert equal(first, dataset(0)[2, 3])
    assert not torch.equal(first[0], first[1])
    assert not any(equal(first, other) for other in (dataset(0)[1, 3], dataset(0)[2, 4], dataset(1)[2, 3]))


def test_a_broken_image_gives_way_to_the_next(jpegs: Path) -> None:
    paths = [str(path) for path in sorted(jpegs.rglob("*.jpg"))]
    broken = paths.index(str(jpegs / "train" / "poppy" / "07.jpg"))
    dataset = TwoViews(paths, (torch.clone, torch.clone), seed=0, tolerated=2)
    view, _, unreadable = dataset[0, broken]
    following, _, none = dataset[0, broken + 1]
    assert torch.equal(view, following)
    assert (unreadable, none) == (1, 0)
    hopeless = TwoViews([paths[broken]] * 9, (torch.clone, torch.clone), seed=0, tolerated=2)
    assert hopeless[0, 0][2] == 3  # more than tolerated, which ends the run


def load(root: Path, **changes: object) -> object:
    settings = {"image_size": 32, "batch_size": 8, "seed": 0, "workers": 0, "monitor": True, "pin_memory": False}
    return load_folder(root, **(settings | changes))  # type: ignore[arg-type]


def test_the_number_of_workers_changes_nothing(jpegs: Path) -> None:
    epochs = []
    for workers in (0, 2):
        pairs = load(jpegs, workers=workers).pairs  # type: ignore[attr-defined]
        list(islice(pairs.batches(0), 1))  # an epoch left early, as for the pictures
        epochs.append(list(pairs.batches(1)) + list(pairs.batches(2, first_step=2)))
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(*views) for views in zip(one.views, other.views, strict=True))
        assert one.unreadable == other.unreadable


def test_a_folder_is_split_into_disjoint_parts(jpegs: Path) -> None:
    data = load(jpegs)
    bank, queries = (loader.dataset.samples for loader in data.final[:2])  # type: ignore[attr-defined]
    pretraining = set(data.pairs.loader.dataset.paths)  # type: ignore[attr-defined]
    assert data.images == len(pretraining) == 36  # type: ignore[attr-defined]
    assert [label for _, label in queries] == [0, 0, 1, 1]
    assert not pretraining & {path for path, _ in queries}
    assert {path for path, _ in bank} <= pretraining
    assert load(jpegs, monitor=False).images == 40  # type: ignore[attr-defined]


def test_the_death_of_a_worker_is_told_in_one_line(jpegs: Path) -> None:
    pairs = load(jpegs, workers=1).pairs  # type: ignore[attr-defined]
    batches = pairs.batches(0)
    next(batches)
    os.kill(pairs.loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(Aborted, match="a process that reads images has died"):
        list(batches)


def test_a_train_folder_is_found_and_one_class_has_no_neighbours(jpegs: Path, tmp_path: Path) -> None:
    assert load(jpegs).name == load(jpegs / "train").name == "flowers"  # type: ignore[attr-defined]
    (tmp_path / "all").symlink_to(jpegs / "train" / "bluebell")
    data = load(tmp_path)
    assert data.final is None  # type: ignore[attr-defined]
    assert "two classes" in data.notes[0]  # type: ignore[attr-defined]


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
