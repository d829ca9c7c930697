"""Fork runs of the program from a process that has imported it: a start costs milliseconds instead of seconds.

It reads requests from its input, a JSON object a line, and answers each in a line: {"poll": pid} by the exit status, or
null; everything else by the pid of a new process. At the end of its input it ends all that it has started.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import start

IMPORTED_LATER = (
    "PIL.Image", "jinja2", "matplotlib.pyplot", "sklearn.datasets", "sklearn.linear_model", "torch._dynamo",
    "torch.distributed.run", "torchvision.datasets.folder", "torchvision.transforms.v2", "tqdm", "pretraining.report",
)  # fmt: skip


def children(pid: int) -> list[int]:
    """Of a process, oldest first. It reads /proc, which Linux has."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    below = children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill_tree(child)


def serve() -> dict[str, Any] | None:
    """Answer until the input ends. In a child it returns the request that the child is to fulfil."""
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            alive.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        kill_tree(pid)
    return None


def fulfil(request: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, path in ((0, os.devnull), (1, request["output"]), (2, request["errors"])):
        source = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    start.begin(request["changes"], request["program"], request["flags"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the one who asks
    for module in IMPORTED_LATER:
        importlib.import_module(module)
    gc.freeze()  # or every run would search these modules for garbage, and end a second later
    if request := serve():
        fulfil(request)
