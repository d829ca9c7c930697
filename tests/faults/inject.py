"""Injure real runs of the pretraining program in every way that it must survive, and count.

    python tests/faults/inject.py                     # all of it: eight minutes on two busy cores
    python tests/faults/inject.py --short             # a few of each kind: a minute and a half
    python tests/faults/inject.py --only killed-rank full-disk
    python tests/faults/inject.py --short --bug saves-in-place    # a program with this bug must fail

It prints a table, a row for each kind of fault, and ends with status 1 if one of them was not survived. It needs Linux.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random

import killing
import promises
import start
import storage
import torch
from outcomes import EXAMPLES, IMPORTED
from plan import Plan, References, Row
from runs import Trainings

from programs import Nursery

KINDS: dict[str, Callable[[Plan], Row]] = {
    "killed-rank": killing.killed_rank,
    "killed-save": killing.killed_save,
    "signal": killing.signal_to_stop,
    "damaged-checkpoint": storage.damaged_checkpoint,
    "untrusted-checkpoint": storage.untrusted_checkpoint,
    "full-disk": storage.full_disk,
    "corrupt-images": storage.corrupt_images,
    "lost-loader": storage.lost_loader,
    "non-finite-loss": promises.non_finite_loss,
    "other-workers": promises.other_workers,
    "other-processes": promises.other_processes,
}
HEAD = ("fault", "injected", "survived", "pass figure", "measured worst")


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    torch.set_num_threads(1)
    for bug in options.bug:
        start.BUGS[bug]()  # this process, too, reads checkpoints
    table = [_line(HEAD), _line("---" for _ in HEAD)]
    print("\n".join(table), flush=True)
    rows: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        Nursery(*IMPORTED, path=[EXAMPLES]) as forks,
        ThreadPoolExecutor(2) as lanes,
    ):
        nursery = Trainings(forks, [[bug] for bug in options.bug])
        references = References(nursery, Path(folder, "references"))
        plans = {
            kind: Plan(options.short, Random(f"{options.seed} {kind}"), Path(folder, kind), nursery, references)
            for kind in options.only
        }
        kinds = {lanes.submit(_fill_row, kind, plan): kind for kind, plan in plans.items()}
        for done in as_completed(kinds):
            rows[kinds[done]] = row = done.result()
            table.append(_line(row.cells()))
            print(table[-1], flush=True)
    for kind, row in rows.items():
        for failure in row.failures:
            print(f"{kind}: {failure}", file=sys.stderr)
    if options.out:
        _write(options.out, table, rows)
    return int(not all(row.passed for row in rows.values()))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few faults of each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: times, places, victims [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write table.md and results.json there")
    parser.add_argument(
        "--bug", nargs="+", choices=start.BUGS, default=[], metavar="BUG",
        help=f"put it into the program first: {', '.join(start.BUGS)}",
    )  # fmt: skip
    return parser.parse_args(argv)


def _fill_row(kind: str, plan: Plan) -> Row:
    began = time.monotonic()
    plan.folder.mkdir()
    try:
        row = KINDS[kind](plan)
    except Exception:  # the other kinds go on
        row = Row(kind, "", failures=[traceback.format_exc()])
    row.seconds = time.monotonic() - began
    return row


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write(out: Path, table: Sequence[str], rows: dict[str, Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(table) + "\n")
    results = [{"kind": kind, "passed": row.passed, **vars(row)} for kind, row in rows.items()]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
