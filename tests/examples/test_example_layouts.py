"""What users bring to --data: folders of any shape, lists, data sets; nothing is lost without a word."""

import io
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sources import fill, load, npy, same, tensors, tiff
from torch.utils.data import Dataset

from barlow_recipes.command_line import read
from barlow_recipes.data import PretrainingData
from barlow_recipes.errors import UsageError
from barlow_recipes.files import find_images, index_folder
from barlow_recipes.labelled import load_tree
from barlow_recipes.metrics import NO_ACCURACY
from barlow_recipes.pixels import PixelSettings, decode


def seen(data: PretrainingData) -> int:
    """How many images an epoch shows, read for real."""
    batches = [*data.pairs.batches(0)]
    assert not any(batch.unreadable for batch in batches)
    return len(torch.cat(tensors(batch.views[0] for batch in batches)))


@pytest.mark.parametrize("part", [".", "train", "2021/may/01"])
def test_a_folder_without_classes_is_pretrained_on_without_a_probe(part: str, tmp_path: Path) -> None:
    fill(tmp_path / "flat" / part, 40)
    data = load(tmp_path / "flat")
    assert (data.name, data.images, seen(data), data.monitor) == ("flat", 40, 40, None)
    assert any("no probe" in note for note in data.notes)


def test_images_beside_class_folders_are_counted_and_other_files_told(tmp_path: Path) -> None:
    fill(fill(tmp_path, 40) / "extra", 20)
    for name in ("notes.txt", "labels.json"):
        (tmp_path / name).touch()
    data = load(tmp_path)
    assert (data.images, data.monitor) == (60, None)
    assert "left out" in data.notes[0]
    assert "1 .json, 1 .txt" in data.notes[0]


LITTER: dict[str, tuple[Callable[[Path], object], str]] = {
    "a hidden folder": (lambda root: (root / ".ipynb_checkpoints").mkdir(), "1 hidden files and folders (.ipynb_"),
    "hidden folders with images": (
        lambda root: [fill(root / part / ".ipynb_checkpoints", 5) for part in ("", "a")],
        "2 hidden files and folders (.ipynb_checkpoints)",
    ),
    "macOS's": (
        lambda root: [
            (fill(root / "__MACOSX" / "a", 5), (root / "a" / "._000.png").write_bytes(bytes(100))),
            [(root / part / ".DS_Store").touch() for part in ("", "a", "b")],
        ],
        "5 hidden files and folders (.DS_Store, ._000.png, __MACOSX)",
    ),
    "of a network's disk": (
        lambda root: [fill(root / part / "@eaDir" / "000.png", 2) for part in ("", "a", "b")],
        "3 hidden files and folders (@eaDir)",
    ),
    "Windows'": (
        lambda root: [fill(root / "$RECYCLE.BIN", 3), (root / "a" / "Thumbs.db").touch()],
        "2 hidden files and folders ($RECYCLE.BIN, Thumbs.db)",
    ),
    "a link in a circle": (lambda root: (root / "a" / "up").symlink_to(".."), ""),
}


@pytest.mark.parametrize("name", ["photos", ".photos"])
@pytest.mark.parametrize(("litter", "told"), LITTER.values(), ids=LITTER)
def test_what_a_system_has_left_is_left_out(
    litter: Callable[[Path], object], told: str, name: str, tmp_path: Path
) -> None:
    """Counted and told once; the folder itself may be hidden, since it is asked for."""
    root = tmp_path / name
    for part in ("a", "b"):
        fill(root / part, 20)
    litter(root)
    assert torch.bincount(index_folder(root).labels).tolist() == [20, 20]
    data = load(root)
    assert (data.images, seen(data), len(data.notes)) == (36, 36, bool(told))
    assert not told or data.notes[0].startswith(f"left out of {root}: {told}")
    copy = shutil.copytree(root, tmp_path / "tree" / "val", symlinks=True)
    shutil.copytree(root, copy.with_name("train"), symlinks=True)
    tree = load_tree(copy.parent)
    assert (tree.classes, len(tree.train), len(tree.validation)) == (["a", "b"], 40, 40)
    assert len(tree.notes) == bool(told)


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "all" / "folder.png", 1)
    assert index_folder(tmp_path).read(0)[1] == str(tmp_path / "all" / "folder.png" / "000.png")


LISTS = {
    "paths": ("list.txt", "{}", False),
    "paths and classes": ("list.txt", "{} {label}", True),
    "table": ("list.csv", "{}", False),
    "table with classes": ("list.csv", "{},{label}", True),
    "heads": ("list.csv", "path,label\n{},{label}", True),
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
    assert seen(data) == data.images


@pytest.mark.parametrize("kind", ["folder", "splits", "file", "files"])
def test_hugging_faces_data_sets_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [str(path) for path in sorted(fill(tmp_path / "png", 40).iterdir())]
    found = datasets.Dataset.from_dict({"picture": paths, "label": [number % 2 for number in range(40)]})
    found = found.cast_column("picture", datasets.Image())
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
    data = load(f"own_data:make_{form}", value_range=(0, 1) if form == "floats" else None)
    assert data.name == f"make_{form}"
    assert (data.images, data.monitor is not None) == ((36, True) if form == "pairs" else (40, False))
    assert seen(data) == data.images
    assert data.fingerprint == load(f"own_data:make_{form}").fingerprint


def put(name: str, content: bytes | str = b"", times: int = 1, given: str = "") -> Callable[[Path], Path]:
    """A maker of files of one content, numbered if there are several."""

    def make(root: Path) -> Path:
        for number in range(times):
            path = root / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root / given

    return make


BANDS = put("{}.tif", tiff(np.ones((13, 20, 20))), 9)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: root / "nowhere", "no such file or folder"),
    "a module": (lambda _: "nowhere:make", "expected a callable that returns a Dataset.*No module named"),
    "a name": (lambda _: "sys:nothing", "expected a callable .* no attribute"),
    "another format": (put("{}.h5", times=12), r"no image, found 12 \.h5; can read images \(\.jpg"),
    "compressed": (put("photos.tar.gz"), r"no image, found 1 \.tar\.gz; can read"),
    "a compressed file": (put("photos.tar.gz", given="photos.tar.gz"), "a file that cannot be read; can read"),
    "two kinds": (lambda root: put("train.tar")(fill(root, 5)), r"found 5 \.png, 1 \.tar; expected .* alone"),
    "an empty class": (
        lambda root: put("void/notes.txt")(put("full/0.png")(root)),
        "no image in 1 of 2 class folders, the first is void",
    ),
    "parts": (
        lambda root: put("Train/dog/0.png")(put("Val/dog/0.png")(root)),
        r"Train, Val are no classes. Give the part to read, such as .*Train",
    ),
    "some labels": (put("list.csv", "a.png,1\nb.png,\n", given="list.csv"), "1 of 2 images have no label"),
    "no paths": (
        put("list.txt", "first line\nsecond line\n", given="list.txt"),
        "expected a path of an image in each line .* got 'first'",
    ),
    "missing files": (
        put("list.txt", "".join(f"{number}.png\n" for number in range(9)), given="list.txt"),
        r"9 images that were tried, none can be read: .*No such file.*0\.png",
    ),
    "12 bits": (
        put("{}.tif", tiff(np.full((8, 8), 4000, "u2")), 9),
        "nearly black.* 4000 of 65535: give --value",
    ),
    "negative": (
        put("{}.tif", tiff(np.full((8, 8), -300, "i2")), 9),
        r"0\.tif: values from -300 to -300.*--value-range",
    ),
    "signed, 12 bits": (
        put("{}.tif", tiff(np.arange(64, dtype="i2").reshape(8, 8) * 65), 9),
        r"0\.tif: values from 0 to 4095 of int32, a type without a value for white: give --value-range LOW HIGH",
    ),
    "dark floats": (
        put("{}.tif", tiff(np.full((8, 8), 0.01, "f4")), 9),
        r"nearly black, the largest value is 0\.01 of 1.*--value-range LOW HIGH",
    ),
    "13 bands": (BANDS, r"0\.tif: 13 channels, but --channels is 3"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_said_in_one_line(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load(make(tmp_path))
    assert str(error.value).startswith("--data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_images_of_many_bands_become_views(augment_on: str, tmp_path: Path) -> None:
    data = load(BANDS(tmp_path), channels=13, augment_on=augment_on)
    view, *_ = tensors(next(iter(data.pairs.batches(0))))
    assert view.shape == (4, 13, 16, 16)
    assert data.pixels.channels == 13


def in_folder(files: dict[str, bytes], root: Path) -> Path:
    for name, content in files.items():
        put(name, content)(root)
    return root


def in_shard(files: dict[str, bytes], root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("lay_out", [in_folder, in_shard])
def test_how_sixteen_bits_were_written_changes_no_view(
    lay_out: Callable[[dict[str, bytes], Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either order of bytes, and with white or black as zero: the same views, and the same description."""
    from describe_images import main

    random, told, views = np.random.default_rng(0), list[list[str]](), list[Any]()
    images = [random.integers(0, 2**16, (12, 10), "u2") for _ in range(8)]
    for order in "<>":
        for photometric in ("minisblack", "miniswhite"):
            values = [image if photometric == "minisblack" else ~image for image in images]
            options = {"photometric": photometric, "byteorder": order}
            files = {f"{n}.tif": tiff(each.astype(f"{order}u2"), **options) for n, each in enumerate(values)}
            source = lay_out(files, tmp_path / f"{len(told)}")
            views.append([batch.views for batch in load(source).pairs.batches(0)])
            assert main(["--data", str(source)]) == 0
            told.append(capsys.readouterr().out.splitlines()[1:])
    assert all(same(views[0], other) for other in views)
    assert all(told[0] == other for other in told)
    assert "type: uint16 (8)" in told[0]


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


@pytest.mark.usefixtures("few_looks")
def test_a_run_whose_held_out_images_cannot_be_read_says_so(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """It trains; there is nothing to say of the accuracy, and that is said."""
    for name in ("a", "b"):
        fill(tmp_path / "photos" / name, 20)
    found = load(tmp_path / "photos").final
    assert found
    held_out = found.queries.dataset.images  # type: ignore[attr-defined]
    for number in range(len(held_out)):
        Path(held_out.read(number)[1]).write_text("<html>")
    small = ("--arch", "small-cnn", "--projector", "64-64", "--image-size", 28, "--batch-size", 8, "--epochs", 1)
    flags = (*small, "--probe-every", 1, "--workers", 0, "--device", "cpu", "--out", "out")
    status, output, errors = run("--data", tmp_path / "photos", *flags)
    assert status == 0, errors
    assert output.count(NO_ACCURACY) + errors.count(NO_ACCURACY) == 2  # of the epoch and of the end
    assert NO_ACCURACY in Path("out/report.html").read_text()


def test_a_command_describes_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last line goes to the other programs: what is normalised by it has the mean 0 and the deviation 1."""
    from describe_images import main

    random = np.random.default_rng(0)
    for number in range(20):
        image = (random.normal(size=(4, 12, 10)) * 50 + np.arange(4)[:, None, None] * 400 - 300).astype("i2")
        put(f"{number:02}.npy", npy(image))(tmp_path)
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
    (tmp_path / "signed").mkdir()
    np.save(tmp_path / "signed" / "0.npy", (4095 * random.random((12, 10))).astype("i2"))
    np.save(tmp_path / "signed" / "1.npy", np.array([[0, 4095]], "i2"))  # as 16 bits it would be a sixteenth
    assert main(["--data", str(tmp_path / "signed")]) == 0
    assert capsys.readouterr().out.endswith("--value-range 0 4095\n")
    assert main(["--data", str(fill(tmp_path / "png", 200))]) == 0
    assert "--value-range" not in capsys.readouterr().out
