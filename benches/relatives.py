"""What the relatives of the loss cost: VICReg, Barlow Twins with mixed samples, and more than two views.

Value and gradient of all views, in float32, on one thread, held to float64 of what each computes before it is timed;
processor time, each turn after a call that is not timed: the turn before has left other data in the cache.

*relatives*: ours against the published formula. FLOP model, forward and backward: VICReg takes 12·N·D² as published and
8·N²·D here, less what the symmetry of the Gram matrices saves. Byte model, as published: several D×D matrices of 4·D².

*views*: two, four, eight, and the mean over the 28 pairs of eight by our own loss of two. FLOP model: 8·N²·D for two
views, 4·V·N²·D for V, 8·N²·D·V(V − 1)/2 for the loop; the symmetry of the Gram matrices saves a quarter of each.
Byte model: (V + 3)·N·D + (V + 4)·N² elements beyond the views and their gradients.

    python benches/relatives.py                         # both, five minutes
    python benches/relatives.py --only views --dry-run  # measure and print alone
"""

from __future__ import annotations

import argparse
import datetime as dt
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import measure
from barlow_loss import barlow_twins_loss, mixed_barlow_twins_loss, reference, vicreg_loss
from contenders import off_diagonal_of
from measure import Cell, Errors, cells, gram_form, interleave, ratios, spread, step
from render import insert, plain, setting, table
from render import spread as told

if TYPE_CHECKING:
    from collections.abc import Callable

    from measure import Record, Turn

DOCS = Path(__file__).parents[1] / "docs"
OURS, PUBLISHED = "barlow_loss", "published"
ALPHA, LAMBD, MIX_SCALE = 0.3, 0.0051, 5.0
TWO, FOUR, EIGHT, LOOP = "2 views", "4 views", "8 views", "28 pairs of 8 views"
VIEWS_CELL = Cell(256, 8192)
SECONDS = 90.0  # of a cell; after them only three rounds


class Contender(NamedTuple):
    """A loss of so many views, what it computes, for float64, and the largest errors at which it is timed."""

    loss: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    allowed: Errors
    views: int = 2


def published_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """The published formula, line by line, in one process.

    Source: Bardes et al. 2022, ``main_vicreg.py`` of github.com/facebookresearch/vicreg at 4e12602.
    """
    n, d = z1.shape
    repr_loss = functional.mse_loss(z1, z2)
    x, y = z1 - z1.mean(dim=0), z2 - z2.mean(dim=0)
    hinges = [torch.mean(functional.relu(1 - torch.sqrt(t.var(dim=0) + 0.0001))) / 2 for t in (x, y)]
    covariances = [t.T @ t / (n - 1) for t in (x, y)]
    cov_loss = sum(off_diagonal_of(c).pow_(2).sum().div(d) for c in covariances)
    loss: Tensor = 25 * repr_loss + 25 * (hinges[0] + hinges[1]) + cov_loss
    return loss


def published_mixed(z1: Tensor, z2: Tensor) -> Tensor:
    """The published formula, line by line, of samples that :func:`_mixed` has mixed.

    Source: Bandara et al. 2023, ``main.py`` of github.com/wgcban/mix-bt at e2c6af0.
    """
    n = z1.shape[0]
    index, z_mixed = _mixed(z1, z2)
    u1, u2, um = ((z - z.mean(dim=0)) / z.std(dim=0) for z in (z1, z2, z_mixed))
    c = u1.T @ u2 / n
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    off_diagonal = off_diagonal_of(c).pow_(2).sum()
    mixture = torch.zeros(())
    for u in (u1, u2):
        target = ALPHA * (u1.T @ u) / n + (1 - ALPHA) * (u2[index].T @ u) / n
        mixture = mixture + (um.T @ u / n - target).pow_(2).sum()
    return on_diagonal + LAMBD * off_diagonal + MIX_SCALE * LAMBD * mixture


def our_mixed(z1: Tensor, z2: Tensor) -> Tensor:
    index, z_mixed = _mixed(z1, z2)
    return mixed_barlow_twins_loss(z1, z2, z_mixed, ALPHA, index, lambd=LAMBD, mix_scale=MIX_SCALE)


def _mixed(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation, and what an encoder could make of the mixed samples; the noise is no linear function of them."""
    index = torch.randperm(z1.shape[0], generator=torch.Generator().manual_seed(1))
    return index, torch.tanh(ALPHA * z1 + (1 - ALPHA) * z2[index])


def _right_mixed(z1: Tensor, z2: Tensor) -> Tensor:
    index, z_mixed = _mixed(z1, z2)
    return reference.mixed_barlow_twins_loss(z1, z2, z_mixed, ALPHA, index, lambd=LAMBD, mix_scale=MIX_SCALE).loss


def _right_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    return reference.vicreg_loss(z1, z2).loss


def loop_over_pairs(*views: Tensor) -> Tensor:
    return torch.stack([barlow_twins_loss(*pair) for pair in combinations(views, 2)]).mean()


OURS_ALLOWED, PUBLISHED_ALLOWED, PAIRS_ALLOWED = Errors(1e-5, 1e-5), Errors(1e-3, 1e-3), Errors(3e-7, 3e-6)
RELATIVES = {
    "VICReg": (
        cells("256x2048", "256x8192"),
        {
            OURS: Contender(vicreg_loss, _right_vicreg, OURS_ALLOWED),
            PUBLISHED: Contender(published_vicreg, _right_vicreg, PUBLISHED_ALLOWED),
        },
    ),
    "Mixed Barlow Twins": (
        cells("256x2048", "256x4096"),
        {
            OURS: Contender(our_mixed, _right_mixed, OURS_ALLOWED),
            PUBLISHED: Contender(published_mixed, published_mixed, PUBLISHED_ALLOWED),
        },
    ),
}
VIEWS = {
    TWO: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED),
    FOUR: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED, 4),
    EIGHT: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED, 8),
    LOOP: Contender(loop_over_pairs, gram_form, PAIRS_ALLOWED, 8),
}


def measured(
    contenders: dict[str, Contender], cell: Cell, rounds: int, seconds: float
) -> tuple[dict[str, Record], dict[str, list[float]]]:
    """Errors and working memory of each, and the seconds of their turns; raises where an answer is wrong."""
    torch.set_num_threads(1)
    views = cell.views(max(each.views for each in contenders.values()))
    records: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name, contender in contenders.items():
        own = views[: contender.views]
        turn = partial(step, contender.loss, *own)
        answer, size = measure.watched(turn)
        found = measure.errors(answer, measure.in_float64(contender.oracle, *own))
        measure.check(name, cell, found, contender.allowed)
        records[name], turns[name] = {"errors": found, "working_bytes": size}, turn
    return records, interleave(turns, rounds, seconds, _warm)


def _warm(turn: Turn, calls: int) -> float:
    turn()
    return measure.processor(turn, calls)


def measure_relative(name: str, cell: Cell, rounds: int, seconds: float) -> Record:
    records, times = measured(RELATIVES[name][1], cell, rounds, seconds)
    return {
        "loss": name,
        "cell": str(cell),
        "seconds": {who: spread(own) for who, own in times.items()},
        "times_ours": ratios(times, OURS)[PUBLISHED],
        "rounds": len(times[OURS]),
        "working_bytes": {who: record["working_bytes"] for who, record in records.items()},
        "errors": {who: record["errors"]._asdict() for who, record in records.items()},
    }


def measure_views(cell: Cell, rounds: int, seconds: float) -> Record:
    records, times = measured(VIEWS, cell, rounds, seconds)
    of_two = ratios(times, TWO)
    for name, record in records.items():
        count = VIEWS[name].views
        record["model_bytes"] = 4 * ((count + 3) * cell.n * cell.d + (count + 4) * cell.n**2)
        record |= {"seconds": spread(times[name]), "times_two": of_two[name] if name != TWO else None}
    loop = ratios(times, EIGHT)[LOOP]
    return {"cell": str(cell), "rounds": len(times[TWO]), "contenders": records, "loop_over_eight": loop}


RELATIVES_COLUMNS = (
    ("loss", "loss", str),
    ("N × D", "cell", str),
    ("ours, ms", f"seconds/{OURS}/median", 1e3),
    ("published, × ours (quartiles)", "times_ours", told),
    ("working memory, MB: ours", f"working_bytes/{OURS}", 1e-6),
    ("published", f"working_bytes/{PUBLISHED}", 1e-6),
    ("error of the gradient: ours", f"errors/{OURS}/gradient", 1.0),
    ("of the published", f"errors/{PUBLISHED}/gradient", 1.0),
)
VIEWS_COLUMNS = (
    ("", "name", str),
    ("ms", "seconds/median", 1e3),
    ("× two views (quartiles)", "times_two", told),
    ("working memory, MB", "working_bytes", 1e-6),
    ("(V + 3)·N·D + (V + 4)·N², MB", "model_bytes", 1e-6),
    ("errors of loss and gradients", "errors", lambda found: " and ".join(map(plain, found))),
)


def relatives_table(report: Record) -> str:
    return f"{setting(report)}\n\n{table(report['records'], RELATIVES_COLUMNS)}"


def views_table(report: Record) -> str:
    record = report["record"]
    rows = [{"name": name, **found} for name, found in record["contenders"].items()]
    loop = f"The loop takes {told(record['loop_over_eight'])} times the one call."
    return f"N × D = {record['cell']}. {setting(report)}\n\n{table(rows, VIEWS_COLUMNS)}\n\n{loop}"


TABLES: dict[str, Callable[[Record], str]] = {"relatives": relatives_table, "views": views_table}


def page_with(name: str, report: Record) -> str:
    return insert((DOCS / f"{name}.md").read_text(encoding="utf-8"), name, TABLES[name](report))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the relatives cost; see the head of this file.")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="pages (default: both)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    for name in options.only:
        report: Record = {"date": date, "environment": measure.environment("lightly", "stable-pretraining")}
        if name == "views":
            report["record"] = measure_views(VIEWS_CELL, 15, SECONDS)
        else:
            pairs = [(relative, cell) for relative, (where, _) in RELATIVES.items() for cell in where]
            report["records"] = [measure_relative(*pair, 9, SECONDS) for pair in pairs]
        print(TABLES[name](report))
        if not options.dry_run:
            measure.store(report, DOCS / f"{name}.json")
            (DOCS / f"{name}.md").write_text(page_with(name, report), encoding="utf-8")


if __name__ == "__main__":
    main()
