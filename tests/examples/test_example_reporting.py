"""No run overwrites another, the newest checkpoint is found, a file is replaced whole or not at all."""

from pathlib import Path

import pytest

from barlow_recipes.command_line import RunSettings
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.folders import find, make_output_folder, own_files
from barlow_recipes.outputs import replacing


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    default = tmp_path / "runs" / "digits"
    made = [make_output_folder(None, default, overwrite=False, resumed=None) for _ in range(3)]
    assert [folder.name for folder in made] == ["digits", "digits-2", "digits-3"]
    assert make_output_folder(None, default, overwrite=True, resumed=None) == default


def test_a_run_is_overwritten_on_demand_only_and_other_files_never(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=None) == tmp_path
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="holds another run"):
        make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=None)
    make_output_folder(tmp_path, tmp_path / "unused", overwrite=False, resumed=tmp_path / "checkpoint.pt")
    assert (tmp_path / "metrics.jsonl").exists()
    make_output_folder(tmp_path, tmp_path / "unused", overwrite=True, resumed=None)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "metrics.jsonl"}  # until the folder is locked
    assert tmp_path / "notes.txt" not in own_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "report.html",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "checkpoint.damaged.pt",
        "backbone.pt",
        "curves.png",
        "cross_correlation.png",
        "wandb.id",
        "tensorboard/events.out.tfevents.1.host.2.3",
    ],
)
def test_every_file_of_a_run_is_known(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UsageError, match="holds another run"):
        make_output_folder(tmp_path, tmp_path, overwrite=False, resumed=None)
    assert path in own_files(make_output_folder(tmp_path, tmp_path, overwrite=True, resumed=None))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*file.out: cannot be written \(Not a directory\)"):
        make_output_folder(tmp_path / "file" / "out", tmp_path, overwrite=False, resumed=None)


def test_resume_finds_the_newest_checkpoint(tmp_path: Path) -> None:
    def find_checkpoint(resume: str | None, out: Path | None, default: Path) -> Path | None:
        return find(RunSettings(resume=resume, out=out), default)

    default = tmp_path / "digits"
    assert find_checkpoint(None, None, default) is None
    assert find_checkpoint("auto", None, default) is None
    for name in ("digits", "digits-2", "digits-3"):
        (tmp_path / name).mkdir()
    for name in ("digits", "digits-2"):
        (tmp_path / name / "checkpoint.pt").touch()
    assert find_checkpoint("auto", None, default) == tmp_path / "digits-2" / "checkpoint.pt"
    assert find_checkpoint("auto", default, default) == default / "checkpoint.pt"
    assert find_checkpoint(str(default), None, default) == default / "checkpoint.pt"
    assert find_checkpoint("some/where.pt", None, default) == Path("some/where.pt")
    (tmp_path / "digits-3" / "checkpoint.previous.pt").touch()  # the run was killed between two renamings
    for out in (None, tmp_path / "digits-3"):
        assert find_checkpoint("auto", out, default) == tmp_path / "digits-3" / "checkpoint.pt"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"

    def break_down() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_down()
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    with (
        pytest.raises(Aborted, match=r"cannot write .*nowhere.page: No such file"),
        replacing(tmp_path / "nowhere/page"),
    ):
        pass
