"""Shards of the real webdataset are read as the same files in folders, bit for bit; what is damaged is named."""

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from barlow_recipes.data import PretrainingData
from barlow_recipes.errors import UsageError
from barlow_recipes.images import load_images
from barlow_recipes.shards import choose_shards, index_shards
from barlow_recipes.views import PAPER

webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")

Sample = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program keeps its indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "barlow-loss"


def write(path: Path, samples: Iterable[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def png(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def numbered(images: int, **more: Any) -> list[Sample]:
    return [{"__key__": f"{number:04}", "png": png(number), **more} for number in range(images)]


def load(root: Path, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": PAPER, "image_size": 32, "batch_size": 8, "seed": 0, "workers": 0}
    settings |= {"timeout": 60, "monitor": True, "pin_memory": False, "augment_on": "workers"}
    return load_images(str(root), **(settings | changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_as_good_as_folders(workers: int, jpegs: Path, tmp_path: Path) -> None:
    """The files of two class folders, one of them damaged, shuffled into three shards."""
    files = sorted((jpegs / "train").rglob("*.jpg"))
    random.Random(0).shuffle(files)
    classes = ("bluebell", "poppy")
    samples = [
        {"__key__": f"{name}/{path.stem}", "jpg": path.read_bytes(), "cls": classes.index(name)}
        for path in files
        for name in [path.parent.name]
    ]
    for number in range(3):
        write(tmp_path / "flowers" / "train" / f"{number}.tar", samples[number::3])
    folders, shards = load(jpegs), load(tmp_path / "flowers", workers=workers)
    assert (shards.name, shards.images, shards.notes) == (folders.name, folders.images, ()) == ("flowers", 36, ())
    assert shards.tolerated_unreadable == folders.tolerated_unreadable
    for data in (folders, shards):
        list(islice(data.pairs.batches(0), 1))  # left early
    compared = 0
    for first_step in (0, 2):
        for one, other in zip(folders.pairs.batches(1, first_step), shards.pairs.batches(1, first_step), strict=True):
            assert all(torch.equal(*views) for views in zip(one.views, other.views, strict=True))
            assert one.unreadable == other.unreadable
            compared += 1
    assert compared == 4 + 2
    assert folders.final
    assert shards.final
    for part, same in zip(folders.final[:2], shards.final[:2], strict=True):
        for one, other in zip(part, same, strict=True):
            assert all(torch.equal(*tensors) for tensors in zip(one, other, strict=True))


def test_an_image_is_read_from_its_place(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{number}.tar", numbered(3 + number, cls=5)) for number in range(2)]
    catalogue = index_shards(tmp_path, shards)
    assert sorted(catalogue.read(index)[0] for index in range(7)) == sorted(map(png, (0, 1, 2, 0, 1, 2, 3)))
    # Of equal names the first shard's comes first.
    names = [catalogue.read(index)[1].partition(",")[0] for index in range(7)]
    assert names == [str(shards[number]) for number in (0, 1, 0, 1, 0, 1, 1)]
    os.truncate(shards[1], 3000)
    with pytest.raises(OSError, match=r"1\.tar, byte \d+: expected \d+ bytes, found 0"):
        catalogue.read(6)


LABELS = {
    "cls": ([{"cls": label} for label in (9, 3, 9)], [1, 0, 1]),
    "cls as other tools write it": ([{"cls": label} for label in ("07\n", "3", " 7")], [1, 0, 1]),
    "json's label": ([{"json": {"label": label, "width": 8}} for label in (9, 3, 9)], [1, 0, 1]),
    "json's cls": ([{"json": {"cls": label}} for label in (9, 3, 9)], [1, 0, 1]),
    "json without one, and cls": ([{"cls": label, "json": {"width": 8}} for label in (9, 3, 9)], [1, 0, 1]),
    "none": ([{}, {}, {}], [0, 0, 0]),
    "none in json": ([{"json": ["label"]}, {"json": {"label": None}}, {"json": {"label": -1}}], [0, 0, 0]),
}


@pytest.mark.parametrize(("labels", "classes"), LABELS.values(), ids=LABELS)
def test_labels_become_classes(labels: list[Sample], classes: list[int], tmp_path: Path) -> None:
    samples = [sample | label for sample, label in zip(numbered(3), labels, strict=True)]
    catalogue = index_shards(tmp_path, [write(tmp_path / "0.tar", samples)])
    found = {catalogue.read(index)[0]: int(catalogue.labels[index]) for index in range(3)}
    assert [found[png(number)] for number in range(3)] == classes
    assert catalogue.labels.tolist() == sorted(classes)


def test_without_labels_there_is_no_probe(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", numbered(40))
    data = load(tmp_path)
    assert (data.images, data.monitor, data.final) == (40, None, None)
    assert "no probe" in data.notes[0]


NAMES = {
    "a.b/07.jpg": True,
    "07.JPEG": True,
    "07.left.webp": True,
    "./07.png": True,
    "x" * 150 + "/07.png": True,  # longer than a header's field
    "ä/07.png": True,
    "a/._07.jpg": False,  # macOS adds such
    "__MACOSX/07.jpg": False,
    "a/.ipynb_checkpoints/07.jpg": False,
    "07.npy": True,
    "07": False,
    "07.txt": False,
}


@pytest.mark.parametrize(("name", "image"), NAMES.items())
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_known_by_their_names(name: str, image: bool, layout: int, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=layout) as archive:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for member, content in ((name, b"one"), ("zz.jpg", b"another")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    catalogue = index_shards(tmp_path, [tmp_path / "0.tar"])
    contents = {catalogue.read(index)[0] for index in range(len(catalogue))}
    assert contents == {b"one", b"another"} if image else {b"another"}


def test_the_shards_of_a_split_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("b-train-0.tar", "a-train-1.tar", "a-val-0.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in choose_shards([*tmp_path.iterdir()])] == ["a-train-1.tar", "b-train-0.tar"]


def test_images_to_test_with_are_not_pretrained_on(tmp_path: Path) -> None:
    for name in ("photos-0.tar", "photos-val-0.tar", "photos-test-0.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in choose_shards([*tmp_path.iterdir()])] == ["photos-0.tar"]


def test_an_archive_beside_its_folder_is_no_shard(jpegs: Path, tmp_path: Path) -> None:
    """As ImageNet is after it was unpacked."""
    (tmp_path / "poppy").symlink_to(jpegs / "train" / "poppy")
    (tmp_path / "poppy.tar").touch()
    data = load(tmp_path)
    assert data.images == 20
    assert data.notes[0].endswith("1 .tar")  # left out, and said


def test_shards_are_found_at_any_depth_or_one_is_given(tmp_path: Path) -> None:
    shard = write(tmp_path / "wds" / "p" / "train-0.tar", numbered(20))
    write(tmp_path / "wds" / "p" / ".hidden" / "train-1.tar", numbered(20))
    assert load(tmp_path / "wds").images == load(shard).images == 20
    first, *others = (load(source).pairs.batches(0) for source in (tmp_path / "wds", shard))
    for one, other in zip(first, others[0], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.views, other.views, strict=True))


def cut_in_an_image(path: Path) -> None:
    os.truncate(path, header(path, 5) + 600)


def cut_before_a_header(path: Path) -> None:
    os.truncate(path, header(path, 5))


def cut_in_a_header(path: Path) -> None:
    os.truncate(path, header(path, 5) + 100)


def flip_a_bit_in_a_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[header(path, 5) + 3] ^= 1
    path.write_bytes(content)


def header(path: Path, member: int) -> int:
    with tarfile.open(path) as archive:
        return archive.getmembers()[member].offset


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in an image": (cut_in_an_image, "not a whole tar archive"),
    "cut before a header": (cut_before_a_header, r"damaged or cut off at byte \d+"),
    "cut in a header": (cut_in_a_header, r"damaged or cut off at byte \d+"),
    "a bit of a header": (flip_a_bit_in_a_header, r"damaged or cut off at byte \d+"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole tar archive"),
    "text": (lambda path: path.write_text("text" * 500), "not a whole tar archive"),
    "compressed": (compress, "uncompressed"),
    "no image": (
        lambda path: write(path, [{"__key__": "0", "txt": "text"}]),
        r"no image in it. Expected files KEY\.jpg",
    ),
    "some labels": (
        lambda path: write(path, [*numbered(4, cls=1), {"__key__": "x", "png": png()}]),
        "1 of 13 images have no label",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_shard_that_cannot_be_used_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.tar", numbered(8, cls=1))
    damage(tmp_path / "1.tar")
    with pytest.raises(UsageError, match=message) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"--data {tmp_path}")
    assert "1.tar" in str(error.value) or "label" in message


def test_an_index_is_kept_as_long_as_the_shards_stay_the_same(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", numbered(8, cls=1))
    before = index_shards(tmp_path, [path])
    (kept,) = cache.iterdir()
    time = path.stat().st_mtime_ns
    flip_a_bit_in_a_header(path)
    os.utime(path, ns=(time, time))
    after = index_shards(tmp_path, [path])  # from the cache: the archive itself cannot be indexed any more
    assert [after.read(index) for index in range(8)] == [before.read(index) for index in range(8)]
    kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UsageError, match="damaged"):  # the index is damaged as well, and not trusted
        index_shards(tmp_path, [path])
    write(path, numbered(8, cls=1))
    os.utime(path, ns=(time + 1, time + 1))
    assert len(index_shards(tmp_path, [path])) == 8
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("place", ["/dev/null", "/proc/nowhere"])
def test_an_index_that_cannot_be_kept_is_none(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert len(index_shards(tmp_path, [write(tmp_path / "0.tar", numbered(8))])) == 8
