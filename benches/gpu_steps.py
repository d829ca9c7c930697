"""``make gpu``: all that needs a GPU, in under eight minutes, with the Python at hand and nothing installed.

The laws of tests/ through both backends on the GPU, tests/gpu, compute-sanitizer where it is found, and gpu.py. Every
step is run, whatever became of the one before; the last lines say which failed. What is missing here is said.

    PYTHONPATH=. python3 benches/gpu_steps.py
    PYTHONPATH=. python3 benches/gpu_steps.py --only bench
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 470
BENCH_SECONDS = 230  # kept for the benches, whatever the steps before them take
WRAP_UP_SECONDS = 30  # the benches finish the cell in hand
NEEDED = ("torch", "pytest", "hypothesis")
WELCOME = ("triton", "lightly", "pytest-timeout", "pytest-xdist")


class Step(NamedTuple):
    """A command, and the seconds after which it is ended and has failed."""

    name: str
    command: list[str]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()


class Outcome(NamedTuple):
    """What became of a step."""

    name: str
    failed: bool
    what: str


def tests(*arguments: str) -> list[str]:
    """pytest without what only the packages of the development environment understand."""
    workers = min(6, (os.cpu_count() or 1) // 2)
    spread = [f"--numprocesses={workers}"] if workers > 1 and find_spec("xdist") else []
    options = ["-o", "addopts=", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    limit = ["--timeout=60"] if find_spec("pytest_timeout") else []  # a kernel that hangs is named
    return [sys.executable, "-m", "pytest", *options, *spread, *limit, *arguments]


def laws(backend: str) -> list[str]:
    """The laws, at the tolerances of float32 and float64."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_laws_*.py"))
    return tests(*files, "tests/test_gradients.py", "--device=cuda", f"--backend={backend}")


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def steps() -> tuple[list[Step], list[str]]:
    """What is done here, and what is not, with the reason."""
    done, absent = [], []
    if find_spec("triton"):
        done.append(Step("laws, Triton", laws("triton"), 110))
    else:
        absent.append("laws, Triton: triton is not installed")
    done.append(Step("laws, eager", laws("eager"), 80))
    done.append(Step("tests/gpu", tests("tests/gpu"), 120))
    watcher = sanitizer()
    if watcher is None or not find_spec("triton"):
        absent.append(f"sanitizer: {'triton' if watcher else 'compute-sanitizer'} is not installed")
    else:
        for tool in ("memcheck", "racecheck"):
            # torch and triton ask the driver things that it answers with an error: no fault of a kernel.
            watch = [watcher, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
            command = [*watch, sys.executable, "tests/gpu/run_sanitizer.py"]
            alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),) if tool == "memcheck" else ()
            done.append(Step(f"sanitizer, {tool}", command, 60, alone))
    done.append(Step("bench", [sys.executable, "benches/gpu.py"], BENCH_SECONDS + WRAP_UP_SECONDS))
    return done, absent


def run(step: Step, end: float) -> Outcome:
    """Run a step until it is done, its time is up, or only the time of the benches is left."""
    left = end - time.monotonic() - (0 if step.name == "bench" else BENCH_SECONDS)
    seconds = min(step.seconds, left)
    if seconds < 5:
        return Outcome(step.name, True, f"NOT DONE: no time was left. {_again(step)}")
    command = step.command
    if step.name == "bench":
        command = [*command, "--budget", f"{seconds - WRAP_UP_SECONDS:.0f}"]
    print(f"\n=== {step.name}\n{' '.join(command)}", flush=True)
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path} | dict(step.environment)
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            cut = f" {_again(step)}" if seconds < step.seconds else ""
            return Outcome(step.name, True, f"FAILED: not done after {seconds:.0f} s.{cut}")
    what = "passed" if code == 0 else f"FAILED with exit status {code}"
    return Outcome(step.name, code != 0, f"{what}, {time.monotonic() - start:.0f} s")


def _again(step: Step) -> str:
    """How to give a step the time that the others took."""
    return f"By itself: make gpu GPU_FLAGS='--only \"{step.name}\" --seconds {BENCH_SECONDS + step.seconds}'"


def obstacle() -> str | None:
    """Why nothing can be done here, or None."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}. Name a Python that has them: make gpu PYTHON=…"
    import torch

    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU here, so nothing can be measured or tested on one; "
            "python benches/gpu.py --model-only writes the predictions."
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU; see the head of this file.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps whose name begins with one of these")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of them (default: {SECONDS})")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    reason = obstacle()
    if reason is not None:
        sys.exit(f"make gpu: {reason}")
    import torch

    from machine import environment  # needs torch, which may not be here

    print(json.dumps(environment(*WELCOME, device=torch.device("cuda"))), flush=True)
    wanted, absent = steps()
    if arguments.only:
        wanted = [step for step in wanted if step.name.startswith(tuple(arguments.only))]
    outcomes = [run(step, end) for step in wanted]
    print("\n=== summary")
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.what}")
    for line in absent:
        print(f"{line}; left out")
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
