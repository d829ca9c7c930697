"""The relatives of the loss, VICReg and Barlow Twins with mixed samples, against their published formulas.

A step is the value and the gradient of both views, in float32, on one thread. Ours and the published formula take turns
in one process, one of ours right before each of the other, and what is told is the median of the ratios of these pairs.
What is counted is the thread's processor time, so that other programs on the machine are not in it.
Each is held to float64 of what it computes before it is timed. Working memory is counted as in ``memory.py``.

FLOP model, forward and backward: VICReg takes 12·N·D² as published and 8·N²·D here, less what the symmetry of the Gram
matrices saves. Byte model: as published a D×D matrix takes 4·D² bytes, and several are alive at once.

Writes ``docs/relatives.json`` and the table of it in ``docs/relatives.md``.

    python benches/relatives.py                       # under three minutes
    python benches/relatives.py --rounds 3 --dry-run  # measure and print alone
    python benches/relatives.py --check               # does the page say what was measured?
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import machine
from barlow_loss import mixed_barlow_twins_loss, vicreg_loss
from memory import watched_step
from timing import interleave, processor_time, ratios, spread
from workload import Cell, errors, step

if TYPE_CHECKING:
    from baselines import Contender

    Record = dict[str, Any]

DOCS = Path(__file__).parents[1] / "docs"
OURS, PUBLISHED = "barlow_loss", "published"
ALPHA, LAMBD, MIX_SCALE = 0.3, 0.0051, 5.0
LARGEST_ERRORS = {OURS: 1e-5, PUBLISHED: 1e-3}


class Relative(NamedTuple):
    """A loss, where it is measured, and the oracle that holds ours and the published one."""

    cells: tuple[Cell, ...]
    contenders: dict[str, Contender]
    oracles: dict[str, Contender]


def published_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """The published formula, line by line, in one process.

    Source: Bardes et al. 2022, ``main_vicreg.py`` of github.com/facebookresearch/vicreg at 4e12602.
    """
    n, d = z1.shape
    repr_loss = functional.mse_loss(z1, z2)
    x, y = z1 - z1.mean(dim=0), z2 - z2.mean(dim=0)
    hinges = [torch.mean(functional.relu(1 - torch.sqrt(t.var(dim=0) + 0.0001))) / 2 for t in (x, y)]
    covariances = [t.T @ t / (n - 1) for t in (x, y)]
    cov_loss = sum(_off_diagonal(c).pow_(2).sum().div(d) for c in covariances)
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
    off_diagonal = _off_diagonal(c).pow_(2).sum()
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


def _mixed_oracle(z1: Tensor, z2: Tensor, *, eps: float = 1e-5, correction: int = 0) -> Tensor:
    """The Gram form, right in float64 without D×D matrices; the published one has no ε and the unbiased deviation."""
    index, z_mixed = _mixed(z1, z2)
    n = z1.shape[0]
    u1, u2, um = ((z - z.mean(dim=0)) / (z.var(dim=0, correction=correction) + eps).sqrt() for z in (z1, z2, z_mixed))
    e = um - ALPHA * u1 - (1 - ALPHA) * u2[index]
    grams = [u @ u.T for u in (u1, u2)]
    c = (u1 * u2).sum(dim=0) / n
    off_diagonal = (grams[0] * grams[1]).sum() / n**2 - c.square().sum()
    mixture = (e @ e.T * (grams[0] + grams[1])).sum() / n**2
    return (c - 1).square().sum() + LAMBD * off_diagonal + MIX_SCALE * LAMBD * mixture


def _vicreg_oracle(z1: Tensor, z2: Tensor) -> Tensor:
    """The same of VICReg."""
    n, d = z1.shape
    views = [z - z.mean(dim=0) for z in (z1, z2)]
    variances = torch.stack([x.var(dim=0) for x in views])
    hinge = functional.relu(1 - (variances + 0.0001).sqrt()).mean()
    norms = torch.stack([(x @ x.T).square().sum() for x in views]).sum() / (n - 1) ** 2
    return 25 * (z1 - z2).square().mean() + 25 * hinge + (norms - variances.square().sum()) / d


def _off_diagonal(c: Tensor) -> Tensor:
    d = c.shape[0]
    return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()


RELATIVES = {
    "VICReg": Relative(
        (Cell(256, 2048), Cell(256, 8192)),
        {OURS: vicreg_loss, PUBLISHED: published_vicreg},
        {OURS: _vicreg_oracle, PUBLISHED: _vicreg_oracle},
    ),
    "Mixed Barlow Twins": Relative(
        (Cell(256, 2048), Cell(256, 4096)),
        {OURS: our_mixed, PUBLISHED: published_mixed},
        {OURS: _mixed_oracle, PUBLISHED: partial(_mixed_oracle, eps=0.0, correction=1)},
    ),
}


def measure(name: str, cell: Cell, rounds: int, seconds: float) -> Record:
    """Times, their ratios, working memory and errors of a relative at a cell, ours and published."""
    torch.set_num_threads(1)
    relative, views = RELATIVES[name], cell.views()
    found = {who: _error(relative, who, views) for who in relative.contenders}
    memory = {who: watched_step(contender, *views)[1] for who, contender in relative.contenders.items()}
    turns = {who: _turn(contender, views) for who, contender in relative.contenders.items()}
    times = interleave(turns, rounds, seconds, processor_time)
    return {
        "loss": name,
        "cell": str(cell),
        "seconds": {who: spread(own) for who, own in times.items()},
        "times_ours": ratios(times, OURS)[PUBLISHED],
        "rounds": len(times[OURS]),
        "working_bytes": memory,
        "errors": {who: error._asdict() for who, error in found.items()},
    }


def _turn(contender: Contender, views: tuple[Tensor, Tensor]) -> Any:
    return lambda: step(contender, *views)


def _error(relative: Relative, who: str, views: tuple[Tensor, Tensor]) -> Any:
    """From float64 of what it computes; a wrong answer is not timed."""
    doubles = [z.detach().double().requires_grad_() for z in views]
    with machine.all_cores():
        right = step(relative.oracles[who], *doubles)
    found = errors(step(relative.contenders[who], *views), right)
    if not max(found) <= LARGEST_ERRORS[who]:
        raise AssertionError(f"{who}: expected errors of at most {LARGEST_ERRORS[who]}, found {found}")
    return found


def table(report: Record) -> str:
    """What stands in the page between its marks."""
    environment = report["environment"]
    lines = [
        f"Forward and backward, float32, 1 thread, on {environment['cpu']} ({environment['instructions']}), "
        f"torch {environment['versions']['torch']}; {report['date']}. Processor time; medians, quartiles in brackets.",
        "",
        "| loss | N × D | ours, ms | published, × ours | working memory, MB: ours | published | error of the "
        "gradient: ours | published |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in report["records"]:
        ratio, memory, found = record["times_ours"], record["working_bytes"], record["errors"]
        lines.append(
            f"| {record['loss']} | {record['cell'].replace('×', ' × ')} "
            f"| {1e3 * record['seconds'][OURS]['median']:.1f} "
            f"| {ratio['median']:.1f}× ({ratio['q1']:.1f} to {ratio['q3']:.1f}) "
            f"| {memory[OURS] / 1e6:.1f} | {memory[PUBLISHED] / 1e6:,.0f} "
            f"| {found[OURS]['gradient']:.1e} | {found[PUBLISHED]['gradient']:.1e} |"
        )
    return "\n".join(lines)


def page_with(report: Record) -> str:
    """The page with the table of a report."""
    page = (DOCS / "relatives.md").read_text(encoding="utf-8")
    block = f"<!-- relatives:begin -->\n{table(report)}\n<!-- relatives:end -->"
    page, count = re.subn(r"<!-- relatives:begin -->.*<!-- relatives:end -->", lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError("relatives.md: expected the marks relatives:begin and relatives:end, once each")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0, help="of a cell; after them only three rounds")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--check", action="store_true", help="compare the page with the committed figures")
    options = parser.parse_args()
    results = DOCS / "relatives.json"
    if options.check:
        current = (DOCS / "relatives.md").read_text(encoding="utf-8")
        if page_with(json.loads(results.read_text(encoding="utf-8"))) != current:
            raise SystemExit("docs/relatives.md does not say what docs/relatives.json does")
        return
    records = [
        measure(name, cell, options.rounds, options.seconds)
        for name, relative in RELATIVES.items()
        for cell in relative.cells
    ]
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    report = {"date": date, "environment": machine.environment(), "records": records}
    print(table(report))
    if not options.dry_run:
        results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (DOCS / "relatives.md").write_text(page_with(report), encoding="utf-8")


if __name__ == "__main__":
    main()
