"""Checkpoints are whole or absent, damage is noticed, and nothing in them is executed."""

import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pretraining import checkpoint
from pretraining.errors import Aborted, UsageError

STATE = {
    "settings": {"arch": "resnet18"},
    "model": {"weight": torch.arange(5000.0)},
    "optimizer": {},
    "schedule": {},
    "step": 3,
    "rng": {},
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
    loaded = checkpoint.load(path)
    assert loaded["step"] == 4
    assert torch.equal(loaded["model"]["weight"], torch.arange(5000.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    with files_of_at_most(4096), pytest.raises(Aborted, match=r"cannot write .*checkpoint\.pt"):
        checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    start = whole.index(torch.arange(5000.0).numpy().tobytes())
    for position in range(start, start + 20000, 1999):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match="not a readable checkpoint"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b))]
)
def test_a_damaged_file_is_named(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"--resume .*checkpoint\.pt: not a readable checkpoint"):
        checkpoint.load(path)


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UsageError, match="not a checkpoint of this program"):
        checkpoint.load(tmp_path / "foreign.pt")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    trap = Malicious(tmp_path / "sprung")
    for name, write in {
        "zip.pt": torch.save,
        "pickle.pt": lambda content, path: path.write_bytes(pickle.dumps(content)),
    }.items():
        write(STATE | {"step": trap}, tmp_path / name)
        with pytest.raises(UsageError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_every_setting_that_differs_is_named() -> None:
    saved = {"arch": "resnet18", "projector": "64-64", "seed": 0}
    checkpoint.check_settings(Path("c.pt"), saved, dict(saved))
    with pytest.raises(UsageError) as error:
        checkpoint.check_settings(Path("c.pt"), saved, {"arch": "resnet50", "projector": "64-64", "seed": 1})
    differences = "arch was resnet18 and is now resnet50; seed was 0 and is now 1"
    assert str(error.value) == f"--resume c.pt: {differences}. Give the same, or begin a new run"
