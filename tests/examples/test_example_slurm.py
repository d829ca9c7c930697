"""Jobs that outlast their time: the batch script with stand-ins for SLURM's commands."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from outcomes import EXAMPLES, FILES, rows, states

from programs import Program, children, start, until

SLURM = EXAMPLES / "slurm"
FLAGS = ("--epochs", "2", "--batch-size", "64", "--projector", "64-64", "--no-probe")
STEPS = [1, 11, 21, 31, 41, 44]

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
    pytest.mark.skipif(shutil.which("bash") is None or not Path("/proc/self/stat").exists(), reason="needs Linux"),
]

COMMANDS = {
    # Each task on a machine of its own; the status is the highest, as srun's is.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for machine in 1 2; do MACHINE=$machine "$@" & tasks+=("$!"); done
        echo "${tasks[@]}" > tasks
        worst=0
        for task in "${tasks[@]}"; do
            status=0; wait "$task" || status=$?
            (( status > worst )) && worst=$status
        done
        exit "$worst"
    """,
    "scontrol": """
        case $1 in
            show) echo localhost; echo another ;;
            requeue) echo "$2" >> requeued ;;
        esac
    """,
}
# Ends with its first argument, or once it is told with its second.
TORCHRUN = """
    trap 'echo "$MACHINE" >> told; sleep 0.2; exit "${*: -2:1}"' USR1
    echo "$MACHINE" >> started
    [[ ${*: -3:1} == runs ]] || exit "${*: -3:1}"
    for _ in {1..1000}; do sleep 0.05; done
"""


def write_commands(folder: Path, commands: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def has_taken_steps(out: Path) -> bool:
    """A quarter of those that it has to take."""
    log = out / "metrics.jsonl"
    return log.exists() and '"step": 11,' in log.read_text()


def free_port_id() -> int:
    """A job's number whose port nobody uses."""
    for number in range(os.getpid() % 10000, 20000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + number % 10000)) != 0:
                return number
    raise AssertionError("no free port")


@dataclass
class Job:
    """The batch script, as SLURM starts it in the folder from which it was submitted."""

    folder: Path
    name: str = "job"

    def start(self, *flags: str, **commands: str) -> Program:
        (self.folder / "tasks").unlink(missing_ok=True)
        write_commands(self.folder / "bin", COMMANDS | commands)
        if not (self.folder / "examples").exists():
            (self.folder / "examples").symlink_to(EXAMPLES)
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        variables = {"SLURM_JOB_NODELIST": "localhost,another", "SLURM_NNODES": "2", "SLURM_JOB_NAME": self.name}
        variables |= {"SLURM_JOB_ID": str(free_port_id()), "PATH": path}
        return start(["bash", SLURM / "pretrain.sbatch", *flags], self.folder, **variables)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    @property
    def tasks(self) -> list[int]:
        return list(map(int, self.lines("tasks")))

    @property
    def out(self) -> Path:
        return self.folder / "runs" / self.name

    def has_started(self) -> bool:
        """Both machines' tasks, as far as catching signals."""
        return len(self.lines("started")) == 2 and all(map(catches_signals, self.tasks))


def catches_signals(process: int) -> bool:
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)


def send(number: signal.Signals, *processes: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def test_the_batch_script_is_well_formed() -> None:
    """SLURM reads its lines up to the first command."""
    script = SLURM / "pretrain.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    head = script.read_text().partition("\nset -euo pipefail\n")[0].splitlines()
    assert all(line.startswith("#") or not line for line in head)
    options = [line.removeprefix("#SBATCH --") for line in head if line.startswith("#SBATCH")]
    assert {"ntasks-per-node=1", "signal=USR1@120", "requeue", "open-mode=append"} <= set(options)
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, script], capture_output=True, text=True, check=False).stdout == ""


ENDS = {  # the signal and the machines that get it; torchrun's status without it and with it; the script's, requeued
    "failed": (None, "", (1, 0), (1, 0)),
    "failed in its use": (None, "", (2, 0), (2, 0)),
    "out of time": (signal.SIGUSR1, "12", ("runs", 1), (138, 1)),
    "preempted": (signal.SIGTERM, "12", ("runs", 1), (138, 1)),
    "one machine preempted": (signal.SIGTERM, "2", ("runs", 1), (138, 1)),
    "done, although out of time": (signal.SIGUSR1, "12", ("runs", 0), (0, 0)),
}


@pytest.mark.parametrize(("number", "machines", "torchrun", "expected"), ENDS.values(), ids=ENDS)
def test_only_a_job_that_got_a_signal_is_requeued(
    number: signal.Signals | None,
    machines: str,
    torchrun: tuple[object, int],
    expected: tuple[int, int],
    tmp_path: Path,
) -> None:
    """The script's part, with a stand-in for torchrun; one that fails ends the other, as srun sees to."""
    job = Job(tmp_path)
    with job.start(*map(str, torchrun), torchrun=TORCHRUN) as process:
        if number is not None:
            process.until(job.has_started, "its start")
            told = [task for machine, task in zip("12", job.tasks, strict=True) if machine in machines]
            for _ in range(3):
                send(number, *told)
            if len(told) == 1:
                process.until(lambda: job.lines("told"), "the signal")
                send(signal.SIGKILL, *children(job.tasks[0], recursive=True))
        assert (process.wait(), len(job.lines("requeued"))) == expected, process.output
    assert sorted(job.lines("told")) == list(machines)


def test_cancelling_ends_the_script_before_it_can_requeue(tmp_path: Path) -> None:
    """SLURM then sends SIGTERM to this shell as well as to the tasks."""
    job = Job(tmp_path)
    with job.start("runs", "1", torchrun=TORCHRUN) as process:
        process.until(job.has_started, "its start")
        send(signal.SIGTERM, process.pid, *job.tasks)
        assert process.wait() == -signal.SIGTERM
        until(lambda: len(job.lines("told")) == 2, "the end of the tasks")
    assert sorted(job.lines("told")) == ["1", "2"]
    assert job.lines("requeued") == []


@pytest.fixture(scope="module")
def preempted(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that was preempted after a quarter of its steps or more, and then ran to its end.

    SLURM may signal every process of a job, and does so twice at a preemption.
    """
    job = Job(tmp_path_factory.mktemp("preempted"))
    with job.start(*FLAGS) as process:
        process.until(lambda: has_taken_steps(job.out), "a quarter of the steps")
        for _ in range(2):
            send(signal.SIGTERM, *(number for task in job.tasks for number in (task, *children(task, recursive=True))))
            time.sleep(0.02)
        assert process.wait() == 138, process.output
    assert len(job.lines("requeued")) == 1
    assert "fp32 on cpu in 2 processes; results go to runs/job\n" in process.output
    (saved,) = states(job.out)
    assert 11 <= saved["step"] < 44  # type: ignore[operator]

    with job.start(*FLAGS) as process:
        assert process.wait() == 0, process.output
    assert f"continuing from runs/job/checkpoint.pt, after step {saved['step']}\n" in process.output
    return job


@pytest.mark.slow
def test_a_preempted_run_loses_no_step(preempted: Job) -> None:
    assert {path.name for path in preempted.out.iterdir()} == FILES
    assert [row["step"] for row in rows(preempted.out, "step")] == STEPS


@pytest.mark.slow
def test_a_run_that_has_ended_is_not_requeued(preempted: Job) -> None:
    assert len(preempted.lines("requeued")) == 1
