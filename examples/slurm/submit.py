"""Pretrain under SLURM with submitit, on several machines and for longer than a job may last.

    python examples/slurm/submit.py --nodes 2 --gpus-per-node 8 --hours 24 -- --data /data/imagenet --preset paper
    python examples/slurm/submit.py --local --gpus-per-node 0 --tasks 2 -- --epochs 5    # a try, on this machine's CPU

All that follows ``--`` goes to the program, which runs in one task per GPU. Two minutes before the time is over and
when the job is preempted, the run saves the step it is in, and the job goes back into the queue. The results are in
runs/NAME, the logs in runs/NAME/jobs: the same command continues there after a failure or scancel, and --name begins
another run. Partitions and accounts can also be set by sbatch's own variables, such as SBATCH_ACCOUNT.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from barlow_recipes.errors import UsageError, first_line, require  # noqa: E402

NOTICE = 120  # seconds from the signal to the end of the time
MOST_TIMEOUTS = 1000  # jobs of one run; submitit's own limit is 3
SAVED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1)}  # what the program ends with after a signal


class Pretraining:
    """What submitit calls in each task of the job, and again when the job is back from the queue."""

    def __init__(self, examples: Path, flags: list[str]) -> None:
        self.examples = str(examples)
        self.flags = flags

    def __call__(self) -> None:
        """Run the program, which handles the signals while it trains; then let submitit requeue the job, once."""
        import submitit

        requeue = signal.getsignal(signal.SIGUSR1)
        job = submitit.JobEnvironment()
        # Each process finds its own GPU among all of the machine's.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.path.insert(0, self.examples)
        from imagenet_pretrain import main

        try:
            status = main(self.flags)
        except SystemExit as end:  # of a rank that leaves the message to another
            if end.code not in SAVED:
                raise
            status = end.code
        if status in SAVED:
            if job.global_rank > 0:
                sys.exit(0)  # without a result; a failure would end rank 0
            if status == 128 + signal.SIGUSR1 or runs_on(job.job_id):
                requeue(signal.SIGUSR1, None)
            sys.exit(status)
        if status != 0:
            raise RuntimeError(f"the program ended with status {status}")

    def checkpoint(self) -> object:
        """The same again: ``--resume`` is among the flags, and its checkpoint is written."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def runs_on(job_id: str) -> bool:
    """Whether a job that got SIGTERM must requeue itself.

    That is so within the grace time of a preemption. After scancel it would begin again, and without grace SLURM
    requeues it.
    """
    if os.environ["SUBMITIT_EXECUTOR"] != "slurm":
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "RUNNING"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the job, and those of the program.

    Raises:
        UsageError: a flag is unknown or has a bad value.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1, help="machines [%(default)s]")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of each machine [%(default)s]", metavar="GPUS")
    parser.add_argument("--tasks", type=int, help="processes on each machine [one per GPU, or one]")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="cores of each process [%(default)s]", metavar="N")
    parser.add_argument("--hours", type=float, default=24, help="after which the job must be requeued [%(default)s]")
    parser.add_argument("--partition", help="of the cluster [its default]")
    parser.add_argument("--name", default="barlow-twins", help="of the job and its folder in runs/ [%(default)s]")
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM, and wait for the end")
    job = parser.parse_args(argv[:end])
    job.tasks = max(1, job.gpus_per_node) if job.tasks is None else job.tasks
    for name, least in {"nodes": 1, "gpus_per_node": 0, "tasks": 1, "cpus_per_task": 1, "hours": 0.1}.items():
        if not getattr(job, name) >= least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(job, name)}: expected {least} or more")
    if job.local and job.nodes > 1:
        raise UsageError(f"--nodes {job.nodes}: --local has one, this machine")
    return job, argv[end + 1 :]


def main(argv: list[str] | None = None) -> int:
    """Submit the job. 0: done; 2: a mistake in its use, or SLURM refuses; 1: with ``--local``, the job has failed."""
    # The program knows it, unlike submitit's own SIGUSR2. submitit reads it as it is imported, the job's environment
    # has it from here.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        job, flags = read_flags(sys.argv[1:] if argv is None else argv)
        submitit = require("submitit", "a job")
        out = Path("runs") / job.name
        executor = submitit.AutoExecutor(
            out / "jobs",
            cluster="local" if job.local else "slurm",
            local_max_num_timeout=MOST_TIMEOUTS,
            slurm_max_num_timeout=MOST_TIMEOUTS,
        )
        executor.update_parameters(
            name=job.name,
            nodes=job.nodes,
            tasks_per_node=job.tasks,
            gpus_per_node=job.gpus_per_node,
            cpus_per_task=job.cpus_per_task,
            timeout_min=round(60 * job.hours),
            slurm_partition=job.partition,
            slurm_signal_delay_s=NOTICE,
            # A process that fails ends the others, which might wait for it. srun does not take the cores from sbatch.
            slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={job.cpus_per_task}"],
            slurm_additional_parameters={"requeue": True},
        )
        submitted = executor.submit(Pretraining(EXAMPLES, ["--out", str(out), *flags, "--resume"]))
    except (UsageError, OSError, RuntimeError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    print(f"job {submitted.job_id}; its output: {submitted.paths.stdout}", flush=True)
    if not job.local:
        return 0
    submitted.wait()
    if all(
        task.paths.result_pickle.exists() and task.exception() is None for task in map(submitted.task, range(job.tasks))
    ):
        return 0
    print(f"error: the job has failed, see {submitted.paths.stderr}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
