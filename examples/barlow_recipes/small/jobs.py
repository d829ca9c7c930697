"""Parts of a program that need one another's results, done by a few processes of their own."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from barlow_recipes.errors import Aborted, first_line

Result = dict[str, Any]
PATIENCE = 20  # seconds that a process may take to end after it has been asked to
DEATH = "a process has died: is there memory enough?"


@dataclass(frozen=True)
class Job:
    """A function of plain values that returns plain values, in a module that another process can import."""

    name: str
    function: Callable[..., Result]
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()  # the names of jobs that come before


def run_jobs(
    jobs: Iterable[Job],
    processes: int,
    threads: int,
    *,
    logs: Path,
    done: Callable[[Job, Result], None],
    already: Iterable[str] = (),
) -> None:
    """Do all jobs, each when it can be, the first of the list first.

    Each of the processes has so many threads of torch, and a file in ``logs`` for what it prints. ``done`` is told of
    each job, in this process; what is ``already`` done, by its name, need not be done any more.

    Raises:
        Aborted: a job has failed or a process has died. However it ends, no process is left.
    """
    finished = set(already)
    waiting = [job for job in jobs if job.name not in finished]
    running: dict[futures.Future[Result], Job] = {}
    others, workers = {*multiprocessing.active_children()}, set[Any]()
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads, logs))
    try:
        while waiting or running:
            for job in [job for job in waiting if finished.issuperset(job.needs)]:
                waiting.remove(job)
                running[pool.submit(_do, job)] = job
            workers |= {*multiprocessing.active_children()} - others
            for ready in futures.wait(running, 1, futures.FIRST_COMPLETED).done:
                job = running.pop(ready)
                done(job, ready.result())
                finished.add(job.name)
            # Of a process that dies in its first job Python 3.11's pool may not hear.
            if any(worker.exitcode for worker in workers):
                raise Aborted(DEATH)
    except BaseException as error:
        workers |= {*multiprocessing.active_children()} - others
        for worker in workers:
            worker.terminate()  # pretraining obeys with a checkpoint
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()
        if isinstance(error, BrokenProcessPool):
            raise Aborted(DEATH) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int, logs: Path) -> None:
    """In a process of its own, before its first job."""
    number = multiprocessing.current_process().name.rpartition("-")[2]
    sys.stdout = sys.stderr = (logs / f"process-{number}.log").open("a", encoding="utf-8", buffering=1)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Also where it has been killed, and could tell nobody."""
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # pretraining saves


def _do(job: Job) -> Result:
    try:
        return job.function(**job.arguments)
    except Exception as error:
        traceback.print_exc()
        raise Aborted(
            f"{job.name}: {type(error).__name__}: {first_line(error)} (all of it: {sys.stderr.name})"
        ) from None
