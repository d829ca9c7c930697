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
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import imagenet_pretrain
from barlow_recipes import checkpoint
from barlow_recipes.errors import Aborted, Interrupted, Stopped, UsageError, require
from barlow_recipes.fashion_mnist import INSTALLED, NAME, PACKAGE, is_fashion_mnist
from barlow_recipes.flags import Flags, at_least, find_device, own_cores
from barlow_recipes.lock import locked
from barlow_recipes.program import exit_status, start
from barlow_recipes.reporting import BACKBONE, replacing
from barlow_recipes.small import methods, plots, tables
from barlow_recipes.small.data import COLUMNS, DIGITS, FASHION, MOST, TASKS, load
from barlow_recipes.small.jobs import Job, Result, run_jobs

EPOCHS = {DIGITS: 25, FASHION: 2}
QUICK: dict[str, Any] = {"epochs": {DIGITS: 5}, "seeds": 2, "effort": 0.1}
RESULTS, TABLE, PICTURE = "results.json", "table.md", "accuracies.png"
DEFAULT = Path("runs/evaluation")
README, COMMITTED = Path("README.md"), Path("docs/evaluation.json")


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how: the flags, complete."""

    source: str  # of Fashion-MNIST
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    seeds: int
    epochs: dict[str, int]  # of pretraining, by the data
    effort: float  # a factor of the steps of training with labels
    processes: int
    threads: int
    device: str
    out: Path
    resume: bool
    overwrite: bool

    def shaping(self) -> dict[str, Any]:
        """What decides about the numbers."""
        chosen = ("tasks", "columns", "seeds", "epochs", "effort")
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name in chosen}))

    def folder(self, data: str, seed: int) -> Path:
        """Of a pretraining run."""
        return self.out / f"{data}-seed-{seed}"


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(argv))


def run(argv: list[str] | None) -> None:
    flags = vars(_parser().parse_args(argv))
    if flags["check"] or flags["update"]:
        put_into_readme(flags["update"] or flags["check"], flags["readme"], check=bool(flags["check"]))
        return
    for module, reason in (("matplotlib", "the picture"), ("sklearn", "the digits"), ("tqdm", "the progress bar")):
        require(module, reason)
    plan = read_plan(flags)
    evaluate(plan)


def _parser() -> Flags:
    parser = Flags(__doc__ or "")
    positive = partial(at_least, 1, int)
    parser.add("--data", str, f"the folder of Fashion-MNIST [{INSTALLED}]", metavar="DIR")
    parser.add("--only", str, f"some of {', '.join(TASKS)} [all]", nargs="+", metavar="TASK")
    columns = ", ".join(COLUMNS).replace("%", "%%")  # for argparse
    parser.add("--labels", str, f"some of {columns}: labels a class, or a share [all]", nargs="+")
    parser.add("--seeds", positive, "encoders, draws of labels, runs of training [3, or 2]", metavar="N")
    epochs = f"of pretraining, on either data [{EPOCHS[DIGITS]} on {DIGITS}, {EPOCHS[FASHION]} on {FASHION}]"
    parser.add("--epochs", positive, epochs)
    effort = "a factor of the steps of training with labels, which make up half of the time [1]"
    parser.add("--effort", partial(at_least, 0.0, float), effort)
    parser.add("--processes", positive, "that work at the same time and share the cores [one for each core]")
    parser.add("--device", str, "cpu, cuda, cuda:1, ...", default="cpu")
    parser.add("--out", Path, f"folder for the results [{DEFAULT}, numbered if taken]")
    parser.switch(
        "--quick", "the digits alone, two seeds, a few epochs and steps, under a minute: to see that it works"
    )
    parser.switch("--overwrite", "replace the results in that folder")
    parser.switch("--resume", "keep the parts that are done in that folder, or in the newest, and go on")
    add = partial(parser.add, nargs="?", const=COMMITTED, metavar="FILE")
    add("--update", Path, f"run nothing: put the table of these results [{COMMITTED}] into README.md")
    add("--check", Path, f"run nothing: fail if README.md has not the table of these results [{COMMITTED}]")
    parser.add("--readme", Path, "where the table goes", default=README)
    return parser


def read_plan(flags: Mapping[str, Any]) -> Plan:
    """Check the flags.

    Raises:
        UsageError: one has a bad value, or the data that it needs are not there.
    """
    for flag, known in (("only", TASKS), ("labels", COLUMNS)):
        for value in flags[flag] or ():
            if value not in known:
                raise UsageError(f"--{flag} {value}: expected some of {', '.join(known)}")
    if flags["resume"] and flags["overwrite"]:
        raise UsageError("--resume: expected it without --overwrite, which begins anew")
    source = flags["data"] or NAME
    if flags["data"] and not is_fashion_mnist(flags["data"]):
        raise UsageError(f"--data {flags['data']}: expected a folder with the four files of Fashion-MNIST")
    there = Path(source).exists() or INSTALLED.is_dir()
    wanted = flags["only"] or (("digits",) if flags["quick"] else tuple(TASKS))
    tasks = tuple(name for name in TASKS if name in wanted and (there or not needs_fashion(name)))
    if missing := [name for name in wanted if name not in tasks]:
        remedy = f"apt install {PACKAGE}, or give the folder with its four files to --data"
        if flags["only"]:
            raise UsageError(f"--only {missing[0]}: Fashion-MNIST is not in {INSTALLED}: {remedy}")
        print(f"note: without {', '.join(missing)}: Fashion-MNIST is not in {INSTALLED}: {remedy}")
    columns = tuple(column for column in COLUMNS if column in (flags["labels"] or COLUMNS))
    if not any(column in TASKS[task].columns for task in tasks for column in columns):
        raise UsageError(f"--labels {' '.join(columns)}: expected some of the columns of {', '.join(tasks)}")
    epochs = QUICK["epochs"] if flags["quick"] else EPOCHS
    pretrained_on = {TASKS[name].pretrained_on for name in tasks}
    epochs = {name: flags["epochs"] or epochs.get(name, EPOCHS[name]) for name in EPOCHS if name in pretrained_on}
    seeds = flags["seeds"] or (QUICK["seeds"] if flags["quick"] else 3)
    effort = (QUICK["effort"] if flags["quick"] else 1.0) if flags["effort"] is None else flags["effort"]
    device = find_device(flags["device"])
    processes = min(flags["processes"] or (own_cores() if device.type == "cpu" else 1), seeds * len(epochs))
    return Plan(
        source=source,
        tasks=tasks,
        columns=columns,
        seeds=seeds,
        epochs=epochs,
        effort=effort,
        processes=processes,
        threads=max(1, own_cores() // processes),
        device=str(device),
        out=flags["out"] or default_folder(resume=flags["resume"], overwrite=flags["overwrite"]),
        resume=flags["resume"],
        overwrite=flags["overwrite"],
    )


def default_folder(*, resume: bool, overwrite: bool) -> Path:
    """A new one; the newest to resume; the first to overwrite."""
    folders = [DEFAULT, *(DEFAULT.with_name(f"{DEFAULT.name}-{number}") for number in range(2, 1000))]
    taken = [*takewhile(Path.exists, folders)]
    if resume or overwrite:
        return taken[-1] if resume and taken else DEFAULT
    return folders[len(taken)]


def needs_fashion(task: str) -> bool:
    return FASHION in (TASKS[task].data, TASKS[task].pretrained_on)


def evaluate(plan: Plan) -> None:
    """Do the jobs, and write the results after each of them."""
    started = time.perf_counter()
    results = begin(plan)
    jobs = plan_jobs(plan)
    left = [job for job in jobs if job.name not in results["jobs"]]
    before = results["seconds"]
    print(
        f"{len(plan.tasks)} tasks, {plan.seeds} seeds, {len(left)} parts in {plan.processes} processes; "
        f"results go to {plan.out}"
    )

    def done(job: Job, found: Result) -> None:
        results["rows"] += found.pop("rows", [])
        results["jobs"][job.name] = found
        results["seconds"] = before + time.perf_counter() - started
        write(plan.out, results)
        count = f"{len(results['jobs'])}/{len(jobs)}"
        print(f"[{time.perf_counter() - started:4.0f} s] {count:>5} {job.told}: {found['seconds']:.0f} s")

    with locked(plan.out), ended_by_sigterm():
        try:
            run_jobs(
                jobs,
                processes=plan.processes,
                threads=plan.threads,
                logs=plan.out,
                done=done,
                already=results["jobs"],
            )
        except KeyboardInterrupt:
            kept = f"{len(results['jobs'])} of {len(jobs)} parts are kept in {plan.out}: continue with --resume"
            raise Interrupted(f"interrupted; {kept}") from None
    results["complete"] = True
    write(plan.out, results)
    text = tables.markdown(results)
    with replacing(plan.out / TABLE) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    plots.draw_accuracies(plan.out / PICTURE, results)
    print(f"\n{text}\n\nThe pretrained encoder, in points:\n{tables.margins(results['rows'])}")
    print(f"\n{results['seconds']:.0f} seconds. Results: {plan.out}")


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


def begin(plan: Plan) -> Result:
    """What there is already, or nothing, in a folder that is ours.

    Raises:
        UsageError: the folder holds other results, or cannot be written.
    """
    path = plan.out / RESULTS
    if plan.resume and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        checkpoint.check_settings(path, results["settings"], plan.shaping())
        return results | {"environment": environment(plan)}
    if path.exists() and not plan.overwrite:
        raise UsageError(f"--out {plan.out}: holds other results. Choose another folder, --overwrite or --resume")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {plan.out}: cannot be written ({error.strerror or error})") from None
    results = {"settings": plan.shaping(), "environment": environment(plan), "data": sizes(plan)}
    results |= {"complete": False, "seconds": 0.0, "jobs": {}, "rows": []}
    write(plan.out, results)
    return results


def write(out: Path, results: Result) -> None:
    with replacing(out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def environment(plan: Plan) -> Result:
    device = torch.device(plan.device)
    packages = {name: sys.modules[name].__version__ for name in ("torch", "sklearn", "numpy") if name in sys.modules}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": plan.processes,
        "threads": plan.threads,
        "system": platform.platform(),
        "cores": own_cores(),
        "versions": {"python": platform.python_version()} | packages,
    }


def sizes(plan: Plan) -> dict[str, dict[str, int]]:
    """How many images each data set has to learn from, with labels at most, and to test with."""
    found = {}
    for name in {TASKS[task].data: None for task in plan.tasks}:
        data = load(name, plan.source)
        found[name] = {"train": len(data.train.labels), MOST: len(data.bank), "test": len(data.test.labels)}
    return found


def plan_jobs(plan: Plan) -> list[Job]:
    """Pretraining first, the longest ahead; then what needs it, and what does not."""
    common = {"source": plan.source, "device": plan.device}
    encoders, probes, trained = [], [], []
    for data in sorted(plan.epochs, key=[FASHION, DIGITS].index):
        for seed in range(plan.seeds):
            arguments = {"data": data, "seed": seed, "epochs": plan.epochs[data], "out": str(plan.folder(data, seed))}
            arguments |= common | {"resume": plan.resume}
            encoders.append(
                Job(f"{data}/pretraining/{seed}", pretrain, arguments, told=f"pretraining on {data}, seed {seed}")
            )
    for name in plan.tasks:
        task = TASKS[name]
        for seed in range(plan.seeds):
            before = (f"{task.pretrained_on}/pretraining/{seed}",)
            weights = str(plan.folder(task.pretrained_on, seed) / BACKBONE)
            shared = common | {"task": name, "seed": seed}
            columns = [column for column in task.columns if column in plan.columns]
            arguments = shared | {"weights": weights, "columns": columns}
            told = f"probes, {task.title}, seed {seed}"
            probes.append(Job(f"{name}/probes/{seed}", methods.probe, arguments, before, told))
            for method, labels in ((methods.SCRATCH, task.trained), (methods.FINE_TUNED, task.fine_tuned)):
                for column in (column for column in labels if column in plan.columns):
                    scratch = method == methods.SCRATCH
                    arguments = shared | {
                        "weights": None if scratch else weights,
                        "column": column,
                        "effort": plan.effort,
                    }
                    told = f"{method}, {task.title}, {tables.TITLES[column]}, seed {seed}"
                    job = Job(
                        f"{name}/{method}/{column}/{seed}",
                        methods.supervise,
                        arguments,
                        () if scratch else before,
                        told,
                    )
                    trained.append(job)
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
