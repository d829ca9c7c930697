"""Measure what pretraining is worth on the data that need no download: scikit-learn's digits and Fashion-MNIST.

    python examples/evaluate_small.py                          # all, three seeds: a quarter of an hour on two cores
    python examples/evaluate_small.py --quick                  # the digits alone, a few epochs: under a minute
    python examples/evaluate_small.py --only fashion-mnist --labels 10 --epochs 6 --seeds 2

For every seed an encoder is pretrained on each data set, and measured there and on the other one: by its nearest
neighbours and by linear classifiers with few and many labels, beside raw pixels, the untrained encoder and the same
encoder trained from scratch with the same labels. The test images serve the final numbers alone.

The output folder gets ``results.json`` with every single accuracy, ``table.md`` and ``accuracies.png``, and for every
encoder the folder that examples/imagenet_pretrain.py writes.
"""

import json
import re
import signal
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

import imagenet_pretrain
from barlow_recipes import checkpoint, command_line, folders
from barlow_recipes.command_line import Device, Positive, Real, optional_value, own_cores
from barlow_recipes.errors import Aborted, Interrupted, UsageError, require
from barlow_recipes.fashion_mnist import INSTALLED, NAME, PACKAGE, is_fashion_mnist
from barlow_recipes.looking import versions
from barlow_recipes.outputs import BACKBONE, RESULTS, replacing
from barlow_recipes.program import exit_status, start
from barlow_recipes.small import methods, tables
from barlow_recipes.small.data import COLUMNS, DIGITS, FASHION, MOST, TASKS, load
from barlow_recipes.small.jobs import Job, Result, run_jobs

EPOCHS = {DIGITS: 25, FASHION: 2}
QUICK = {"epochs": 5, "seeds": 2, "effort": 0.1}
BEGIN, END = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"  # of the table in README.md
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

    @property
    def epochs_of(self) -> dict[str, int]:
        """Of pretraining, by the data."""
        pretrained_on = {TASKS[name].pretrained_on for name in self.only}
        return {name: self.epochs or epochs for name, epochs in EPOCHS.items() if name in pretrained_on}

    def shaping(self) -> dict[str, Any]:
        """What decides about the numbers."""
        numbers = {"seeds": self.seeds, "epochs": self.epochs_of, "effort": self.effort}
        return {"tasks": list(self.only), "columns": list(self.labels)} | numbers


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(command_line.read(Settings, argv, __doc__ or "")))


def run(settings: Settings) -> None:
    if path := settings.update or settings.check:
        put_into_readme(path, settings.readme, check=settings.update is None)
        return
    for module, reason in (("matplotlib", "the picture"), ("sklearn", "the digits"), ("tqdm", "the progress bar")):
        require(module, reason)
    evaluate(completed(settings))


def completed(settings: Settings) -> Settings:
    """With every flag that is not given.

    Raises:
        UsageError: a flag has a bad value, or the data that it needs are not there.
    """
    if settings.resume and settings.overwrite:
        raise UsageError("--resume: expected it without --overwrite, which begins anew")
    if settings.data and not is_fashion_mnist(settings.data):
        raise UsageError(f"--data {settings.data}: expected a folder with the four files of Fashion-MNIST")
    there = settings.data or INSTALLED.is_dir() or Path(NAME).exists()
    wanted: tuple[str, ...] = settings.only or ((DIGITS,) if settings.quick else tuple(TASKS))
    tasks = tuple(name for name in TASKS if name in wanted and (there or name == DIGITS))
    if missing := [name for name in wanted if name not in tasks]:
        absent = f"Fashion-MNIST is not in {INSTALLED}: apt install {PACKAGE}, or give its folder to --data"
        if settings.only:
            raise UsageError(f"--only {missing[0]}: {absent}")
        print(f"note: without {', '.join(missing)}: {absent}")
    columns = tuple(column for column in COLUMNS if column in (settings.labels or COLUMNS))
    if not any(column in TASKS[task].columns for task in tasks for column in columns):
        raise UsageError(f"--labels {' '.join(columns)}: expected some of the columns of {', '.join(tasks)}")
    device = command_line.find_device(settings.device)
    found: dict[str, Any] = {"data": settings.data or NAME, "only": tasks, "labels": columns, "device": device}
    found |= {"seeds": 3, "effort": 1.0} | (QUICK if settings.quick else {})
    found |= {name: value for name in ("seeds", "epochs", "effort") if (value := getattr(settings, name)) is not None}
    full = replace(settings, **found)
    processes = settings.processes or (own_cores() if device.type == "cpu" else 1)
    return replace(full, processes=min(processes, found["seeds"] * len(full.epochs_of)))


def evaluate(settings: Settings) -> None:
    """Do the jobs, and write the results after each of them."""
    started, default = time.perf_counter(), Path("runs/evaluation")
    known = [settings.out] if settings.out else folders.numbered(default)
    earlier = [path for folder in known if settings.resume and (path := folder / RESULTS).exists()]
    resumed = earlier[-1] if earlier else None
    out = folders.make_output_folder(settings.out, default, overwrite=settings.overwrite, resumed=resumed)
    threads = max(1, own_cores() // settings.processes)
    with folders.locked(out):
        results = begin(settings, threads, resumed)
        write(out, results)
        planned, before = plan_jobs(settings, out), results["seconds"]
        jobs = [job for job in planned if job.name not in results["jobs"]]
        size = f"{len(settings.only)} tasks, {settings.seeds} seeds, {len(jobs)} parts"
        print(f"{size} in {settings.processes} processes; results go to {out}")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the program as Ctrl-C does
        try:
            with closing(run_jobs(jobs, settings.processes, threads, logs=out)) as done:
                for name, found in done:
                    results["rows"] += found.pop("rows", [])
                    results["jobs"][name] = found
                    seconds = time.perf_counter() - started
                    write(out, results | {"seconds": before + seconds})
                    count = f"{len(results['jobs'])}/{len(planned)}"
                    print(f"[{seconds:4.0f} s] {count:>5} {name}: {found['seconds']:.0f} s")
        except KeyboardInterrupt:
            kept = f"{len(results['jobs'])} of {len(planned)} parts are kept in {out}: continue with --resume"
            raise Interrupted(f"interrupted; {kept}") from None
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        results |= {"seconds": before + time.perf_counter() - started, "complete": True}
        write(out, results)
    text = tables.markdown(results)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    tables.draw_accuracies(out / "accuracies.png", results)
    print(f"\n{text}\n\n{results['seconds']:.0f} seconds. Results: {out}")


def begin(settings: Settings, threads: int, resumed: Path | None) -> Result:
    """What there is already, or nothing.

    Raises:
        UsageError: other settings made what is there.
    """
    device = settings.device
    environment = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": settings.processes,
        "threads": threads,
        "cores": own_cores(),
        "versions": versions(),
    }
    if resumed:
        results = json.loads(resumed.read_text(encoding="utf-8"))
        checkpoint.check_settings(resumed, results["settings"], settings.shaping())
        return results | {"environment": environment}
    sizes = {}
    for name in dict.fromkeys(TASKS[task].data for task in settings.only):
        data = load(name, settings.data)
        sizes[name] = {"train": len(data.train.labels), MOST: len(data.bank), "test": len(data.test.labels)}
    results = {"settings": settings.shaping(), "environment": environment, "data": sizes}
    return results | {"complete": False, "seconds": 0.0, "jobs": {}, "rows": []}


def write(out: Path, results: Result) -> None:
    with replacing(out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def plan_jobs(settings: Settings, out: Path) -> list[Job]:
    """Pretraining first, the longest ahead; then what does not need it."""
    common = {"source": settings.data, "device": str(settings.device)}
    encoders, probes, trained = [], [], []
    for data, seed in product((FASHION, DIGITS), range(settings.seeds)):
        if epochs := settings.epochs_of.get(data):
            given = {"data": data, "seed": seed, "epochs": epochs, "out": str(out / f"{data}-seed-{seed}")}
            given |= common | {"resume": settings.resume}
            encoders.append(Job(f"{data}/pretraining/{seed}", pretrain, given))
    for name, seed in product(settings.only, range(settings.seeds)):
        task = TASKS[name]
        weights = str(out / f"{task.pretrained_on}-seed-{seed}" / BACKBONE)
        given = common | {"task": name, "seed": seed}
        asked = given | {"weights": weights, "columns": [each for each in task.columns if each in settings.labels]}
        probes.append(Job(f"{name}/probes/{seed}", methods.probe, asked, waits=True))
        supervised = [(methods.SCRATCH, None, column) for column in task.trained]
        supervised += [(methods.FINE_TUNED, weights, column) for column in task.fine_tuned]
        for method, file, column in (each for each in supervised if each[-1] in settings.labels):
            asked = given | {"weights": file, "column": column, "effort": settings.effort}
            trained.append(Job(f"{name}/{method}/{column}/{seed}", methods.supervise, asked, waits=bool(file)))
    return encoders + probes + trained[::-1]


def pretrain(data: str, source: str, seed: int, epochs: int, out: str, device: str, resume: bool) -> Result:
    """Run examples/imagenet_pretrain.py, without its evaluations, which are this program's.

    Raises:
        Aborted: it has failed, or a signal has stopped it.
    """
    flags = ["--data", source] if data == FASHION else []
    flags += ["--seed", str(seed), "--epochs", str(epochs), "--no-probe", "--no-evaluation", "--device", device]
    if status := imagenet_pretrain.main([*flags, "--out", out, "--resume" if resume else "--overwrite"]):
        raise Aborted(f"exit status {status}")
    return {}


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
    wanted, found = re.subn(f"(?s)(?<={BEGIN}\n).*?(?=\n{END})", lambda _: tables.markdown(results), now)
    if not found:
        raise UsageError(f"--readme {readme}: expected the markers {BEGIN} and {END}, one after the other")
    if not check:
        readme.write_text(wanted, encoding="utf-8")
    elif now != wanted:
        raise UsageError(f"{readme} has not the table of {path}: run python examples/evaluate_small.py --update {path}")


if __name__ == "__main__":
    start(main)
