"""Processes that live as long as the test run and form a fresh gloo group for every job.

A job is a module-level function; it runs on every rank of a group of W processes, and its results come back in the
order of the ranks. A job that raises, on any rank, fails the test with all tracebacks; so does one that takes too long.
"""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LARGEST = 4
# What a collective waits for its peers, and a job for all of its ranks.
GROUP_TIMEOUT, JOB_TIMEOUT = 80.0, 200.0


class Died(Exception):
    """Stands in the place of the result of a process that ended within its job."""


class Pool:
    """``run(job, world_size, *args)``; close() at the end. The processes have imported ``modules`` when they start."""

    def __init__(self, *modules: str) -> None:
        self._modules = ["torch._dynamo", "barlow_loss", *modules]
        self._processes: list[tuple[Any, Any]] = []  # process, connection
        self._folder = tempfile.TemporaryDirectory(prefix="barlow-loss-stores-")
        self._jobs = 0

    def run(
        self,
        job: Callable[..., Any],
        world_size: int,
        *args: Any,
        job_timeout: float = JOB_TIMEOUT,
        group_timeout: float = GROUP_TIMEOUT,
        strict: bool = True,
        debug: str = "DETAIL",
        deaths: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """What ``job(*args, **settings)`` returns on every rank.

        Args:
            job: called with ``args`` on every rank, inside the group.
            world_size: W, up to 4.
            *args: for the job.
            job_timeout: seconds for the whole job; a job beyond it fails, and its processes are killed.
            group_timeout: seconds that a collective waits.
            strict: a FutureWarning or DeprecationWarning is an error.
            debug: TORCH_DISTRIBUTED_DEBUG of the group.
            deaths: a process may die; its result is then :class:`Died`.
            **settings: for the job.
        """
        self._start()
        self._jobs += 1
        store = str(Path(self._folder.name) / f"job-{self._jobs}")
        request = pickle.dumps((job, world_size, store, group_timeout, strict, debug, args, settings))
        members = self._processes[:world_size]
        for _, connection in members:
            connection.send_bytes(request)
        deadline = time.monotonic() + job_timeout
        answers = [self._receive(connection, deadline) for _, connection in members]
        if any(not done or isinstance(answer, Died) for done, answer in answers):
            self.close()  # a rank that failed may have left the others in the middle of a collective
        broken = [
            f"rank {rank} of {world_size}:\n{answer}"
            for rank, (done, answer) in enumerate(answers)
            if not (done and (deaths or not isinstance(answer, Died)))
        ]
        if broken:
            raise AssertionError("\n".join(broken))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        for process, connection in self._processes:
            connection.close()
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        if self._processes:
            return
        # Forks of one process that has imported torch: a start costs milliseconds instead of seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._modules)
        for rank in range(LARGEST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._processes.append((process, here))

    @staticmethod
    def _receive(connection: Any, deadline: float) -> tuple[bool, Any]:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            return False, "no answer in time"
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return True, Died("the process ended")


def _serve(rank: int, connection: Any) -> None:
    torch.set_num_threads(1)
    while True:
        gc.freeze()  # or every job ends with a search of what was imported: 88 of its 90 ms per rank
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            answer = True, _run(rank, *pickle.loads(request))
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


def _run(
    rank: int,
    job: Callable[..., Any],
    world_size: int,
    store: str,
    timeout: float,
    strict: bool,
    debug: str,
    args: tuple[Any, ...],
    settings: dict[str, Any],
) -> Any:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = debug
    dist.set_debug_level_from_env()
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning) if strict else ():
            warnings.simplefilter("error", category)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            dist.barrier()  # a rank that is done at once must not leave while another still connects to it
            return job(*args, **settings)
        finally:
            gc.collect()  # DDP's reducer lies in a cycle, and ends badly after its group
            dist.destroy_process_group()
