"""Checkpoints are whole or absent, damage is noticed, and nothing in them is executed."""

import os
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from barlow_recipes import checkpoint
from barlow_recipes.errors import Aborted, UsageError

STATE = {
    "settings": {"arch": "resnet18"},
    "model": {"weight": torch.arange(5000.0)},
    "optimizer": {},
    "schedule": {},
    "scaler": {},
    "step": 3,
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after ``size`` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    checkpoint.save(path, STATE | {"step": 4})
    loaded, source, _ = checkpoint.load(path)
    assert (loaded["step"], source) == (4, path)
    assert torch.equal(loaded["model"]["weight"], torch.arange(5000.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    with files_of_at_most(4096), pytest.raises(Aborted, match=r"cannot write .*checkpoint\.pt"):
        checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path)[0]["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then its folder is, so that a crash of the machine leaves the old file or the new one."""
    path, synced, sync = tmp_path / "checkpoint.pt", [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.save(path, STATE)
    assert synced[0] == (path.stat().st_size, False)
    assert [named for _, named in synced] == [False, True]


@pytest.mark.parametrize(("saved", "current"), [({}, {"seed": 1}), ({"seed": 1}, {})])
def test_a_setting_that_only_one_side_knows_is_named(saved: dict[str, int], current: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"seed was {saved.get('seed')} and is now {current.get('seed')}"):
        checkpoint.check_settings(Path("c.pt"), saved, current)


def test_it_is_a_file_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == STATE.keys()
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])


def test_the_checksum_covers_every_bit(tmp_path: Path) -> None:
    """One bit in each of 512 places from the first byte to the last, the checksum's own among them."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    generator = random.Random(0)
    places = {0, len(whole) - 1, *range(len(whole) - 80, len(whole)), *generator.sample(range(len(whole)), 430)}
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="checksum"):
            checkpoint.read(path)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": lambda b: b[:-1],
    "one byte long": lambda b: b + b"\0",
    "half": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "zeroed": lambda b: bytes(len(b)),
    "zeroed from the middle": lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_gives_way_to_the_one_before(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for step in (3, 4, 5):
        checkpoint.save(path, STATE | {"step": step}, keep_previous=True)
    assert checkpoint.load(path)[0]["step"] == 5
    path.write_bytes(damage(path.read_bytes()))
    state, source, asked = checkpoint.load(path)
    assert (state["step"], source, asked) == (4, checkpoint.previous(path), path)
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(UsageError) as error:
        checkpoint.load(path)
    assert str(error.value).count("not a readable checkpoint") == 2
    assert str(path) in str(error.value)
    assert str(source) in str(error.value)


def test_between_two_renames_the_previous_one_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    path.replace(checkpoint.previous(path))  # a crash here leaves no checkpoint.pt
    assert checkpoint.load(path)[1] == checkpoint.previous(path)


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save(STATE, tmp_path / "foreign.pt")
    with pytest.raises(UsageError, match=r"not a readable checkpoint .it does not end with a checksum"):
        checkpoint.load(tmp_path / "foreign.pt")
    checkpoint.save(tmp_path / "other.pt", {"model": {}})
    with pytest.raises(UsageError, match="not a checkpoint of this program"):
        checkpoint.load(tmp_path / "other.pt")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    """Not of a file that was signed with a right checksum either: anybody can compute one."""
    trap = Malicious(tmp_path / "sprung")
    writers: dict[str, Callable[[object, Path], object]] = {
        "zip.pt": torch.save,  # type: ignore[dict-item]
        "pickle.pt": lambda content, path: path.write_bytes(pickle.dumps(content)),
        "signed.pt": lambda content, path: checkpoint.save(path, content),
    }
    for name, write in writers.items():
        write(STATE | {"step": trap}, tmp_path / name)
        with pytest.raises(UsageError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "signed.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_every_setting_that_differs_is_named() -> None:
    saved = {"arch": "resnet18", "projector": "64-64", "seed": 0}
    checkpoint.check_settings(Path("c.pt"), saved, dict(saved))
    with pytest.raises(UsageError) as error:
        checkpoint.check_settings(Path("c.pt"), saved, {"arch": "resnet50", "projector": "64-64", "seed": 1})
    differences = "arch was resnet18 and is now resnet50; seed was 0 and is now 1"
    assert str(error.value) == f"--resume c.pt: {differences}. Give the same, or begin a new run"
