"""The tables of how cost grows: exponents of time, and the largest D in a budget of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baselines import OURS, OURS_COMPILED
from table_format import NONE, grid, names, paragraphs, plain, spread
from table_speed import FULL_ONLY, compact

if TYPE_CHECKING:
    from collections.abc import Callable

    Record = dict[str, Any]


def growth(results: Record, chosen: Callable[[list[Record]], list[str]] = compact) -> str:
    """Fitted exponents of time, and the largest D that a budget of memory holds."""
    found = results.get("growth")
    if not found:
        return ""
    features, samples, budget = found["features"], found["samples"], found["budget"]
    head = ["", f"time grows as, in D (N = {features['n']})", "from D", "to D"]
    head += [f"in N (D = {samples['d']})", "from N", "to N"]
    gigabytes = f"{budget['bytes'] / 1e9:g} GB"
    head += [f"largest D in {gigabytes} of working memory (N = {budget['n']})", "with inputs and gradients in it"]
    rows = []
    for name in chosen([features, samples, budget]):
        row = [name, *_fit(features, name, "d", "D"), *_fit(samples, name, "n", "N")]
        rows.append([*row, *_largest_of(budget["contenders"].get(name))])
    return paragraphs(grid(head, rows), _growth_sentences(features, samples, budget))


def _largest_of(found: Record | None) -> list[str]:
    """Both D, and whether a step of it was taken or its memory follows from that of smaller ones."""
    if found is None:
        return [NONE] * 2
    return [f"{'' if found['measured'] else '≈ '}{found['features']:,}", f"≈ {found['features_in_all']:,}"]


def _fit(line: Record, name: str, axis: str, letter: str) -> list[str]:
    fit = line["contenders"].get(name)
    if fit is None:
        return [NONE] * 3
    return [f"{letter}^{fit['exponent']:.2f}", str(min(fit[axis])), str(max(fit[axis]))]


def _growth_sentences(features: Record, samples: Record, budget: Record) -> str:
    """What doubling costs, and who needs how much for a given D."""
    sentences = [
        _doubling(features, f"D at N = {features['n']}"),
        _doubling(samples, f"N at D = {samples['d']}"),
        _largest(budget),
        _computed(budget),
    ]
    return " ".join(filter(None, sentences))


def _doubling(line: Record, what: str) -> str:
    factors = {name: 2 ** fit["exponent"] for name, fit in line["contenders"].items()}
    if OURS not in factors:
        return ""
    sentence = f"Twice the {what} takes {factors[OURS]:.2f} times as long with ours"
    others = {name: factor for name, factor in factors.items() if name not in (OURS, OURS_COMPILED, *FULL_ONLY)}
    if others:
        low, high = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
        sentence += f", {others[high]:.2f} times with {high}"
        sentence += f" and {others[low]:.2f} times with {low}" if low != high else ""
    return f"{sentence}."


def _largest(budget: Record) -> str:
    """Ours beside all others, each with its own D; the variants of ours are no others."""
    sizes = {name: found["features"] for name, found in budget["contenders"].items()}
    others = {name: d for name, d in sizes.items() if name not in (OURS, OURS_COMPILED, *FULL_ONLY)}
    if OURS not in sizes or not others:
        return ""
    best = max(others, key=others.__getitem__)
    memory_of = f"{budget['bytes'] / 1e9:g} GB of working memory"
    sentence = (
        f"{memory_of} hold a step of ours up to D = {sizes[OURS]:,}, of the others up to {others[best]:,} ({best})"
    )
    small = min(others, key=others.__getitem__)
    return f"{sentence}, or {others[small]:,} ({small})." if small != best else f"{sentence}."


def _computed(budget: Record) -> str:
    if all(found["measured"] for found in budget["contenders"].values()):
        return ""
    return "≈: computed from the working memory at smaller D; the others took that step."


def growth_details(results: Record) -> str:
    """Fits and largest D of all contenders, those of ours included, and the times behind the fits."""
    found = results.get("growth")
    if not found:
        return ""
    head = ["what", "grows with", "at", "ms", "exponent (quartiles)"]
    rows = []
    for line, axis in ((found["features"], "d"), (found["samples"], "n")):
        for name, fit in line["contenders"].items():
            sizes, seconds = (", ".join(map(str, fit[axis])), ", ".join(plain(1e3 * s) for s in fit["seconds"]))
            exponent = spread(fit["exponents"]) if "exponents" in fit else f"{fit['exponent']:.3f}"
            rows.append([name, axis.upper(), sizes, seconds, exponent])
    return paragraphs(growth(results, names), grid(head, rows))
