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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import measure
from barlow_loss import barlow_twins_loss, mixed_barlow_twins_loss, reference, vicreg_loss
from contenders import off_diagonal_of
from measure import Cell, Errors, Record, Turn, cells, gram_form, ratios, spread, step
from render import insert, plain, setting, table
from render import spread as told

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parents[1] / "docs"
OURS, PUBLISHED = "barlow_loss", "published"
ALPHA, LAMBD, MIX_SCALE = 0.3, 0.0051, 5.0
TWO, FOUR, EIGHT, LOOP = "2 views", "4 views", "8 views", "28 pairs of 8 views"
ROUNDS, SECONDS = 15, 90.0  # of a cell; after so many seconds only three rounds


class Contender(NamedTuple):
    """A loss of so many views, what it computes, for float64, the largest errors, and whose times its are beside."""

    loss: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    allowed: Errors
    beside: tuple[str, ...] = ()
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


def _mixed(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation, and what an encoder could make of the mixed samples; the noise is no linear function of them."""
    index = torch.randperm(z1.shape[0], generator=torch.Generator().manual_seed(1))
    return index, torch.tanh(ALPHA * z1 + (1 - ALPHA) * z2[index])


def _of_mixed(loss: Callable[..., Any], z1: Tensor, z2: Tensor) -> Any:
    index, z_mixed = _mixed(z1, z2)
    return loss(z1, z2, z_mixed, ALPHA, index, lambd=LAMBD, mix_scale=MIX_SCALE)


def _right(oracle: Callable[..., Any], *views: Tensor) -> Tensor:
    loss: Tensor = oracle(*views).loss
    return loss


def loop_over_pairs(*views: Tensor) -> Tensor:
    return torch.stack([barlow_twins_loss(*pair) for pair in combinations(views, 2)]).mean()


OURS_ALLOWED, PUBLISHED_ALLOWED, PAIRS_ALLOWED = Errors(1e-5, 1e-5), Errors(1e-3, 1e-3), Errors(3e-7, 3e-6)
RIGHT_VICREG = partial(_right, reference.vicreg_loss)
RIGHT_MIXED = partial(_right, partial(_of_mixed, reference.mixed_barlow_twins_loss))
# By loss: where it is measured, and what.
RELATIVES = {
    "VICReg": (
        cells("256x2048", "256x8192"),
        {
            OURS: Contender(vicreg_loss, RIGHT_VICREG, OURS_ALLOWED),
            PUBLISHED: Contender(published_vicreg, RIGHT_VICREG, PUBLISHED_ALLOWED, (OURS,)),
        },
    ),
    "Mixed Barlow Twins": (
        cells("256x2048", "256x4096"),
        {
            OURS: Contender(partial(_of_mixed, mixed_barlow_twins_loss), RIGHT_MIXED, OURS_ALLOWED),
            PUBLISHED: Contender(published_mixed, published_mixed, PUBLISHED_ALLOWED, (OURS,)),
        },
    ),
}
VIEWS = {
    TWO: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED),
    FOUR: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED, (TWO,), 4),
    EIGHT: Contender(barlow_twins_loss, gram_form, PAIRS_ALLOWED, (TWO,), 8),
    LOOP: Contender(loop_over_pairs, gram_form, PAIRS_ALLOWED, (TWO, EIGHT), 8),
}
PAGES = {"relatives": RELATIVES, "views": {"Barlow Twins": (cells("256x8192"), VIEWS)}}


def measured(loss: str, cell: Cell, contenders: dict[str, Contender], rounds: int, seconds: float) -> Record:
    """Errors, working memory, times and their ratios; raises where an answer is wrong."""
    torch.set_num_threads(1)
    views = cell.views(max(each.views for each in contenders.values()))
    found: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    for name, contender in contenders.items():
        own = views[: contender.views]
        turns[name] = turn = partial(step, contender.loss, *own)
        answer, size = measure.watched(turn)
        distance = measure.errors(answer, measure.in_float64(contender.oracle, *own))
        measure.check(name, cell, distance, contender.allowed)
        found[name] = {"errors": distance, "working_bytes": size}
    times = measure.interleave(turns, rounds, seconds, _warm)
    for name, record in found.items():
        over = {other: ratios(times, other)[name] for other in contenders[name].beside}
        record |= {"seconds": spread(times[name]), "over": over}
    rounds = min(map(len, times.values()))
    return {"loss": loss, "cell": str(cell), "rounds": rounds, "contenders": found}


def _warm(turn: Turn, calls: int) -> float:
    turn()
    return measure.processor(turn, calls)


RELATIVES_COLUMNS = (
    ("loss", "loss", str),
    ("N × D", "cell", str),
    ("ours, ms", f"contenders/{OURS}/seconds/median", 1e3),
    ("published, × ours (quartiles)", f"contenders/{PUBLISHED}/over/{OURS}", told),
    ("working memory, MB: ours", f"contenders/{OURS}/working_bytes", 1e-6),
    ("published", f"contenders/{PUBLISHED}/working_bytes", 1e-6),
    ("error of the gradient: ours", f"contenders/{OURS}/errors", lambda found: plain(found[1])),
    ("of the published", f"contenders/{PUBLISHED}/errors", lambda found: plain(found[1])),
)
VIEWS_COLUMNS = (
    ("", "name", str),
    ("ms", "seconds/median", 1e3),
    ("× two views (quartiles)", f"over/{TWO}", told),
    ("working memory, MB", "working_bytes", 1e-6),
    ("(V + 3)·N·D + (V + 4)·N², MB", "model_bytes", 1e-6),
    ("errors of loss and gradients", "errors", lambda found: " and ".join(map(plain, found))),
)


def block(name: str, report: Record) -> str:
    if name == "relatives":
        return f"{setting(report)}\n\n{table(report['records'], RELATIVES_COLUMNS)}"
    (record,) = report["records"]
    n, d = map(int, record["cell"].split("×"))
    rows = [{"name": name, **found} for name, found in record["contenders"].items()]
    for row in rows:
        count = VIEWS[row["name"]].views
        row["model_bytes"] = 4 * ((count + 3) * n * d + (count + 4) * n**2)
    loop = f"The loop takes {told(record['contenders'][LOOP]['over'][EIGHT])} times the one call."
    return f"N × D = {record['cell']}. {setting(report)}\n\n{table(rows, VIEWS_COLUMNS)}\n\n{loop}"


def page_with(name: str, report: Record) -> str:
    return insert((DOCS / f"{name}.md").read_text(encoding="utf-8"), name, block(name, report))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the relatives cost; see the head of this file.")
    parser.add_argument("--only", nargs="+", choices=PAGES, default=list(PAGES), help="pages (default: both)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    for name in options.only:
        cases = [(loss, cell, them) for loss, (where, them) in PAGES[name].items() for cell in where]
        records = [measured(*case, ROUNDS, SECONDS) for case in cases]
        report = {"date": date, "environment": measure.environment("lightly", "stable-pretraining"), "records": records}
        print(block(name, report))
        if not options.dry_run:
            measure.store(report, DOCS / f"{name}.json")
            (DOCS / f"{name}.md").write_text(page_with(name, report), encoding="utf-8")


if __name__ == "__main__":
    main()
