"""Parts of a program, done by a few processes of their own."""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from barlow_recipes.errors import Aborted, first_line, require

Result = dict[str, Any]
IDLE = 60  # seconds, after which a process ends: also where the program has been killed, and could tell nobody


class Job(NamedTuple):
    """A function of plain values that returns plain values; one that waits needs what the others do."""

    name: str
    function: Callable[..., Result]
    arguments: Mapping[str, Any]
    waits: bool = False


def run_jobs(
    jobs: Sequence[Job], processes: int, threads: int, logs: Path
) -> Generator[tuple[str, Result], None, None]:
    """Do all jobs, in the order of the list, but after all others those that wait: their names, results and seconds.

    Each of the processes has so many threads of torch, and a file in ``logs`` for what it prints.

    Raises:
        Aborted: a job has failed or a process has died. However it ends, no process is left.
    """
    loky: Any = require("joblib.externals.loky", "the work in several processes")  # it sees when a process dies
    pool = loky.ProcessPoolExecutor(processes, timeout=IDLE, initializer=_begin, initargs=(threads, logs))
    try:
        for waits in (False, True):
            submitted = [pool.submit(_do, job) for job in jobs if job.waits == waits]
            for ready in futures.as_completed(submitted):
                yield ready.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise Aborted("a process has died: is there memory enough?") from None
    finally:
        pool.shutdown(kill_workers=True)


def _begin(threads: int, logs: Path) -> None:
    """In a process of its own, before its first job."""
    number = multiprocessing.current_process().name.rpartition("-")[2]
    sys.stdout = sys.stderr = (logs / f"process-{number}.log").open("a", encoding="utf-8", buffering=1)
    torch.set_num_threads(threads)


def _do(job: Job) -> tuple[str, Result]:
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        found = job.function(**job.arguments)
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return job.name, found | took
    except Exception as error:
        traceback.print_exc()
        raise Aborted(f"{job.name}: {type(error).__name__}: {first_line(error)} (see {sys.stderr.name})") from None
