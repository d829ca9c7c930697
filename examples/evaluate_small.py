"""Measure what pretraining is worth on the data that need no download: scikit-learn's digits and Fashion-MNIST.

    python examples/evaluate_small.py                          # all, three seeds: twenty minutes on two cores
    python examples/evaluate_small.py --quick                  # the digits alone, a few epochs: under a minute
    python examples/evaluate_small.py --only fashion-mnist --epochs 6 --seeds 2

For every seed an encoder is pretrained on each data set, with two views, and for as long with four and with two and
four local crops. It is measured there by its nearest neighbours and by linear classifiers with few and many labels,
beside raw pixels, the untrained encoder and the same encoder trained from scratch with the same labels. The test images
serve the final numbers alone.

The output folder gets ``results.json`` with every single accuracy, ``table.md``, what each part has printed, and for
every encoder the folder that examples/imagenet_pretrain.py writes.
"""

import json
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

import imagenet_pretrain
from barlow_recipes import command_line, folders, small
from barlow_recipes.command_line import Device, Positive, Real, optional_value, own_cores
from barlow_recipes.errors import Aborted, UsageError, require
from barlow_recipes.fashion_mnist import INSTALLED, PACKAGE, is_fashion_mnist
from barlow_recipes.metrics import read_rows
from barlow_recipes.outputs import BACKBONE, METRICS, RESULTS, replacing
from barlow_recipes.pages import put_into_pages
from barlow_recipes.program import exit_status, start
from barlow_recipes.reporting import versions
from barlow_recipes.small import DIGITS, FASHION, FOUR_VIEWS, LOCAL_CROPS, PRETRAINED, VIEWS

# Of pretraining. On either data all three take the same time, for a step with four views takes twice one with two, and
# with local crops 2.3 times on digits and 2.1 times on Fashion-MNIST (processor time, one core).
EPOCHS = {
    DIGITS: {PRETRAINED: 25, FOUR_VIEWS: 13, LOCAL_CROPS: 11},
    FASHION: {PRETRAINED: 2, FOUR_VIEWS: 1, LOCAL_CROPS: 1},
}
File = Annotated[Path | None, optional_value(Path, Path("docs/evaluation.json"))]
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    data: str = FASHION  # the folder of Fashion-MNIST; without it where Debian's package has it
    only: tuple[Literal["digits", "fashion-mnist"], ...] = ("digits", "fashion-mnist")  # one of the data sets
    seeds: Positive = 3  # encoders, draws of labels, runs of training
    # of pretraining with two views, on either data, and in proportion with more [25 on digits, 2 on fashion-mnist]
    epochs: Positive | None = None
    effort: Real = 1.0  # a factor of the steps of training with labels, which make up a quarter of the time
    processes: Positive | None = None  # that work at the same time and share the cores; without it one for each core
    device: Device = field(default_factory=lambda: torch.device("cpu"))  # cpu, cuda, cuda:1, ...
    out: Path | None = None  # folder for the results; without it runs/evaluation, numbered if taken
    quick: bool = False  # the digits alone, two seeds, a few epochs and steps, under a minute: to see that it works
    overwrite: bool = False  # replace the results in that folder
    update: File = None  # run nothing: put the table of these results, docs/evaluation.json if none, into the page
    check: File = None  # run nothing: fail if the page has not the table of these results
    page: Path = Path("docs/evaluation.md")  # where the table goes

    def must_match(self) -> dict[str, Any]:
        """What decides about the numbers."""
        epochs = {name: self.epochs_of(name, PRETRAINED) for name in self.only}
        return {"tasks": list(self.only), "seeds": self.seeds, "epochs": epochs, "effort": self.effort}

    def epochs_of(self, name: str, method: str) -> int:
        """In proportion to those with two views, which --epochs gives."""
        usual = EPOCHS[name]
        return max(1, round(usual[method] * (self.epochs or usual[PRETRAINED]) / usual[PRETRAINED]))


QUICK = Settings(quick=True, only=("digits",), seeds=2, epochs=5, effort=0.1)


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    """Check what can be checked before the work, and do it."""
    settings = command_line.read(Settings, argv, __doc__ or "", QUICK if "--quick" in argv else None)
    if path := settings.update or settings.check:
        command = f"python examples/evaluate_small.py --update {path}"
        put_into_pages(path, [settings.page], blocks, check=settings.update is None, command=command)
        return
    for module, reason in (("sklearn", "the digits"), ("tqdm", "the progress bar")):
        require(module, reason)
    given = settings.data != FASHION
    if given and not is_fashion_mnist(settings.data):
        raise UsageError(f"--data {settings.data}: expected a folder with the four files of Fashion-MNIST")
    if FASHION in settings.only and not (given or INSTALLED.is_dir() or Path(FASHION).exists()):
        remedy = f"apt install {PACKAGE}, give its folder to --data, or measure --only {DIGITS}"
        raise UsageError(f"--only {' '.join(settings.only)}: Fashion-MNIST is not in {INSTALLED}: {remedy}")
    evaluate(settings, command_line.find_device(settings.device))


def blocks(results: Result) -> dict[str, str]:
    return {"evaluation": small.markdown(results)}


def evaluate(settings: Settings, device: torch.device) -> None:
    """Do the parts, the longest first, and write the results."""
    out = folders.make_output_folder(settings.out, Path("runs/evaluation"), overwrite=settings.overwrite, resumed=None)
    wanted = [(name, seed) for name in reversed(settings.only) for seed in range(settings.seeds)]
    processes = min(settings.processes or (own_cores() if device.type == "cpu" else 1), len(wanted))
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results: Result = {
        "settings": settings.must_match(),
        "environment": {"device": place, "processes": processes, "cores": own_cores(), "versions": versions()},
        "data": {name: small.load(name, settings.data).sizes() for name in settings.only},
        "jobs": {},
        "pretraining": [],
        "rows": [],
    }
    print(f"{len(wanted)} parts in {processes} processes; results go to {out}")
    joblib: Any = require("joblib", "the work in several processes")
    parallel = joblib.Parallel(processes, return_as="generator_unordered", pre_dispatch="all")
    try:
        for name, part in parallel(joblib.delayed(study)(*each, settings, device, out) for each in wanted):
            for kind in ("rows", "pretraining"):
                results[kind] += part.pop(kind)
            results["jobs"][name] = part
            print(f"{len(results['jobs'])}/{len(wanted)} {name}: {part['seconds']:.0f} s")
    except BrokenProcessPool:
        raise Aborted("a process has died: is there memory enough?") from None
    table = small.markdown(results)
    for name, text in ((RESULTS, json.dumps(results, indent=1)), ("table.md", table)):
        with replacing(out / name) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{table}\n\nResults: {out}")


def study(name: str, seed: int, settings: Settings, device: torch.device, out: Path) -> tuple[str, Result]:
    """Pretrain in every way and measure: a part, whose rows and seconds are the result. What it prints is in a file."""
    part, started = f"{name}-seed-{seed}", time.perf_counter()
    log = out / f"{part}.log"
    with log.open("w", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        pretraining = [pretrain(name, seed, method, settings, device, out) for method in VIEWS]
        data = small.load(name, settings.data)
        weights = {row["method"]: out / row["folder"] / BACKBONE for row in pretraining}
        rows = small.measure_frozen(data, weights, seed, device)
        rows += small.train_from_scratch(data, seed, settings.effort, device)
    return part, {"rows": rows, "pretraining": pretraining, "seconds": time.perf_counter() - started}


def pretrain(name: str, seed: int, method: str, settings: Settings, device: torch.device, out: Path) -> Result:
    """By examples/imagenet_pretrain.py: where the encoder is, and how many seconds its steps took.

    Aborted: it has failed, or a signal has stopped it.
    """
    views, epochs = VIEWS[method], settings.epochs_of(name, method)
    folder = "-".join([f"{name}-seed-{seed}", *(word.strip("-") for word in views)])
    flags = ["--data", settings.data] if name == FASHION else []
    flags += ["--seed", str(seed), "--epochs", str(epochs), "--device", str(device), *views]
    flags += ["--no-probe", "--no-evaluation", "--out", str(out / folder), "--overwrite"]
    if status := imagenet_pretrain.main(flags):
        raise Aborted(f"{folder}: exit status {status} (see {name}-seed-{seed}.log in {out})")
    seconds = sum(row["seconds"] for row in read_rows(out / folder / METRICS) if row["kind"] == "epoch")
    return {"task": name, "seed": seed, "method": method, "folder": folder, "epochs": epochs, "seconds": seconds}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the program as Ctrl-C does
    start(main)
