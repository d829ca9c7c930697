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
    """A command, the seconds after which it is ended and has failed, and what the environment has besides."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str]


def tests(name: str, seconds: float, *arguments: str) -> Step:
    """pytest without what only the packages of the development environment understand."""
    workers = min(6, (os.cpu_count() or 1) // 2)
    spread = [f"--numprocesses={workers}"] if workers > 1 and find_spec("xdist") else []
    options = ["-o", "addopts=", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    limit = ["--timeout=60"] if find_spec("pytest_timeout") else []  # a kernel that hangs is named
    return Step(name, [sys.executable, "-m", "pytest", *options, *spread, *limit, *arguments], seconds, {})


def steps() -> tuple[list[Step], list[str]]:
    """What is done here, and what is not, with the reason."""
    laws = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_laws_*.py"))]
    laws += ["tests/test_gradients.py", "--device=cuda"]  # at the tolerances of float32 and float64
    done = [
        tests("laws, Triton", 110, *laws, "--backend=triton"),
        tests("laws, eager", 80, *laws, "--backend=eager"),
        tests("tests/gpu", 120, "tests/gpu"),
    ]
    homes = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda") if home]
    watcher = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *homes]))
    for tool in ("memcheck", "racecheck"):
        # torch and triton ask the driver things that it answers with an error: no fault of a kernel.
        watch = [watcher or "", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        done.append(Step(f"sanitizer, {tool}", [*watch, sys.executable, "tests/gpu/run_sanitizer.py"], 60, alone))
    done.append(Step("bench", [sys.executable, "benches/gpu.py"], BENCH_SECONDS + WRAP_UP_SECONDS, {}))
    absent = {}
    if not watcher:
        absent["sanitizer"] = "compute-sanitizer is not installed"
    if not find_spec("triton"):
        absent |= dict.fromkeys(("laws, Triton", "sanitizer"), "triton is not installed")
    missing = [f"{name}: {reason}" for name, reason in absent.items()]
    return [step for step in done if not step.name.startswith(tuple(absent))], missing


def run(step: Step, end: float) -> str:
    """What becomes of a step that runs until it is done, its time is up, or only the time of the benches is left."""
    seconds = min(step.seconds, end - time.monotonic() - (0 if step.name == "bench" else BENCH_SECONDS))
    again = f"By itself: make gpu GPU_FLAGS='--only \"{step.name}\" --seconds {BENCH_SECONDS + step.seconds}'"
    if seconds < 5:
        return f"FAILED: not done, no time was left. {again}"
    budget = ["--budget", f"{seconds - WRAP_UP_SECONDS:.0f}"] if step.name == "bench" else []
    command = [*step.command, *budget]
    print(f"\n=== {step.name}\n{' '.join(command)}", flush=True)
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path} | step.environment
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            return f"FAILED: not done after {seconds:.0f} s.{f' {again}' if seconds < step.seconds else ''}"
    return f"{f'FAILED with exit status {code}' if code else 'passed'}, {time.monotonic() - start:.0f} s"


def main() -> None:
    """Runs the steps, and says what became of them."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU; see the head of this file.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps whose name begins with one of these")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of them (default: {SECONDS})")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"make gpu: {sys.executable} lacks {', '.join(missing)}. Name a Python that has them: PYTHON=…")
    import torch

    from machine import environment  # needs torch, which may not be here

    if not torch.cuda.is_available():
        sys.exit(
            f"make gpu: torch {torch.__version__} finds no GPU here, so nothing can be measured or tested on one; "
            "python benches/model.py prints the predictions."
        )
    print(json.dumps(environment(*WELCOME, device=torch.device("cuda"))), flush=True)
    wanted, absent = steps()
    outcomes = {
        step.name: run(step, end)
        for step in wanted
        if not arguments.only or step.name.startswith(tuple(arguments.only))
    }
    print("\n=== summary")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    for line in absent:
        print(f"{line}; left out")
    sys.exit(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
