"""Measure what pretraining is worth on the data that need no download: scikit-learn's digits and Fashion-MNIST.

    python examples/evaluate_small.py                          # all, three seeds: a quarter of an hour on two cores
    python examples/evaluate_small.py --quick                  # the digits alone, a few epochs: under a minute
    python examples/evaluate_small.py --only fashion-mnist --labels 10 --epochs 6 --seeds 2

For every seed an encoder is pretrained on each data set, and measured there and on the other one: by its nearest
neighbours and by linear classifiers with few and many labels, beside raw pixels, the untrained encoder and the same
encoder trained from scratch with the same labels. The test images serve the final numbers alone.

The output folder gets ``results.json`` with every single accuracy, ``table.md`` and ``accuracies.png``, and for every
encoder a folder of its own, as examples/imagenet_pretrain.py writes it.

``--check`` and ``--update`` compare README.md with the results in a file, or put the table there.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

import imagenet_pretrain
from barlow_recipes import checkpoint, command_line, folders
from barlow_recipes.command_line import Device, Positive, Real, optional_value, own_cores
from barlow_recipes.errors import Aborted, Interrupted, Stopped, UsageError, require
from barlow_recipes.fashion_mnist import INSTALLED, NAME, PACKAGE, is_fashion_mnist
from barlow_recipes.program import exit_status, start
from barlow_recipes.reporting import BACKBONE, RESULTS, replacing
from barlow_recipes.small import methods, tables
from barlow_recipes.small.data import COLUMNS, DIGITS, FASHION, MOST, TASKS, load
from barlow_recipes.small.jobs import Job, Result, run_jobs

EPOCHS = {DIGITS: 25, FASHION: 2}
QUICK = {"epochs": 5, "seeds": 2, "effort": 0.1}
COMMITTED = Path("docs/evaluation.json")
File = Annotated[Path | None, optional_value(Path, COMMITTED)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    data: str | None = None
    "the folder of Fashion-MNIST; without it where Debian's package has it"
    only: tuple[Literal["digits", "fashion-mnist", "fashion-mnist-to-digits", "digits-to-fashion-mnist"], ...] = ()
    "some of the tasks; without it all"
    labels: tuple[Literal["knn", "1", "10", "1%", "10%", "most"], ...] = ()
    "labels of each class, or a share of all; without it all of these"
    seeds: Positive | None = None
    "encoders, draws of labels, runs of training [3, or 2 with --quick]"
    epochs: Positive | None = None
    "of pretraining, on either data [25 on digits, 2 on fashion-mnist]"
    effort: Real | None = None
    "a factor of the steps of training with labels, which make up half of the time [1]"
    processes: Positive | None = None
    "that work at the same time and share the cores; without it one for each core"
    device: Device = field(default_factory=lambda: torch.device("cpu"))
    "cpu, cuda, cuda:1, ..."
    out: Path | None = None
    "folder for the results; without it runs/evaluation, numbered if taken"
    quick: bool = False
    "the digits alone, two seeds, a few epochs and steps, under a minute: to see that it works"
    overwrite: bool = False
    "replace the results in that folder"
    resume: bool = False
    "keep the parts that are done in that folder, or in the newest, and go on"
    update: File = None
    "run nothing: put the table of these results, docs/evaluation.json if none, into README.md"
    check: File = None
    "run nothing: fail if README.md has not the table of these results"
    readme: Path = Path("README.md")
    "where the table goes"


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how."""

    source: str  # of Fashion-MNIST
    tasks: list[str]
    columns: list[str]
    seeds: int
    epochs: dict[str, int]  # of pretraining, by the data
    effort: float
    processes: int
    threads: int
    device: torch.device

    def shaping(self) -> dict[str, Any]:
        """What decides about the numbers."""
        return {name: getattr(self, name) for name in ("tasks", "columns", "seeds", "epochs", "effort")}


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(command_line.read(Settings, argv, __doc__ or "")))


def run(settings: Settings) -> None:
    if path := settings.update or settings.check:
        put_into_readme(path, settings.readme, check=settings.update is None)
        return
    for module, reason in (("matplotlib", "the picture"), ("sklearn", "the digits"), ("tqdm", "the progress bar")):
        require(module, reason)
    evaluate(settings, make_plan(settings))


def make_plan(settings: Settings) -> Plan:
    """Fill in what is not given.

    Raises:
        UsageError: a flag has a bad value, or the data that it needs are not there.
    """
    if settings.resume and settings.overwrite:
        raise UsageError("--resume: expected it without --overwrite, which begins anew")
    if settings.data and not is_fashion_mnist(settings.data):
        raise UsageError(f"--data {settings.data}: expected a folder with the four files of Fashion-MNIST")
    there = settings.data or INSTALLED.is_dir() or Path(NAME).exists()
    wanted = settings.only or ((DIGITS,) if settings.quick else tuple(TASKS))
    tasks = [name for name in TASKS if name in wanted and (there or name == DIGITS)]
    if missing := [name for name in wanted if name not in tasks]:
        remedy = f"apt install {PACKAGE}, or give the folder with its four files to --data"
        if settings.only:
            raise UsageError(f"--only {missing[0]}: Fashion-MNIST is not in {INSTALLED}: {remedy}")
        print(f"note: without {', '.join(missing)}: Fashion-MNIST is not in {INSTALLED}: {remedy}")
    columns = [column for column in COLUMNS if column in (settings.labels or COLUMNS)]
    if not any(column in TASKS[task].columns for task in tasks for column in columns):
        raise UsageError(f"--labels {' '.join(columns)}: expected some of the columns of {', '.join(tasks)}")
    usual = {"epochs": None, "seeds": 3, "effort": 1.0} | (QUICK if settings.quick else {})
    epochs, seeds, effort = (
        usual[name] if getattr(settings, name) is None else getattr(settings, name)
        for name in ("epochs", "seeds", "effort")
    )
    pretrained_on = {TASKS[name].pretrained_on for name in tasks}
    device = command_line.find_device(settings.device)
    processes = settings.processes or (own_cores() if device.type == "cpu" else 1)
    processes = min(processes, seeds * len(pretrained_on))
    return Plan(
        source=settings.data or NAME,
        tasks=tasks,
        columns=columns,
        seeds=seeds,
        epochs={name: epochs or EPOCHS[name] for name in EPOCHS if name in pretrained_on},
        effort=effort,
        processes=processes,
        threads=max(1, own_cores() // processes),
        device=device,
    )


def evaluate(settings: Settings, plan: Plan) -> None:
    """Do the jobs, and write the results after each of them."""
    started = time.perf_counter()
    default = Path("runs/evaluation")
    known = [settings.out] if settings.out else [*folders.numbered(default)]
    earlier = [path for folder in known if settings.resume and (path := folder / RESULTS).exists()]
    resumed = earlier[-1] if earlier else None
    out = folders.make_output_folder(settings.out, default, overwrite=settings.overwrite, resumed=resumed)
    with folders.locked(out), ended_by_sigterm():
        results = begin(plan, resumed)
        write(out, results)
        jobs = plan_jobs(plan, out, resume=settings.resume)
        left, before = sum(job.name not in results["jobs"] for job in jobs), results["seconds"]
        print(
            f"{len(plan.tasks)} tasks, {plan.seeds} seeds, {left} parts in {plan.processes} processes; "
            f"results go to {out}"
        )

        def done(job: Job, found: Result) -> None:
            results["rows"] += found.pop("rows", [])
            results["jobs"][job.name] = found
            results["seconds"] = before + time.perf_counter() - started
            write(out, results)
            count = f"{len(results['jobs'])}/{len(jobs)}"
            print(f"[{time.perf_counter() - started:4.0f} s] {count:>5} {job.told}: {found['seconds']:.0f} s")

        try:
            asked = {"processes": plan.processes, "threads": plan.threads, "already": [*results["jobs"]]}
            run_jobs(jobs, logs=out, done=done, **asked)
        except KeyboardInterrupt:
            kept = f"{len(results['jobs'])} of {len(jobs)} parts are kept in {out}: continue with --resume"
            raise Interrupted(f"interrupted; {kept}") from None
        write(out, results | {"complete": True})
    text = tables.markdown(results)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    tables.draw_accuracies(out / "accuracies.png", results)
    print(f"\n{text}\n\n{results['seconds']:.0f} seconds. Results: {out}")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: with its processes, and with what is done kept."""

    def end(number: int, _: object) -> None:
        raise Stopped("stopped by SIGTERM: continue with --resume", number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def begin(plan: Plan, resumed: Path | None) -> Result:
    """What there is already, or nothing.

    Raises:
        UsageError: other settings made what is there.
    """
    packages = {name: sys.modules[name].__version__ for name in ("torch", "sklearn", "numpy") if name in sys.modules}
    environment = {
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else plan.device.type,
        "processes": plan.processes,
        "threads": plan.threads,
        "system": platform.platform(),
        "cores": own_cores(),
        "versions": {"python": platform.python_version()} | packages,
    }
    if resumed:
        results = json.loads(resumed.read_text(encoding="utf-8"))
        checkpoint.check_settings(resumed, results["settings"], plan.shaping())
        return results | {"environment": environment}
    sizes = {}
    for name in {TASKS[task].data: None for task in plan.tasks}:
        data = load(name, plan.source)
        sizes[name] = {"train": len(data.train.labels), MOST: len(data.bank), "test": len(data.test.labels)}
    results = {"settings": plan.shaping(), "environment": environment, "data": sizes}
    return results | {"complete": False, "seconds": 0.0, "jobs": {}, "rows": []}


def write(out: Path, results: Result) -> None:
    with replacing(out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def plan_jobs(plan: Plan, out: Path, *, resume: bool) -> list[Job]:
    """Pretraining first, the longest ahead; then what needs it, and what does not."""
    common = {"source": plan.source, "device": str(plan.device)}
    encoders, probes, trained = [], [], []

    def folder(data: str, seed: int) -> Path:
        return out / f"{data}-seed-{seed}"

    for data in sorted(plan.epochs, key=[FASHION, DIGITS].index):
        for seed in range(plan.seeds):
            given = {"data": data, "seed": seed, "epochs": plan.epochs[data], "out": str(folder(data, seed))}
            told = f"pretraining on {data}, seed {seed}"
            encoders.append(Job(f"{data}/pretraining/{seed}", pretrain, given | common | {"resume": resume}, told=told))
    for name, seed in ((name, seed) for name in plan.tasks for seed in range(plan.seeds)):
        task = TASKS[name]
        before, weights = (
            (f"{task.pretrained_on}/pretraining/{seed}",),
            str(folder(task.pretrained_on, seed) / BACKBONE),
        )
        given = common | {"task": name, "seed": seed}
        columns = [column for column in task.columns if column in plan.columns]
        told = f"probes, {task.title}, seed {seed}"
        arguments = given | {"weights": weights, "columns": columns}
        probes.append(Job(f"{name}/probes/{seed}", methods.probe, arguments, before, told))
        for method, needed, labels in (
            (methods.SCRATCH, (), task.trained),
            (methods.FINE_TUNED, before, task.fine_tuned),
        ):
            for column in (column for column in labels if column in plan.columns):
                arguments = given | {"weights": weights if needed else None, "column": column, "effort": plan.effort}
                told = f"{method}, {task.title}, {tables.TITLES[column]}, seed {seed}"
                trained.append(Job(f"{name}/{method}/{column}/{seed}", methods.supervise, arguments, needed, told))
    return encoders + probes + trained[::-1]


def pretrain(data: str, source: str, seed: int, epochs: int, out: str, device: str, resume: bool) -> Result:
    """Run examples/imagenet_pretrain.py, without its evaluations, which are this program's.

    Returns:
        What it took.

    Raises:
        Aborted: it has failed.
    """
    found: Result = {}
    flags = ["--data", source] if data == FASHION else []
    flags += ["--seed", str(seed), "--epochs", str(epochs), "--no-probe", "--no-evaluation", "--device", device]
    with methods.timed(found):
        status = imagenet_pretrain.main([*flags, "--out", out, "--resume" if resume else "--overwrite"])
    if status > 128:  # a signal has stopped it: this process is to end
        os._exit(status)
    if status:
        raise Aborted(f"exit status {status}")
    return found


def put_into_readme(path: Path, readme: Path, *, check: bool) -> None:
    """Put the table into README.md, or see that it is there.

    Raises:
        UsageError: a file is missing, or the table in README.md is another one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        now = readme.read_text(encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}, {readme}: cannot be read ({error})") from None
    wanted = tables.insert(readme, now, tables.markdown(results))
    if not check:
        readme.write_text(wanted, encoding="utf-8")
    elif now != wanted:
        raise UsageError(f"{readme} has not the table of {path}: run python examples/evaluate_small.py --update {path}")


if __name__ == "__main__":
    start(main)
