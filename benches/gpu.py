"""Times the loss on a GPU against the textbook formula and lightly, beside the model of gpu_model.py.

Six contenders take turns, round by round, each step timed by events around it with the L2 cache overwritten before
(gpu_clock.py); a ratio is taken within a round, and medians over the rounds are reported with their quartiles. The
answers of all are compared with float64 on the same views in the same run, before anything is timed; an answer further
away than gpu_contenders.py allows is reported and not timed. So is what ran out of memory, or is not installed.

What is timed is forward and backward, down to the gradients of both views. Settings: "fp32" (views and products in
float32, precision "highest") and "bf16 autocast" (bfloat16 views, as a linear layer under autocast gives them, and the
loss under ``torch.autocast``). Working memory is the rise of the allocated memory during a step, beyond the views.

FLOP and byte model, the floor and the predictions: gpu_model.py. The ceilings (copy, 8192³ products, launches) are
measured in the same run, and the algorithm's own products alone in the same rounds.

    python benches/gpu.py                      the whole grid into results/gpu.json, gpu.md and gpu.png
    python benches/gpu.py --grid 256x8192 --settings "bf16 autocast" --out /tmp/gpu
    python benches/gpu.py --model-only         no GPU: results/gpu.md with the predictions, its measured columns empty
    python benches/gpu.py --check              fails if results/gpu.md is not what the figures, or the model, say
    python benches/gpu.py --smoke              no GPU: runs this program on tiny CPU tensors; its figures mean nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import barlow_loss
import gpu_table
from gpu_clock import Clock, Gpu, Host
from gpu_contenders import OURS, allowed, build, missing, truth, views
from gpu_model import AUTOCAST, COMPILED, CONTENDERS, EAGER, GRAPH, SETTINGS, TRITON, Setting
from machine import RESULTS
from timing import interleave, ratios, spread
from workload import Answer, Cell, errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_contenders import Turn

    Record = dict[str, Any]

# The cells of the stated goals first, in case the budget does not last.
ORDER = tuple(map(Cell.parse, ["2048x8192", "256x8192", "256x2048", "1024x8192", "4096x8192", "2048x32768"]))
SMOKE_GRID = (Cell(16, 64), Cell(24, 96))
COMPILE_SECONDS = 20  # kept in reserve for a compilation; without it the compiled contender is left out
CELL_SECONDS = 4


def measure(cell: Cell, setting: Setting, clock: Clock, rounds: int, deadline: float) -> Record:
    """The record of one cell under one setting."""
    torch.compiler.reset()  # generated code is for one shape and dtype
    z1, z2 = views(cell, setting, clock.device)
    right = truth(z1, z2)
    records: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name in CONTENDERS:
        if name == COMPILED and time.monotonic() + COMPILE_SECONDS > deadline:
            records[name] = {"left_out": "the budget was spent"}
            continue
        records[name], turn = _prepare(name, cell, setting, clock, right, z1, z2)
        if turn is not None:
            turns[name] = turn
    del right
    timed: dict[str, Callable[[], object]] = {**turns, "products": _products(cell, setting, clock)}
    for again in timed.values():
        again()
    times = interleave(timed, rounds, CELL_SECONDS, clock.cold)
    for over in {TRITON, GRAPH, EAGER} & set(turns):
        for name, ratio in ratios({name: times[name] for name in turns}, over).items():
            records[name].setdefault("times", {})[over] = ratio
    for name, turn in turns.items():
        records[name]["seconds"] = spread(times[name])
        calls = max(3, math.ceil(0.02 / records[name]["seconds"]["median"]))
        records[name]["back_to_back"] = statistics.median(clock.back_to_back(turn, calls) for _ in range(3))
    return {
        "n": cell.n,
        "d": cell.d,
        "setting": setting.name,
        "rounds": len(times["products"]),
        "contenders": records,
        "products": spread(times["products"]),
    }


def _prepare(
    name: str, cell: Cell, setting: Setting, clock: Clock, right: Answer, *z: torch.Tensor
) -> tuple[Record, Turn | None]:
    """What is known of a contender before it is timed, and its turn if it is to be."""
    reason = missing(name, clock.device)
    if reason is not None:
        return {"left_out": reason}, None
    try:
        turn = build(name, cell, setting, z[0], z[1])
        found = errors(turn(), right)
        peak, gradients = clock.peak(turn)
    except torch.OutOfMemoryError:
        _release(clock.device)
        return {"failed": "out of memory"}, None
    except Exception as error:  # a contender that breaks must not take the others with it
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}, None
    record: Record = {
        "loss_error": found.loss,
        "gradient_error": found.gradient,
        "peak_bytes": peak,
        "gradient_bytes": gradients,
    }
    limit = allowed(name, setting)
    if not (found.loss <= limit.loss and found.gradient <= limit.gradient):
        return record | {"failed": f"wrong: errors of at most {limit.loss:.1e} and {limit.gradient:.1e} expected"}, None
    return record, turn


def _products(cell: Cell, setting: Setting, clock: Clock) -> Callable[[], object]:
    """The four products of the dual alone, in the dtype that ours takes."""
    dtype = torch.float16 if setting == AUTOCAST and clock.device.type != "cpu" else torch.float32
    u1, u2 = (torch.randn(cell.n, cell.d, device=clock.device).mul_(cell.n**-0.5).to(dtype) for _ in range(2))
    k1, k2 = torch.mm(u1, u1.T), torch.mm(u2, u2.T)
    return lambda: [torch.mm(u1, u1.T), torch.mm(u2, u2.T), torch.mm(k2, u1), torch.mm(k1, u2)]


def environment(clock: Clock) -> Record:
    """The machine and the versions that the figures belong to."""
    packages = ("torch", "triton", "lightly", "matplotlib")
    return {
        "device": _device_name(clock.device),
        "driver": _driver(clock.device),
        "runtime": torch.version.hip or torch.version.cuda,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {"barlow-loss": barlow_loss.__version__, **{name: _version(name) for name in packages}},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]


def run(clock: Clock, arguments: argparse.Namespace) -> Record:
    """All cells, written after each, so that what was measured is kept whatever comes next."""
    deadline = time.monotonic() + arguments.budget
    results: Record = {"environment": environment(clock), "ceilings": clock.ceilings(), "smoke": arguments.smoke}
    results |= {"cells": [], "left_out": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for setting in arguments.settings:
        for cell in arguments.grid:
            reason = _measure_into(results, cell, setting, clock, arguments.rounds, deadline)
            if reason is not None:
                results["left_out"].append(f"{cell}, {setting.name}: {reason}")
            print(results["left_out"][-1] if reason else gpu_table.line(results["cells"][-1]), flush=True)
            (arguments.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
            _release(clock.device)
    return results


def _measure_into(results: Record, cell: Cell, setting: Setting, clock: Clock, rounds: int, end: float) -> str | None:
    """Why there is no record of this cell, or None."""
    if time.monotonic() > end:
        return "left out, the budget was spent"
    try:
        results["cells"].append(measure(cell, setting, clock, rounds, end))
    except torch.OutOfMemoryError:
        return "left out, the memory does not hold the views and their float64 answer"
    return None


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def failures(results: Record) -> list[str]:
    """What of ours did not run, or was wrong."""
    return [
        f"{record['n']}×{record['d']}, {record['setting']}, {name}: {record['contenders'][name]['failed']}"
        for record in results["cells"]
        for name in OURS
        if "failed" in record["contenders"].get(name, {})
    ]


def accelerator() -> torch.device | None:
    """The GPU, if there is one."""
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            return torch.device(kind, 0)
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the loss on a GPU; see the head of this file.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--model-only", action="store_true", help="write gpu.md with predictions; measure nothing")
    mode.add_argument("--check", action="store_true", help="write nothing; fail if gpu.md is out of date")
    mode.add_argument("--smoke", action="store_true", help="run on tiny CPU tensors; the figures mean nothing")
    parser.add_argument("--grid", nargs="+", type=Cell.parse, metavar="NxD", help="cells (default: all of them)")
    names = {setting.name: setting for setting in SETTINGS}
    parser.add_argument("--settings", nargs="+", choices=names, default=list(names))
    parser.add_argument("--rounds", type=int, default=7, help="at most so many rounds for a cell (default: 7)")
    parser.add_argument("--budget", type=float, default=230, help="seconds; then no further cell (default: 230)")
    parser.add_argument("--out", type=Path, help=f"folder for gpu.json, gpu.md and gpu.png (default: {RESULTS.name}/)")
    arguments = parser.parse_args()
    arguments.settings = [names[name] for name in arguments.settings]
    arguments.grid = arguments.grid or (SMOKE_GRID if arguments.smoke else ORDER)
    if arguments.smoke and arguments.out is not None and arguments.out.resolve() == RESULTS.resolve():
        parser.error(f"--smoke: its figures mean nothing and do not belong into {RESULTS}")
    arguments.out = arguments.out or (Path(tempfile.mkdtemp(prefix="barlow-loss-")) if arguments.smoke else RESULTS)
    return arguments


def _check(folder: Path) -> None:
    page = folder / "gpu.md"
    if not page.exists() or page.read_text(encoding="utf-8") != gpu_table.markdown(stored(folder)):
        sys.exit(
            f"{page} is not what the figures or the model say: run python benches/gpu.py --model-only, or make gpu"
        )


def stored(folder: Path) -> Record | None:
    """The figures of a run, if one has been made."""
    path = folder / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    arguments = _arguments()
    if arguments.check:
        _check(arguments.out)
        return
    if arguments.model_only:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.md").write_text(gpu_table.markdown(stored(arguments.out)), encoding="utf-8")
        print(f"Written to {arguments.out / 'gpu.md'}")
        return
    device = accelerator()
    if device is None and not arguments.smoke:
        sys.exit("No GPU here that torch can use, so nothing can be measured. The predictions: gpu.py --model-only")
    warnings.filterwarnings("ignore", module="torch")  # about torch.compile's own insides
    clock: Clock = Host() if arguments.smoke or device is None else Gpu(device)
    results = run(clock, arguments)
    text = gpu_table.markdown(results)
    (arguments.out / "gpu.md").write_text(text, encoding="utf-8")
    drawn = gpu_table.plot(results, arguments.out / "gpu.png")
    print(f"\n{text}\nWritten to {arguments.out / 'gpu.json'}, gpu.md{' and gpu.png' if drawn else ''}")
    if not drawn:
        print("No plot: matplotlib is not installed.")
    wrong = failures(results)
    if wrong:
        sys.exit("Ours failed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
