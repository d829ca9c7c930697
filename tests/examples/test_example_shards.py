"""Shards of the real webdataset are read as the same files in folders, bit for bit; what is damaged is named."""

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import load, same, saved

from barlow_recipes.errors import UsageError
from barlow_recipes.files import choose_shards, index_shards

webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")

Sample = dict[str, Any]


def write(path: Path, samples: Iterable[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def png(color: int = 0) -> bytes:
    return saved(Image.new("RGB", (8, 8), (color, 0, 0)))


def numbered(images: int, **more: Any) -> list[Sample]:
    return [{"__key__": f"{number:04}", "png": png(number), **more} for number in range(images)]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_as_good_as_folders(workers: int, jpegs: Path, tmp_path: Path) -> None:
    """The files of two class folders, one of them damaged, shuffled into three shards."""
    files = sorted((jpegs / "train").rglob("*.jpg"))
    random.Random(0).shuffle(files)
    classes = ("bluebell", "poppy")
    keys = [f"{path.parent.name}/{path.stem}" for path in files]
    samples = [
        {"__key__": key, "jpg": path.read_bytes(), "cls": classes.index(path.parent.name)}
        for key, path in zip(keys, files, strict=True)
    ]
    for number in range(3):
        write(tmp_path / "flowers" / "train" / f"{number}.tar", samples[number::3])
    folders, shards = load(jpegs), load(tmp_path / "flowers", workers=workers)
    assert (shards.name, shards.images, shards.notes) == (folders.name, folders.images, ()) == ("flowers", 36, ())
    assert shards.tolerated_unreadable == folders.tolerated_unreadable
    for first_step in (0, 2):
        one, other = ([*data.pairs.batches(1, first_step)] for data in (folders, shards))
        assert len(one) == 9 - first_step
        assert same(one, other)
        assert [batch.unreadable for batch in one] == [batch.unreadable for batch in other]
    assert folders.final
    assert shards.final
    assert same(folders.final[:2], shards.final[:2])


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
    "cls, and json beside": ([{"cls": label, "json": {"label": 0}} for label in (9, 3, 9)], [1, 0, 1]),
    "none": ([{}, {}, {}], [0, 0, 0]),
    "no numbers": ([{"cls": label} for label in ("cat", "-1", "9" * 30)], [0, 0, 0]),
}


@pytest.mark.parametrize(("labels", "classes"), LABELS.values(), ids=LABELS)
def test_labels_become_classes(labels: list[Sample], classes: list[int], tmp_path: Path) -> None:
    samples = [sample | label for sample, label in zip(numbered(3), labels, strict=True)]
    catalogue = index_shards(tmp_path, [write(tmp_path / "0.tar", samples)])
    found = {catalogue.read(index)[0]: int(catalogue.labels[index]) for index in range(3)}
    assert [found[png(number)] for number in range(3)] == classes
    assert catalogue.labels.tolist() == sorted(classes)


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
    assert contents == ({b"one", b"another"} if image else {b"another"})


SAMPLES: dict[str, tuple[dict[str, bytes], dict[bytes, int]]] = {
    "a mask beside": ({"a.jpg": b"a", "a.seg.png": b"-", "b.seg.png": b"-", "b.jpg": b"b"}, {b"a": 0, b"b": 0}),
    "an array beside": ({"a.npy": b"-", "a.jpg": b"a", "b.png": b"b", "b.npy": b"-"}, {b"a": 0, b"b": 0}),
    "parts of a name": (
        {"a.left.jpg": b"a", "a.left.cls": b"1", "b.left.cls": b"0", "b.left.jpg": b"b"},
        {b"a": 1, b"b": 0},
    ),
    "a label for all of the sample": (
        {"a.left.jpg": b"a", "a.cls": b"1", "b.jpg": b"b", "b.cls": b"0"},
        {b"a": 1, b"b": 0},
    ),
    "a label for a part": (
        {"a.jpg": b"a", "a.cls": b"1", "a.seg.cls": b"0", "b.seg.cls": b"1", "b.jpg": b"b", "b.cls": b"0"},
        {b"a": 1, b"b": 0},
    ),
    "folders with dots": ({"v1.0/a.jpg": b"a", "v1.1/a.jpg": b"b"}, {b"a": 0, b"b": 0}),
}


def pack(files: Iterable[tuple[str, bytes]], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("files", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_has_one_image_and_its_own_label(
    files: dict[str, bytes], expected: dict[bytes, int], tmp_path: Path
) -> None:
    """Samples as webdataset groups them; of what else is in them nothing is pretrained on."""
    path = pack(files.items(), tmp_path / "0.tar")
    assert len([*webdataset.WebDataset(str(path), shardshuffle=False)]) == len(expected)
    catalogue = index_shards(tmp_path, [path])
    found = [(catalogue.read(index)[0], int(catalogue.labels[index])) for index in range(len(catalogue))]
    assert sorted(found) == sorted(expected.items())


AMBIGUOUS = {
    "numbers after a dot": ["img.001.jpg", "img.001.cls", "img.002.jpg", "img.002.cls"],
    "two formats": ["img.jpg", "img.png"],
    "twice": ["img.jpg", "other.jpg", "img.jpg"],
    "two parts": ["img.left.png", "img.right.png", "img.npy.png"],
}


@pytest.mark.parametrize("given", ["shard", "folder"])
def test_hidden_files_of_a_shard_are_counted_and_told(given: str, tmp_path: Path) -> None:
    names = ["a.png", "._a.png", "b.png", "@eaDir/b.png", "c.png", "d.png"]
    path = pack(((name, png()) for name in names), tmp_path / "0.tar")
    data = load(path if given == "shard" else tmp_path)
    assert data.images == 4
    assert data.notes[0].endswith(": 2 hidden files and folders (._a.png, @eaDir/b.png)")


@pytest.mark.parametrize("names", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_two_images_of_a_sample_are_refused(names: list[str], tmp_path: Path) -> None:
    """Which label is whose would be a guess."""
    path = pack(((name, b"1") for name in names), tmp_path / "0.tar")
    with pytest.raises(UsageError, match="before the first dot, or leave one of them") as error:
        index_shards(tmp_path, [path])
    first, second = [name for name in names if name.startswith("img") and "cls" not in name][:2]
    message = f"--data {path}: {first} and {second} are images of one sample, which webdataset calls img."
    assert str(error.value).startswith(message)


NAMED = {
    "for training": (("b-train-0.tar", "a-train-1.tar", "a-val-0.tar"), ["a-train-1.tar", "b-train-0.tar"]),
    "not to test with": (("photos-0.tar", "photos-val-0.tar", "photos-test-0.tar"), ["photos-0.tar"]),
    "unpacked": (("folder.tar", "photos-0.tar"), ["photos-0.tar"]),  # as ImageNet's archives are
}


@pytest.mark.parametrize(("names", "chosen"), NAMED.values(), ids=NAMED)
def test_shards_to_pretrain_on_are_told_by_their_names(
    names: tuple[str, ...], chosen: list[str], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    assert [path.name for path in choose_shards(tmp_path, names, ".tar")] == chosen


def test_shards_are_found_at_any_depth_or_one_is_given(tmp_path: Path) -> None:
    shard = write(tmp_path / "wds" / "p" / "train-0.tar", numbered(20))
    write(tmp_path / "wds" / "p" / ".hidden" / "train-1.tar", numbered(20))
    one, other = load(tmp_path / "wds"), load(shard)
    assert one.images == other.images == 20
    assert same(one.pairs.batches(0), other.pairs.batches(0))


def flip_a_bit_in_a_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[header(path, 5) + 3] ^= 1
    path.write_bytes(content)


def header(path: Path, member: int) -> int:
    with tarfile.open(path) as archive:
        return archive.getmembers()[member].offset


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in an image": (lambda path: os.truncate(path, header(path, 5) + 600), "not a whole tar archive"),
    "cut before a header": (lambda path: os.truncate(path, header(path, 5)), r"damaged or cut off at byte \d+"),
    "cut in a header": (lambda path: os.truncate(path, header(path, 5) + 100), r"damaged or cut off at byte \d+"),
    "a bit of a header": (flip_a_bit_in_a_header, r"damaged or cut off at byte \d+"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole tar archive"),
    "text": (lambda path: path.write_text("text" * 500), "not a whole tar archive"),
    "compressed": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "uncompressed"),
    "no image": (lambda path: write(path, [{"__key__": "0", "txt": ""}]), r"no image in it. Expected files KEY\.jpg"),
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
