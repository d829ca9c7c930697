"""What users bring to --data: folders of any shape, lists, data sets; nothing is lost without a word."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from barlow_recipes import images
from barlow_recipes.command_line import read
from barlow_recipes.data import PretrainingData
from barlow_recipes.decoding import decode
from barlow_recipes.errors import UsageError
from barlow_recipes.files import index_folder
from barlow_recipes.images import find_images, load_images
from barlow_recipes.pixels import PixelSettings
from barlow_recipes.views import PAPER


def fill(folder: Path, images: int, start: int = 0) -> Path:
    """Small colour PNG files, each of one colour of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + images):
        Image.new("RGB", (12, 10), (number, 255 - number, 100)).save(folder / f"{number:03}.png")
    return folder


def load(source: object, **changes: Any) -> PretrainingData:
    settings: dict[str, Any] = {"recipes": PAPER, "image_size": 16, "batch_size": 4, "seed": 0, "workers": 0}
    settings |= {"timeout": 60, "monitor": True, "pin_memory": False}
    return load_images(str(source), **(settings | changes))


def seen(data: PretrainingData) -> int:
    """How many images an epoch shows, read for real."""
    views = torch.cat([batch.views[0] for batch in data.pairs.batches(0) if isinstance(batch.views[0], Tensor)])
    return len(views)


@pytest.mark.parametrize("part", [".", "train", "2021/may/01"])
def test_a_folder_without_classes_is_pretrained_on_without_a_probe(part: str, tmp_path: Path) -> None:
    fill(tmp_path / "flat" / part, 40)
    data = load(tmp_path / "flat")
    assert (data.name, data.images, seen(data), data.monitor) == ("flat", 40, 40, None)
    assert any("no probe" in note for note in data.notes)


def test_images_beside_class_folders_are_counted(tmp_path: Path) -> None:
    fill(fill(tmp_path, 40) / "extra", 20)
    data = load(tmp_path)
    assert (data.images, data.monitor) == (60, None)


def hidden_checkpoints(root: Path) -> None:
    fill(root / ".ipynb_checkpoints", 5)
    fill(root / "a" / ".ipynb_checkpoints", 5)


def apple(root: Path) -> None:
    for path in [*root.rglob("*.png")]:
        path.with_name(f"._{path.name}").write_bytes(bytes(100))
    fill(root / "__MACOSX" / "a", 5)


@pytest.mark.parametrize("litter", [hidden_checkpoints, apple])
def test_what_a_system_has_left_is_left_out(litter: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, 20)
    litter(tmp_path)
    catalogue = index_folder(tmp_path)
    assert torch.bincount(catalogue.labels).tolist() == [20, 20]
    data = load(tmp_path)
    assert (data.images, data.notes) == (36, ())
    assert sum(batch.unreadable for batch in data.pairs.batches(0)) == 0


def test_an_empty_hidden_folder_is_no_class(tmp_path: Path) -> None:
    (fill(tmp_path, 40) / ".ipynb_checkpoints").mkdir()
    assert load(tmp_path).images == 40


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "all" / "folder.png", 1)
    assert index_folder(tmp_path).read(0)[1] == str(tmp_path / "all" / "folder.png" / "000.png")


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "a", 5)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(index_folder(tmp_path)) == 5


LISTS = {
    "paths": ("list.txt", "{}", False),
    "paths and classes": ("list.txt", "{} {label}", True),
    "table": ("list.csv", "{}", False),
    "table with classes": ("list.csv", "{},{label}", True),
    "heads": ("list.csv", "id,path,label\n1,{},{label}", True),
    "tabs and words": ("list.tsv", "{}\tclass {label}", True),
}


@pytest.mark.parametrize(("name", "line", "labelled"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_list_names_images_from_its_folder(
    name: str, line: str, labelled: bool, absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "my photos", 40)
    paths = [f"{tmp_path if absolute else '.'}/my photos/{number:03}.png" for number in range(40)]
    head, _, row = line.rpartition("\n")
    lines = [row.format(path, label=number % 2) for number, path in enumerate(paths)]
    (tmp_path / name).write_text("\n".join([*filter(None, [head]), *lines]) + "\n")
    monkeypatch.chdir("/")
    data = load(tmp_path / name)
    assert data.name == "list"
    assert (data.images, data.monitor is not None) == ((36, True) if labelled else (40, False))
    assert sum(batch.unreadable for batch in data.pairs.batches(0)) == 0


def hugging_face(folder: Path, **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    paths = [str(path) for path in sorted(fill(folder, 40).iterdir())]
    return datasets.Dataset.from_dict({"picture": paths} | columns).cast_column("picture", datasets.Image())


@pytest.mark.parametrize("kind", ["folder", "splits", "file", "files"])
def test_hugging_faces_data_sets_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = hugging_face(tmp_path / "png", label=[number % 2 for number in range(40)])
    source = tmp_path / "saved"
    if kind == "folder":
        found.save_to_disk(str(source))
    elif kind == "splits":
        datasets.DatasetDict({"train": found, "test": found}).save_to_disk(str(source))
    else:
        source.mkdir()
        found.to_parquet(str(source / "train-00000.parquet"))
        found.to_parquet(str(source / "test-00000.parquet"))
        source = source / "train-00000.parquet" if kind == "file" else source
    data = load(source)
    assert (data.images, seen(data)) == (36, 36)
    assert data.monitor
    assert sorted(torch.cat([labels for _, labels in data.monitor.queries]).tolist()) == [0, 0, 1, 1]
    found, _ = find_images(str(source))
    assert found.read(3)[0] == (tmp_path / "png" / "003.png").read_bytes()


class Own(Dataset[Any]):
    """Images in every form a Dataset may give them."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.labels = True  # none, whatever the name says
        if form == "pairs":
            self.targets = [number % 2 for number in range(40)]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        image = Image.new("RGB", (12, 10), (index, 0, 0))
        tensor = torch.full((3, 10, 12), index, dtype=torch.uint8)
        forms = {"pillow": image, "tensor": tensor, "array": tensor.permute(1, 2, 0).numpy(), "floats": tensor / 255}
        return (image, index % 2) if self.form == "pairs" else forms[self.form]


for form in ("pillow", "tensor", "array", "floats", "pairs"):
    setattr(sys.modules[__name__], f"make_{form}", lambda form=form: Own(form))


@pytest.mark.parametrize("form", ["pillow", "tensor", "array", "floats", "pairs"])
def test_the_users_own_data_set_is_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_data", sys.modules[__name__])
    data = load(f"own_data:make_{form}", pixels=PixelSettings(value_range=(0, 1) if form == "floats" else None))
    assert data.name == f"make_{form}"
    assert (data.images, data.monitor is not None) == ((36, True) if form == "pairs" else (40, False))
    assert seen(data) == data.images
    assert data.fingerprint == load(f"own_data:make_{form}", pixels=data.pixels).fingerprint


def h5(root: Path) -> Path:
    for number in range(12):
        (root / f"{number}.h5").touch()
    return root


def archive(root: Path) -> Path:
    (root / "photos.tar.gz").touch()
    return root


def two_kinds(root: Path) -> Path:
    (fill(root, 5) / "train.tar").touch()
    return root


def empty_class(root: Path) -> Path:
    fill(root / "full", 1)
    (root / "void").mkdir()
    return root


def parts(root: Path) -> Path:
    for part in ("Train", "Val"):
        fill(root / part / "dog", 1)
    return root


def some_labels(root: Path) -> Path:
    (root / "list.csv").write_text("a.png,1\nb.png,\n")
    return root / "list.csv"


def no_paths(root: Path) -> Path:
    (root / "list.txt").write_text("first line\nsecond line\n")
    return root / "list.txt"


def missing(root: Path) -> Path:
    (root / "list.txt").write_text("".join(f"{number}.png\n" for number in range(9)))
    return root / "list.txt"


def dark(root: Path) -> Path:
    for number in range(9):
        tifffile.imwrite(root / f"{number}.tif", np.full((8, 8), 4000 + number, dtype=np.uint16))
    return root


def negative(root: Path) -> Path:
    for number in range(9):
        tifffile.imwrite(root / f"{number}.tif", np.full((8, 8), number - 300, dtype=np.int16))
    return root


def bands(root: Path) -> Path:
    for number in range(9):
        tifffile.imwrite(root / f"{number}.tif", torch.zeros(13, 20, 20).numpy(), photometric="minisblack")
    return root


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: root / "nowhere", "no such file or folder"),
    "a module": (lambda _: "nowhere:make", "expected a callable that returns a Dataset.*No module named"),
    "a name": (lambda _: "sys:nothing", "expected a callable .* no attribute"),
    "another format": (h5, r"no image, found 12 \.h5; can read images \(\.jpg"),
    "compressed": (archive, r"no image, found 1 \.tar\.gz; can read"),
    "a compressed file": (lambda root: archive(root) / "photos.tar.gz", "a file that cannot be read; can read"),
    "two kinds": (two_kinds, r"found 5 \.png, 1 \.tar; expected .* alone"),
    "an empty class": (empty_class, "no image in 1 of 2 class folders, the first is void"),
    "parts": (parts, r"Train, Val are no classes. Give the part to pretrain on, such as .*Train"),
    "some labels": (some_labels, "1 of 2 images have no label"),
    "no paths": (no_paths, "expected a path of an image in each line .* got 'second'"),
    "missing files": (missing, r"9 images that were tried, none can be read: .*No such file.*0\.png"),
    "12 bits": (dark, r"nearly black.* 4000 to 4008 of 65535: give --value-range"),
    "negative": (negative, r"0\.tif: values from -300 to -300.*--value-range"),
    "13 bands": (bands, r"0\.tif: 13 channels, but --channels is 3"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_said_in_one_line(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load(make(tmp_path))
    assert str(error.value).startswith("--data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_images_of_many_bands_become_views(augment_on: str, tmp_path: Path) -> None:
    load(bands(tmp_path), pixels=PixelSettings(channels=13, value_range=(-1, 1)), augment_on=augment_on)
    data = load(tmp_path, pixels=PixelSettings(channels=13, value_range=(-1, 1)), augment_on=augment_on)
    view, _ = next(iter(data.pairs.batches(0))).views
    assert (view if isinstance(view, Tensor) else view.pixels).shape == (4, 13, 16, 16)
    assert data.pixels.channels == 13


def test_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    for name in ("notes.txt", "labels.json"):
        (fill(tmp_path, 40) / name).touch()
    assert "left out" in load(tmp_path).notes[0]
    assert "1 .json, 1 .txt" in load(tmp_path).notes[0]


def test_the_first_unreadable_file_is_named(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Images are counted, not attempts, and a run that cannot go on says which file and why."""
    fill(tmp_path / "photos", 40)
    for number in range(8, 20):
        (tmp_path / "photos" / f"{number:03}.png").write_text("<html>")
    small = ("--arch", "small-cnn", "--projector", "64-64", "--image-size", 28, "--batch-size", 8, "--epochs", 1)
    status, _, errors = run("--data", tmp_path / "photos", *small, "--workers", 0, "--device", "cpu")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "images of epoch 1 could not be read, 5 are tolerated: " in errors
    assert "0" in errors.partition(".png is not a readable image: in no format that is known")[0][-3:]
    assert int(errors.split(" images of epoch")[0].split()[-1]) <= 12


def test_a_platform_without_child_signals_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows."""
    without = {name: value for name, value in vars(signal).items() if name != "SIGCHLD"}
    monkeypatch.setattr(images, "signal", SimpleNamespace(**without))
    assert seen(load(fill(tmp_path, 8), workers=0)) == 8
    assert seen(load(tmp_path, workers=1)) == 8


def test_a_command_describes_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last line goes to the other programs: what is normalised by it has the mean 0 and the deviation 1."""
    from describe_images import main

    random = np.random.default_rng(0)
    for number in range(20):
        image = (random.normal(size=(4, 12, 10)) * 50 + np.arange(4)[:, None, None] * 400 - 300).astype("i2")
        np.save(tmp_path / f"{number:02}.npy", image)
    (tmp_path / "20.npy").write_bytes(b"nothing")
    assert main(["--data", str(tmp_path), "--channels", "4"]) == 0
    *told, flags = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}: 21 images, 21 read" in told
    assert any(line.startswith("1 cannot be read, the first: ") and "20.npy" in line for line in told)
    assert "width×height: 10×12 (20)" in told
    assert "type: int16 (20)" in told
    assert flags.startswith("--channels 4 --mean ")
    pixels = read(PixelSettings, flags.split(), "")
    (tmp_path / "20.npy").unlink()
    values = [decode((tmp_path / f"{n:02}.npy").read_bytes(), "", pixels) for n in range(20)]
    views = pixels.normalized(torch.stack(values))
    torch.testing.assert_close(views.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(views.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=2e-3)
    (tmp_path / "floats").mkdir()
    for number in range(12):
        image = random.normal(size=(12, 10)).astype("f4")
        image[0, 0] = np.nan if number == 0 else image[0, 0]
        np.save(tmp_path / "floats" / f"{number:02}.npy", image)
    assert main(["--data", str(tmp_path / "floats")]) == 0
    *told, flags = capsys.readouterr().out.splitlines()
    assert any("00.npy has pixels that are not finite" in line for line in told)
    pixels = read(PixelSettings, flags.split(), "")  # the extreme values are within the range, to the last digit
    assert all(decode((tmp_path / "floats" / f"{n:02}.npy").read_bytes(), "", pixels).max() <= 1 for n in range(1, 12))
    assert main(["--data", str(fill(tmp_path / "png", 200))]) == 0
    assert "--value-range" not in capsys.readouterr().out
