"""The ablations of the Barlow Twins paper in miniature, beside its figures: do they point the same way here?

    python examples/ablations.py                          # all, three seeds: twenty to thirty minutes on two cores
    python examples/ablations.py --quick                  # every table with a fraction of the steps: a minute
    python examples/ablations.py --only terms asymmetry --seeds 5

Small encoders are pretrained on scikit-learn's digits, with every method by its own learning rate, which is searched
first, on training images that the search holds out. Each is worth what a linear classifier gets right that has five
labels of each class. The other methods are made of lightly's losses and heads.

The output folder gets ``runs.jsonl``, a line a run; what is there is not run again, so that an interrupted study goes
on. At the end it gets ``results.json``, ``tables.md``, ``ablations.png`` and ``terms.png``.
"""

import json
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from barlow_recipes import ablation_report, command_line
from barlow_recipes.ablation import BATCH_SIZE, Way, for_search, load, measure
from barlow_recipes.ablation_rows import GROUPS, chosen, ways_of
from barlow_recipes.command_line import Positive, Real, optional_value, own_cores
from barlow_recipes.errors import Aborted, require
from barlow_recipes.metrics import read_rows
from barlow_recipes.outputs import RESULTS, replacing, writing
from barlow_recipes.pages import put_into_pages
from barlow_recipes.program import exit_status, start
from barlow_recipes.reporting import versions

RUNS, TABLES, DIFFERENCES, MATRICES = "runs.jsonl", "tables.md", "ablations.png", "terms.png"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of AdamW at the usual batch size, with which the search begins
LIMITS = (6e-5, 4e-2)  # between which it stays
SEARCH_SEED = 100
Name = Literal["terms", "asymmetry", "batch", "width", "depth", "augmentations", "lambda", "methods"]
File = Annotated[Path | None, optional_value(Path, Path("docs/ablations.json"))]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    only: tuple[Name, ...] = tuple(group.name for group in GROUPS)  # type: ignore[assignment]  # some of the tables
    seeds: Positive = 3  # of weights, views and order
    effort: Real = 1.0  # a factor of the number of steps
    processes: Positive | None = None  # that work at the same time; without it one for each core
    out: Path = Path("runs/ablations")  # folder for the results; what it has of these settings is not run again
    overwrite: bool = False  # forget what is there
    quick: bool = False  # one seed and a fiftieth of the steps: to see that it works
    update: File = None  # run nothing: put the tables of these results, docs/ablations.json if none, into the pages
    check: File = None  # run nothing: fail if the pages have not the tables of these results
    pages: Path = Path("docs")  # folder of the pages


QUICK = Settings(quick=True, seeds=1, effort=0.02)


@dataclass(frozen=True)
class Job:
    """A run: all that its result depends on."""

    way: Way
    rate: float
    seed: int
    effort: float
    search: bool  # on the training images alone

    def fields(self) -> Record:
        return {"way": self.way, "rate": self.rate, "seed": self.seed, "effort": self.effort, "search": self.search}

    def key(self) -> str:
        return json.dumps(self.fields())


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    settings = command_line.read(Settings, argv, __doc__ or "", QUICK if "--quick" in argv else None)
    if path := settings.update or settings.check:
        command, check = f"python examples/ablations.py --update {path}", settings.update is None
        put_into_pages(path, marked(settings.pages), ablation_report.blocks, check=check, command=command)
        return
    for module, reason in (("lightly", "the other methods"), ("sklearn", "the digits"), ("matplotlib", "the pictures")):
        require(module, reason)
    study(settings)


def marked(folder: Path) -> list[Path]:
    return [page for page in sorted(folder.glob("**/*.md")) if "<!-- ablations-" in page.read_text(encoding="utf-8")]


def study(settings: Settings) -> None:
    """Search the learning rates, run what is not there yet, and write the results."""
    ways = ways_of(chosen(settings.only))
    usual = list(dict.fromkeys(Way(way.method, way.data) for way in ways))
    log = Log(settings.out, settings.overwrite)
    processes = settings.processes or own_cores()
    searched, best = search(usual, log, settings.effort, processes)
    jobs = [
        Job(way, rate_for(way, best), seed, settings.effort, search=False)
        for seed in range(settings.seeds)
        for way in ways
    ]
    results: Record = {
        "settings": {"only": list(settings.only), "seeds": settings.seeds, "effort": settings.effort, "rates": RATES},
        "environment": {"versions": versions()},
        "chosen": list(best.values()),
        "records": [*searched, *log.complete(jobs, processes)],
    }
    report(settings.out, json.loads(json.dumps(results)))


def search(ways: list[Way], log: "Log", effort: float, processes: int) -> tuple[list[Record], dict[Way, Record]]:
    """All that was tried, and the best of each way; where that has an outermost rate, the next one is tried as well."""
    rates = dict.fromkeys(ways, RATES)
    while True:
        trials = [Job(way, rate, SEARCH_SEED, effort, search=True) for way in ways for rate in rates[way]]
        searched = log.complete(trials, processes)
        best = {way: max(of_way(searched, way), key=lambda record: record["accuracy"]) for way in ways}
        wider = {way: beyond(rates[way], best[way]["rate"]) for way in ways}
        if wider == rates:
            return searched, best
        rates = wider


def beyond(rates: tuple[float, ...], best: float) -> tuple[float, ...]:
    """With half the smallest rate or twice the greatest, if that is the best, within the limits."""
    if best == rates[0] and best / 2 > LIMITS[0]:
        return (best / 2, *rates)
    if best == rates[-1] and 2 * best < LIMITS[1]:
        return (*rates, 2 * best)
    return rates


def rate_for(way: Way, best: Mapping[Way, Record]) -> float:
    """That of the method on these data, by the root of the batch size."""
    rate: float = best[Way(way.method, way.data)]["rate"]
    return rate * math.sqrt(way.batch_size / BATCH_SIZE)


def of_way(records: Iterable[Record], way: Way) -> list[Record]:
    return [record for record in records if Way.of(record["way"]) == way]


class Log:
    """The runs that a folder has, a line each; a line that a crash has cut off is run again."""

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.path = folder / RUNS
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self.path.unlink(missing_ok=True)
            self.records = {row["key"]: row for row in read_rows(self.path)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * bool(self.path.stat().st_size))

    def complete(self, jobs: list[Job], processes: int) -> list[Record]:
        """The records of all jobs, of which those that are missing are run."""
        missing = [job for job in jobs if job.key() not in self.records]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are in {self.path}")
        tqdm: Any = require("tqdm", "the progress bar")
        with tqdm.tqdm(total=len(missing), unit="run", disable=not missing) as bar:
            for record in done(missing, processes):
                self.records[record["key"]] = record
                with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                bar.update()
        return [self.records[job.key()] for job in jobs]


def done(jobs: list[Job], processes: int) -> Iterator[Record]:
    """The jobs' records in the order in which they end."""
    joblib: Any = require("joblib", "the work in several processes")
    parallel = joblib.Parallel(min(processes, max(1, len(jobs))), return_as="generator_unordered")
    try:
        yield from parallel(joblib.delayed(work)(job) for job in jobs)
    except BrokenProcessPool:
        raise Aborted("a process has died: is there memory enough? The same command goes on from here") from None


def work(job: Job) -> Record:
    data = load(job.way.data)
    found = measure(job.way, job.rate, job.seed, for_search(data) if job.search else data, job.effort)
    record = {"kind": "run", "key": job.key(), **job.fields(), **found}
    return record if ablation_report.is_shown(record) else {name: record[name] for name in record if name != "C"}


def report(out: Path, results: Record) -> None:
    """Write the results, the tables and the pictures."""
    blocks = ablation_report.blocks(results)
    text = "\n\n".join(f"## {name}\n\n{block}" for name, block in blocks.items())
    for record in (*results["records"], *results["chosen"]):
        del record["key"], record["kind"]
    for name, content in ((RESULTS, json.dumps(results)), (TABLES, text)):
        with replacing(out / name) as temporary:
            temporary.write_text(f"{content}\n", encoding="utf-8")
    ablation_report.draw_differences(out / DIFFERENCES, results)
    ablation_report.draw_matrices(out / MATRICES, results["records"])
    print(f"\n{text}\n\nResults: {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the program as Ctrl-C does
    start(main)
