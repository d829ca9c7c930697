"""Fork programs from a process that has imported what they need: a start costs milliseconds instead of seconds.

    python tests/nursery.py MODULE ...

It imports the modules and reads requests from its input, a JSON object a line. It answers each in a line: {"poll": pid}
by the exit status, or null; everything else by the pid of a new process, which then runs the program of the request as
the interpreter does. It ends with its input.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def serve() -> dict[str, Any] | None:
    """Answer until the input ends. In a child it returns the request that the child is to fulfil."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def fulfil(request: dict[str, Any]) -> None:
    """Run ["program.py", ...], ["-m", "module", ...] or ["-c", "code", ...] in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, path in ((0, os.devnull), (1, request["output"]), (2, request["errors"])):
        source = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    run(*request["arguments"])


def run(kind: str, *rest: str) -> None:
    """As ``python KIND REST`` does."""
    if kind == "-c":
        code, *rest = rest
        sys.path[0], sys.argv = "", [kind, *rest]
        exec(code, {"__name__": "__main__"})
    elif kind == "-m":
        sys.path[0], sys.argv = str(Path.cwd()), [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(kind).parent.absolute()), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the one who asks
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # or every run would search these modules for garbage, and end a second later
    if request := serve():
        fulfil(request)
