"""The program in two real processes: the steps of one process, files and messages once, and no hang."""

import json
import re
import signal
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from outcomes import EXAMPLES, FILES, SMALL_CNN, differences, rows, states
from sources import load
from together import Done, launch

from barlow_recipes import distributed
from barlow_recipes.data import Batch
from barlow_recipes.digits import load_digits
from barlow_recipes.errors import UsageError
from programs import Nursery

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

PROGRAM, CHANGED = EXAMPLES / "imagenet_pretrain.py", Path(__file__).parents[1] / "faults" / "start.py"
IN_FLOAT64 = json.dumps([["quick"], ["in_float64"], ["saves"], ["threads"]])
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Both(NamedTuple):
    folder: Path
    alone: Done
    together: Done


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Both:
    """Two epochs of the default job, in one process and in two."""
    folder = tmp_path_factory.mktemp("digits")
    flags = ("--epochs", 2, "--probe-every", 1, "--out")
    done = (launch(nursery, folder, count, PROGRAM, *flags, str(count)) for count in (1, 2))
    return Both(folder, *done)


@pytest.mark.slow
def test_two_processes_leave_and_print_what_one_does(digits: Both) -> None:
    folder, alone, together = digits
    assert (together.status, together.told) == (0, []), together.errors
    assert "Warning" not in together.errors
    assert {path.name for path in (folder / "2").iterdir()} == FILES

    def without_numbers(output: str) -> list[str]:
        return re.sub(r"[\d,.]+", "0", output).replace("cpu in 0 processes", "cpu").splitlines()

    assert "fp32 on cpu in 2 processes; results go to 2" in together.output
    assert without_numbers(together.output) == without_numbers(alone.output)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(digits: Both) -> None:
    """Rounding apart: within 20 steps the losses move by 4e-4, and by 1.5e-3 where the initial weights move by 6e-8."""
    for kind in ("settings", "step", "epoch", "report", "evaluation"):
        one, two = (rows(digits.folder / count, kind) for count in ("1", "2"))
        assert [row.get("step") for row in two] == [row.get("step") for row in one] != []
        assert [row.keys() for row in two] == [row.keys() for row in one]
    one, two = ({**rows(digits.folder / count, "settings")[0]} for count in ("1", "2"))
    assert {name for name in one if one[name] != two[name]} == {"processes", "command"}
    one, two = (rows(digits.folder / count, "step") for count in ("1", "2"))
    assert [row["step"] for row in one] == [1, 11, 20]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=5e-3)
    one, two = (rows(digits.folder / count, "evaluation")[-1] for count in ("1", "2"))
    for name in ("knn", "linear_1", "linear_5", "linear_all"):
        assert two[name] == pytest.approx(one[name], abs=2)


def test_an_output_folder_that_holds_another_run_is_refused_once(tmp_path: Path, nursery: Nursery) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "metrics.jsonl").write_text("{}\n")
    done = launch(nursery, tmp_path, 2, PROGRAM, "--out", "1")
    assert done.status != 0
    assert done.told == ["error: --out 1: holds another run. Choose another folder, --overwrite or --resume"]
    assert done.output == ""


FLAGS = ("--epochs", 1, "--log-every", 1, "--projector", "64-64", "--batch-size", 15)  # an odd batch
STEPS = list(range(1, 12))
exact = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def in_float64(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Callable[..., Path]:
    """Call the program on few digits in float64 with one process or two, always in the same folder."""
    folder = tmp_path_factory.mktemp("in_float64")

    def call(processes: int, out: str, *flags: object) -> Path:
        if not (folder / out).exists() or flags:
            done = launch(nursery, folder, processes, CHANGED, IN_FLOAT64, *FLAGS, "--out", out, *flags)
            assert done.status == 0, done.errors
            told = re.findall(r"^(?:saved|left) \S+", done.errors, re.MULTILINE)
            assert told == ["saved checkpoint.pt", "saved backbone.pt"]
        return folder / out

    return call


def losses(folder: Path) -> list[float]:
    steps = rows(folder, "step")
    assert [row["step"] for row in steps] == STEPS
    return [row["loss"] for row in steps]


def test_uneven_shards_take_the_steps_of_one_process(in_float64: Callable[..., Path]) -> None:
    one, two = in_float64(1, "one"), in_float64(2, "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-13)
    exact(*(state["model"] for state in states(one, two)))
    expected, report = (rows(folder, "report")[0] for folder in (one, two))
    assert report.pop("kind") == expected.pop("kind")
    assert report == pytest.approx(expected, rel=1e-9)


def test_accumulated_parts_on_uneven_shards_take_the_steps_of_one_process(in_float64: Callable[..., Path]) -> None:
    """Whatever is exchanged after each part: 5 pairs of 15, 2 and 3 on the ranks."""
    one, two = (in_float64(processes, f"parts-on-{processes}", "--accumulate", 3) for processes in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-13)
    exact(*(state["model"] for state in states(one, two)))


def test_more_views_and_local_crops_on_uneven_shards_take_the_steps_of_one_process(
    in_float64: Callable[..., Path],
) -> None:
    flags = ("--views", 3, "--local-crops", 2)
    one, two = (in_float64(processes, f"views-on-{processes}", *flags) for processes in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-13)
    exact(*(state["model"] for state in states(one, two)))


def test_a_run_resumes_with_another_number_of_processes(in_float64: Callable[..., Path]) -> None:
    in_float64(1, "turns", "--limit-steps", 3)
    in_float64(2, "turns", "--limit-steps", 7, "--resume")
    turns, one = in_float64(1, "turns", "--resume"), in_float64(1, "one")
    assert losses(turns) == pytest.approx(losses(one), rel=1e-13)
    exact(*(state["model"] for state in states(one, turns)))


def test_a_run_of_two_processes_resumes_bit_for_bit(in_float64: Callable[..., Path]) -> None:
    in_float64(2, "parts", "--limit-steps", 5)
    parts, two = in_float64(2, "parts", "--resume"), in_float64(2, "two")
    assert losses(parts) == losses(two)
    assert differences(*states(parts, two)) == []


def test_chunks_on_uneven_shards_hang_nowhere_and_resume_to_the_bit(in_float64: Callable[..., Path]) -> None:
    """7 rows and 8 are two chunks on either rank: their batch norms speak with each other."""
    chunks = ("--chunk-size", 7, "--batch-size", 15)
    whole = in_float64(2, "chunks", *chunks)
    in_float64(2, "chunks-in-parts", *chunks, "--limit-steps", 5)
    assert differences(*states(whole, in_float64(2, "chunks-in-parts", *chunks, "--resume"))) == []


def test_a_broken_file_is_counted_once(jpegs: Path, tmp_path: Path, nursery: Nursery) -> None:
    flags = ("--data", jpegs, *SMALL_CNN, "--no-probe", "--epochs", 1, "--batch-size", 20)
    flags += ("--seed", 1)  # with which rank 1 reads it
    for count in (1, 2):
        done = launch(nursery, tmp_path / "runs", count, PROGRAM, *flags, "--out", str(count))
        assert done.status == 0, done.errors
        assert done.output.count("1 unreadable image replaced") == 1
    one, two = (rows(tmp_path / "runs" / count, "step") for count in ("1", "2"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    assert [row["unreadable"] for row in rows(tmp_path / "runs" / "2", "epoch")] == [1]


def test_a_mistake_gets_one_line_for_all_processes(tmp_path: Path, nursery: Nursery) -> None:
    done = launch(nursery, tmp_path, 2, PROGRAM, "--bogus")
    assert done.status != 0
    assert done.told == ["error: Unrecognized options: --bogus (--help lists the flags)"]
    assert not list(tmp_path.iterdir())


def test_what_fails_on_one_rank_ends_the_others(tmp_path: Path, nursery: Nursery) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import imagenet_pretrain as program
from barlow_recipes.distributed import rank, all_reduce
from barlow_recipes.errors import Aborted

def totals_or_failure(numbers):
    if rank() == 1:
        raise Aborted("the cable is loose")
    return all_reduce(numbers)

program.distributed.all_reduce = totals_or_failure
sys.exit(program.main())
""")
    done = launch(nursery, tmp_path, 2, program, "--no-probe", "--out", "out")
    assert done.status != 0
    assert done.told == ["error: the cable is loose; no checkpoint had been written"]


@pytest.mark.slow
def test_ctrl_c_gets_one_line_from_two_processes_of_torchrun(tmp_path: Path, nursery: Nursery) -> None:
    flags = ("--no-probe", "--probe-every", 1, "--out", "out")
    with nursery.start([*TORCHRUN, PROGRAM, *flags], tmp_path) as process:
        process.until(lambda: "epoch 1/" in process.output, "the end of an epoch")
        process.send(signal.SIGINT)
        process.wait()
    (told,) = process.told
    assert re.fullmatch(
        r"error: stopped by SIGINT after step \d+, saved in out/checkpoint.pt: continue with --resume", told
    )
    assert states(tmp_path / "out")[0]["step"] >= 10


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make this process believe that it is one of several."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


@pytest.mark.parametrize("kind", ["digits", "images"])
def test_the_ranks_rows_make_up_the_batches_of_one_process(
    kind: str, jpegs: Path, of: Callable[[int, int], None]
) -> None:
    def batches() -> list[Batch]:
        rows = distributed.shard(8)
        data = (
            load_digits(8, 0, True, rows) if kind == "digits" else load(jpegs, image_size=32, batch_size=8, rows=rows)
        )
        return list(islice(data.pairs.batches(1), 4))

    whole, parts = batches(), []
    for rank in range(3):
        of(rank, 3)
        parts.append(batches())
    for batch, *shards in zip(whole, *parts, strict=True):
        assert sorted(len(shard.views[0]) for shard in shards) == [2, 3, 3]
        for view in (0, 1):
            assert torch.equal(torch.cat([shard.views[view] for shard in shards]), batch.views[view])
        assert sum(shard.unreadable for shard in shards) == batch.unreadable


def test_every_process_needs_a_pair(run: Callable[..., tuple[int, str, str]], of: Callable[[int, int], None]) -> None:
    of(0, 4)
    assert run("--batch-size", 3) == (2, "", "error: --batch-size 3: expected 4 or more, an image for each process\n")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "expected a GPU for each process, 1 found for 2 or more"),
        ("cuda:0", "expected cpu or cuda for several processes; each has a GPU of its own"),
        ("mps", "expected cpu or cuda for several processes; each has a GPU of its own"),
    ],
)
def test_processes_do_not_share_a_gpu(
    device: str, message: str, of: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    of(1, 2)
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UsageError, match=f"--device {device}: {message}"):
        distributed.own_device(torch.device(device))


def test_each_process_takes_the_gpu_of_its_number(
    of: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    of(1, 2)
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert chosen == [1]


@pytest.mark.parametrize("what", ["flags", "checkpoint"])
def test_ranks_that_do_not_agree_are_told(what: str, tmp_path: Path, nursery: Nursery) -> None:
    """As after a torchrun that was typed by hand on each machine, or with checkpoints on their own disks."""
    for machine, steps in {"0": 2, "1": 3}.items():
        (tmp_path / machine).mkdir()
        if what == "checkpoint":
            flags = (*FLAGS, "--no-probe", "--limit-steps", steps, "--out", "old")
            assert launch(nursery, tmp_path / machine, 1, CHANGED, '[["quick"]]', *flags).status == 0
    program = tmp_path / "program.py"
    own = '["--seed", rank]' if what == "flags" else '["--resume", "old"]'
    program.write_text(f"""
import os, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import imagenet_pretrain as program

rank = os.environ["RANK"]
os.chdir(rank)
sys.exit(program.main(sys.argv[1:] + {own}))
""")
    done = launch(nursery, tmp_path, 2, program, *FLAGS, "--no-probe", "--out", tmp_path / "new")
    assert done.status != 0
    differs = {
        "flags": "seed: 0 on rank 0, 1 on rank 1",
        "checkpoint": "the checkpoint: step 2 of old/checkpoint.pt on",
    }
    (told,) = done.told
    assert told.startswith(f"error: the processes do not agree about {differs[what]}")
    assert not (tmp_path / "new").exists()
