"""What this library promises about its cost on a CPU, beside what was measured.

Machines differ: a promise that another one does not keep is worth an issue, so ``bench.py`` says it, and does not fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from baselines import OURS

if TYPE_CHECKING:
    from collections.abc import Iterator

    Record = dict[str, Any]

LARGEST_EXPONENT = 1.15  # of time in D, at N = 256
OVER_GEMMS = {(256, 8192): 1.7, (1024, 8192): 1.5}  # one thread
OVER_FEATURES_SQUARED = 0.25  # working memory over 4·D² bytes, at 256×4096
SHARE_OF_STEP = 0.03  # of the loss in a training step with its backbone


SECONDS = 600  # of a usual run on two cores
SECTIONS = ("cells", "growth", "limits", "host", "distributed", "training")


class Promise(NamedTuple):
    """What is promised to be at most ``limit``, and what was ``found``."""

    what: str
    limit: float
    found: float

    @property
    def kept(self) -> bool:
        """Whether this machine bears it out."""
        return self.found <= self.limit


def promises(results: Record) -> list[Promise]:
    """Those that the sections of ``results`` can tell of."""
    return [*_growth(results), *_memory(results), *_limits(results), *_training(results), *_duration(results)]


def _growth(results: Record) -> Iterator[Promise]:
    line = results.get("growth", {}).get("features", {"contenders": {}})
    if OURS in line["contenders"]:
        ours = line["contenders"][OURS]
        what = f"exponent of time in D, N = {line['n']}, D = {ours['d'][0]} to {ours['d'][-1]}"
        yield Promise(what, LARGEST_EXPONENT, ours["exponent"])


def _memory(results: Record) -> Iterator[Promise]:
    for cell in results.get("cells", []):
        if (cell["n"], cell["d"]) == (256, 4096):
            size = cell["contenders"][OURS]["working_bytes"] / (4 * cell["d"] ** 2)
            yield Promise("working memory over a D×D matrix, 256 × 4096", OVER_FEATURES_SQUARED, size)


def _limits(results: Record) -> Iterator[Promise]:
    for cell in results.get("limits", []):
        shape = cell["n"], cell["d"]
        if shape in OVER_GEMMS and cell["threads"] == 1:
            what = f"a step over torch.mm of its own products, {shape[0]} × {shape[1]}, one thread"
            yield Promise(what, OVER_GEMMS[shape], cell["ours_over_gemms"]["median"])


def _training(results: Record) -> Iterator[Promise]:
    for step in results.get("training", []):
        if "backbone" in step["parts"]:
            what = f"the loss's share of a step of {step['what']}, batch {step['batch_size']}"
            yield Promise(what, SHARE_OF_STEP, step["shares"][OURS])


def _duration(results: Record) -> Iterator[Promise]:
    seconds = results.get("seconds", {})
    if len(seconds) == len(SECTIONS):
        yield Promise("seconds that all sections took", SECONDS, sum(seconds.values()))
