"""Fashion-MNIST, from files of its layout: read with care, coloured the same in every run, split without overlap."""

import gzip
import shutil
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow_recipes import fashion_mnist
from barlow_recipes.data import PretrainingData
from barlow_recipes.errors import UsageError
from barlow_recipes.fashion_mnist import in_two_colors, is_fashion_mnist, load_fashion_mnist
from barlow_recipes.pixels import MEAN, STD
from barlow_recipes.views import ViewRecipe

RECIPES = (ViewRecipe(crop_scale=(0.3, 1.0), blur=0.0, solarize=0.0), ViewRecipe(blur=0.0, solarize=0.2))
MORE = (*RECIPES, *RECIPES, ViewRecipe(crop_scale=(0.05, 0.4), blur=0.0, solarize=0.2, size=20))
BLURRED = (ViewRecipe(blur=0.5, solarize=0.0), ViewRecipe(blur=1.0, solarize=0.0))
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
INSTALLED = fashion_mnist.INSTALLED.is_dir()


def idx(values: Tensor) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 training images and 30 test images of ten classes, each all of one grey value but for a corner of 0."""
    generator = torch.Generator().manual_seed(0)
    for images, labels, n in ((TRAIN_IMAGES, TRAIN_LABELS, 200), (TEST_IMAGES, TEST_LABELS, 30)):
        grey = torch.randint(256, (n, 1, 1), generator=generator, dtype=torch.uint8).repeat(1, 28, 28)
        grey[:, 0, 0] = 0
        (tmp_path / f"{images}.gz").write_bytes(gzip.compress(idx(grey)))
        (tmp_path / f"{labels}.gz").write_bytes(gzip.compress(idx((torch.arange(n) % 10).to(torch.uint8))))
    return tmp_path


def load(source: str | Path, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": RECIPES, "batch_size": 16, "seed": 0, "monitor": True}
    return load_fashion_mnist(source, **(settings | changes))


def contents(batches: Any) -> list[tuple[bytes, int]]:
    images, labels = map(torch.cat, zip(*batches, strict=True))
    return [(image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)]


def test_no_image_is_in_two_parts(folder: Path) -> None:
    data = load(folder)
    assert data.monitor
    assert data.final
    watched, known = contents(data.monitor.queries), contents(data.monitor.bank)
    test, bank = contents(data.final.queries), contents(data.final.bank)
    assert (data.name, data.images) == ("fashion-mnist", 180)
    assert (len(watched), len(known), len(test), len(bank)) == (20, 180, 30, 180)
    assert sorted(label for _, label in watched) == [label for label in range(10) for _ in range(2)]
    assert set(known) == set(bank)
    assert len(set(watched) | set(known) | set(test)) == 20 + 180 + 30
    assert (data.monitor.linear, data.final.linear) == (True, True)
    everything = load(folder, monitor=False)
    assert (everything.images, everything.monitor) == (200, None)
    assert set(contents(everything.final.bank)) == set(watched) | set(known)  # type: ignore[union-attr]


def test_banks_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"MOST_HELD_OUT_PER_CLASS": 1, "WATCHED_BANK_PER_CLASS": 3, "FINAL_BANK_PER_CLASS": 7}
    for name, bound in bounds.items():
        monkeypatch.setattr(fashion_mnist, name, bound)
    data = load(folder)
    parts = (*data.monitor[:2], *data.final[:2])  # type: ignore[index]
    assert [len(contents(part)) for part in parts] == [30, 10, 70, 30]
    assert data.images == 190


def test_plain_images_keep_their_two_colors(folder: Path) -> None:
    """Normalised by ImageNet's mean and deviation, as the views are."""
    data = load(folder)
    images, labels = next(iter(data.final.queries))  # type: ignore[union-attr]
    assert (images.shape, images.dtype) == ((30, 3, 28, 28), torch.float32)
    assert labels.tolist() == [number % 10 for number in range(30)]
    pixels = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)  # float32 at 255: 3e-5
    inner = pixels[:, :, 1:, 1:]
    torch.testing.assert_close(inner, inner[:, :, :1, :1].expand_as(inner), atol=1e-3, rtol=0)
    trained = torch.stack([image for images, _ in data.final.bank for image in images])  # type: ignore[union-attr]
    trained = (trained * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    backgrounds = torch.cat([part[:30, :, 0, 0].round() for part in (pixels, trained)])
    assert len(backgrounds.unique(dim=0)) == 60  # no test image has the colours of the training image of its number


def test_colors_are_a_function_of_seed_and_number() -> None:
    grey = torch.tensor([0, 255, 128], dtype=torch.uint8).repeat(500, 1)[:, None]
    images = in_two_colors(grey, seed=1)
    assert (images.shape, images.dtype) == ((500, 3, 1, 3), torch.uint8)
    assert torch.equal(images, in_two_colors(grey, seed=1))
    assert torch.equal(images[:7], in_two_colors(grey[:7], seed=1))
    assert not torch.equal(images, in_two_colors(grey, seed=2))
    background, foreground, between = images.int().unbind(-1)
    distance = (background - foreground).abs()
    assert 64 <= distance.min() <= 70
    assert 185 <= distance.max() <= 192
    # 128/255 of the way, rounded.
    torch.testing.assert_close(between, (background + (foreground - background) * 128 / 255).round().int())
    assert len(background.unique(dim=0)) == 500
    for color in (background, foreground):
        assert (color.float().mean() - 127.5).abs() < 10  # of 1,500 uniform values: 5 standard errors


# The blur is a product of matrices, which a CPU may sum in another order where there are fewer of them: 1.2e-6 seen.
KINDS = {"sharp": (RECIPES, 0.0), "blurred": (BLURRED, 1e-5), "more views": (MORE, 0.0)}


@pytest.mark.parametrize(("recipes", "tolerance"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows", [slice(0, 5), slice(5, 16)])
def test_rows_of_a_batch_are_those_of_one_process(
    rows: slice, recipes: tuple[ViewRecipe, ...], tolerance: float, folder: Path
) -> None:
    whole = list(islice(load(folder, recipes=recipes).pairs.batches(1), 3))
    part = list(islice(load(folder, recipes=recipes, rows=rows).pairs.batches(1), 3))
    for batch, own in zip(whole, part, strict=True):
        for view, part_of_it in zip(batch.views, own.views, strict=True):
            torch.testing.assert_close(part_of_it, view[rows], atol=tolerance, rtol=0)


def test_the_first_two_of_more_views_are_those_of_two(folder: Path) -> None:
    two, more = (next(load(folder, recipes=recipes).pairs.batches(1)).views for recipes in (RECIPES, MORE))
    assert all(map(torch.equal, two, more))
    assert [tuple(view.shape) for view in more] == [(16, 3, 28, 28)] * 4 + [(16, 3, 20, 20)]  # type: ignore[union-attr]
    assert len({view.numpy().tobytes() for view in more}) == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", [".", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("compressed", [True, False])
def test_the_files_are_found_as_others_leave_them(layout: str, compressed: bool, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere" / layout
    place.mkdir(parents=True)
    for path in folder.glob("*.gz"):
        if compressed:
            shutil.copy(path, place)
        else:
            (place / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert is_fashion_mnist(tmp_path / "elsewhere")
    here, there = load(folder), load(str(tmp_path / "elsewhere"))
    assert contents(here.final.queries) == contents(there.final.queries)  # type: ignore[union-attr]


def test_other_folders_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_fashion_mnist("fashion-mnist")
    assert not is_fashion_mnist(tmp_path)
    Path("fashion-mnist", "shirts").mkdir(parents=True)  # a folder of that name has the images to read
    assert not is_fashion_mnist("fashion-mnist")


def replaced_by(values: Tensor, cut: int | None = None, more: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda _: gzip.compress(idx(values)[:cut] + more)


BYTES = torch.zeros(200, 28, 28, dtype=torch.uint8)
LABELS = BYTES[:, 0, 0]
UNREADABLE = "cannot be read, is it damaged"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut off": (TRAIN_IMAGES, lambda content: content[:-20], UNREADABLE),
    "a flipped bit": (
        TEST_LABELS,
        lambda content: content[:-12] + bytes([content[-12] ^ 1]) + content[-11:],
        UNREADABLE,
    ),
    "not compressed": (TEST_IMAGES, lambda _: idx(BYTES), UNREADABLE),
    "empty": (TRAIN_LABELS, lambda _: b"", UNREADABLE),
    "labels for images": (TRAIN_IMAGES, replaced_by(LABELS), r"expected \(N, 28, 28\)"),
    "half a header": (TRAIN_IMAGES, replaced_by(BYTES, cut=10), UNREADABLE),
    "too few values": (TRAIN_IMAGES, replaced_by(BYTES, cut=-1), UNREADABLE),
    "too many values": (TRAIN_LABELS, replaced_by(LABELS, more=b"0"), UNREADABLE),
    "no images": (TEST_IMAGES, replaced_by(BYTES[:0]), UNREADABLE),
    "larger images": (TRAIN_IMAGES, replaced_by(BYTES.view(50, 56, 56)), r"expected \(N, 28, 28\)"),
    "fewer labels": (TRAIN_LABELS, replaced_by(LABELS[:9]), "a label for each of 200 images"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], message: str, folder: Path) -> None:
    path = folder / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f"--data ({path}|{folder}): .*{message}"):
        load(folder)
    path.unlink()
    with pytest.raises(UsageError, match=f"--data: no {name}.gz in {folder}$"):
        load(folder)


def test_a_missing_package_gets_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="apt install dataset-fashion-mnist"):
        load("fashion-mnist")


@pytest.mark.skipif(not INSTALLED, reason="apt install dataset-fashion-mnist")
def test_the_package_holds_what_the_paper_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = load("fashion-mnist", batch_size=256)
    assert data.monitor
    assert data.final
    assert (data.images, len(data.pairs)) == (59_000, 230)
    labels = [torch.cat([labels for _, labels in part]) for part in (*data.monitor[:2], *data.final[:2])]
    assert [torch.bincount(part).tolist() for part in labels] == [[count] * 10 for count in (500, 100, 1000, 1000)]
    assert not torch.equal(*next(data.pairs.batches(0)).views)
