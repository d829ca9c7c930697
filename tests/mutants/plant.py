"""Plant bugs into a copy of the working tree, one at a time, and see which of them the tests notice.

    python tests/mutants/plant.py                    # each bug of planted.py meets the tests that stand beside it
    python tests/mutants/plant.py --whole --slow     # what they miss meets all of `make test`, then of `make test-all`
    python tests/mutants/plant.py --tool 100         # a sample of those that cosmic-ray makes, see by_tool.py

Every run of pytest is forked from this process, which has imported torch and not the library. A run has to pass on the
copy without a bug before its failure with one means anything; and one that takes ten times as long as there has failed.
Exit status 1 if a bug survives. It needs Linux.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import by_tool
from forked import prepare, run_pytest
from planted import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
MARKED = {"fast": "not slow and not figure", "slow": "slow and not figure"}  # of the tiers
INTERPRETED = "tests/kernels/interpreted"
PASSED, NO_TESTS = 0, 5  # pytest's exit status
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
LEAST_LIMIT = 60.0  # seconds


class Run(NamedTuple):
    """A call of pytest: the tier, what it is given, and whether triton interprets its kernels."""

    tier: str
    arguments: tuple[str, ...]
    interpreted: bool


class Row(NamedTuple):
    """What became of a bug: the tier that caught it, if one did, and the first test that failed."""

    name: str
    tier: str | None
    failure: str
    seconds: float


def near(mutant: Mutant, tier: str) -> list[Run]:
    """The tests beside a bug: a run for each file of them, so that each has to pass without a bug but once."""
    return [_run(tier, [path], interpreted=path.startswith(INTERPRETED)) for path in mutant.near]


def whole(tier: str) -> list[Run]:
    """The two runs of the Makefile; in the slow tier the laws are interpreted with more examples."""
    laws = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_laws_*.py"))
    interpreted = [INTERPRETED, *laws]
    if tier == "slow":
        interpreted = [*laws, "--hypothesis-profile", "interpreted-more", "-m", MARKED["fast"]]
    return [
        _run(tier, ["-n", "2", "--dist", "loadfile", "--ignore", INTERPRETED], interpreted=False),
        _run(tier, ["-n", "2", *interpreted], interpreted=True),
    ]


def _run(tier: str, arguments: Sequence[str], *, interpreted: bool) -> Run:
    always = "-x", "-q", "-p", "no:cacheprovider", "--ignore", "tests/mutants", "-m", MARKED[tier]
    kernels = ("--backend", "triton", "--hypothesis-profile", "interpreted") if interpreted else ()
    return Run(tier, (*always, *kernels, *arguments), interpreted)


@dataclass
class Copy:
    """A copy of the working tree, and the seconds of what has passed in it without a bug."""

    root: Path
    usual: dict[Run, float] = field(default_factory=dict)

    def fill(self) -> None:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        for name in filter(None, os.fsdecode(listed).split("\0")):
            if (ROOT / name).is_file():  # deleted files are listed, too
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, mutant
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            yield
        finally:
            path.write_text(text)

    def limit(self, run: Run) -> float:
        """Seconds that the run may take: ten times as many as without a bug, where it has to pass."""
        if run not in self.usual:
            started = time.monotonic()
            if failure := self.failure(run, limit=3600):
                raise SystemExit(f"Without a bug fails {failure}, of pytest {' '.join(run.arguments)}")
            self.usual[run] = time.monotonic() - started
        return max(LEAST_LIMIT, 10 * self.usual[run])

    def failure(self, run: Run, limit: float) -> str:
        """The first test that fails, or what else goes wrong; nothing if all is well."""
        output = self.root.with_suffix(".txt")
        environment = {"TRITON_INTERPRET": f"{run.interpreted:d}"}
        status = run_pytest(run.arguments, self.root, output, environment, limit)
        if status is None:
            return f"did not end in {limit:.0f} s"
        if status in (PASSED, NO_TESTS):
            return ""
        found = FIRST_FAILURE.search(text := output.read_text(errors="replace"))
        return found[1] if found else f"exit status {status}: {text[-200:]!r}"


def verdict(copy: Copy, mutant: Mutant, runs: Sequence[Run]) -> Row:
    """Take the runs until one fails. What they take without the bug is not in its seconds."""
    seconds = 0.0
    for run in runs:
        limit, started = copy.limit(run), time.monotonic()
        with copy.planted(mutant):
            failure = copy.failure(run, limit)
        seconds += time.monotonic() - started
        if failure:
            return Row(mutant.name, run.tier, failure, seconds)
    return Row(mutant.name, None, "SURVIVED", seconds)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="of the planted bugs")
    parser.add_argument("--tool", type=int, metavar="N", help="N bugs of cosmic-ray's, in place of the planted ones")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of these")
    parser.add_argument("--near", nargs="+", metavar="TEST", help="in place of the tests that stand beside the bugs")
    parser.add_argument("--whole", action="store_true", help="what survives these meets the whole fast tier")
    parser.add_argument("--slow", action="store_true", help="and then the slow tier")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Plant and tell; 1 if a bug survives."""
    options = read_options(argv)
    planted = [mutant for mutant in MUTANTS if mutant.name in options.only]
    mutants = planted if options.tool is None else by_tool.sample(ROOT, options.tool, options.seed)
    mutants = [mutant._replace(near=tuple(options.near or mutant.near)) for mutant in mutants]
    prepare()
    rows = []
    with tempfile.TemporaryDirectory(prefix="barlow-loss-mutants-") as folder:
        copy = Copy(Path(folder) / "tree")
        copy.fill()
        for mutant in mutants:
            runs = near(mutant, "fast") + whole("fast") * options.whole
            runs += (near(mutant, "slow") + whole("slow")) * options.slow
            rows.append(row := verdict(copy, mutant, runs))
            if options.out:
                options.out.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
            print(f"{row.name:<56} {row.tier or '-':<5} {row.seconds:6.1f} s  {row.failure}", flush=True)
    survivors = [row.name for row in rows if row.tier is None]
    print(f"{len(rows) - len(survivors)} of {len(rows)} caught in {sum(row.seconds for row in rows):.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
