"""Parts of a program that need one another's results, done by a few processes of their own."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from barlow_recipes.errors import Aborted, first_line

Result = dict[str, Any]
PATIENCE = 20  # seconds that a process may take to end after it has been asked to


@dataclass(frozen=True)
class Job:
    """A function of plain values that returns plain values, in a module that another process can import."""

    name: str
    function: Callable[..., Result]
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()  # the names of jobs that come before
    told: str = field(default="", compare=False)  # in words


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection
    log: Path


def run_jobs(
    jobs: Iterable[Job],
    *,
    processes: int,
    threads: int,
    logs: Path,
    done: Callable[[Job, Result], None],
    already: Iterable[str] = (),
) -> None:
    """Do all jobs, each as soon as it can be, the first of the list first.

    Args:
        jobs: in the order of their importance: long ones first.
        processes: that work at the same time.
        threads: of torch in each of them.
        logs: the folder for what each of them prints.
        done: told of each job, in this process.
        already: the names of jobs that need not be done any more.

    Raises:
        Aborted: a job has failed or its process has died. However it ends, no process is left.
    """
    waiting, finished = [job for job in jobs if job.name not in (known := set(already))], known
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    workers = [_start(number, threads, logs) for number in range(1, min(processes, len(waiting)) + 1)]
    idle = [*workers]
    try:
        while waiting or busy:
            while idle and (job := next((job for job in waiting if finished.issuperset(job.needs)), None)):
                worker = idle.pop(0)
                waiting.remove(job)
                busy[worker.connection] = worker, job
                worker.connection.send((job.function, dict(job.arguments)))
            for ready in connection.wait(list(busy)):
                worker, job = busy.pop(ready)  # type: ignore[call-overload]
                done(job, _result(worker, job))
                finished.add(job.name)
                idle.append(worker)
    finally:
        _end(workers, [worker for worker, _ in busy.values()])


def _start(number: int, threads: int, logs: Path) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    log = logs / f"process-{number}.log"
    process = context.Process(target=_serve, args=(there, threads, log), daemon=True)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported there
    try:
        process.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    there.close()
    return _Worker(process, here, log)


def _result(worker: _Worker, job: Job) -> Result:
    try:
        failure, result = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(PATIENCE)
        code = worker.process.exitcode
        raise Aborted(
            f"{job.told or job.name}: its process has died (exit code {code}): is there memory enough?"
        ) from None
    if failure:
        raise Aborted(f"{job.told or job.name}: {failure} (all of it: {worker.log})")
    found: Result = result
    return found


def _end(workers: list[_Worker], busy: list[_Worker]) -> None:
    """Those without a job end by themselves; the others get a signal, which pretraining obeys with a checkpoint."""
    for worker in workers:
        worker.connection.close()
    for worker in busy:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(parent: Connection, threads: int, log: Path) -> None:
    """In a process of its own: do what comes, until nothing more comes."""
    _end_with_parent()
    torch.set_num_threads(threads)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        with contextlib.suppress(EOFError, KeyboardInterrupt, ConnectionError):  # the parent is gone, or is going
            while True:
                function, arguments = parent.recv()
                parent.send(_done(function, arguments))


def _done(function: Callable[..., Result], arguments: dict[str, Any]) -> tuple[str, Result]:
    """The failure, if there is one, and the result."""
    try:
        return "", function(**arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {first_line(error)}", {}


def _end_with_parent() -> None:
    """Also where the parent has been killed, and could tell nobody."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # pretraining saves

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
