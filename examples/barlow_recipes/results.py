"""The accuracies beside the published ones, for people to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from barlow_recipes.tables import aligned


def results_table(
    results: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], published: Mapping[str, Sequence[float]]
) -> str:
    """Each protocol with its accuracies, the published ones, and the epoch that was best.

    Args:
        results: of each protocol, by its name.
        columns: which of its accuracies, and what to call them.
        published: top-1 and perhaps top-5 of the protocols that the paper has.
    """
    rows = [["", *columns.values(), "published", "best epoch"]]
    for name, result in results.items():
        values = [f"{result[column]:.2f} %" for column in columns]
        paper = " / ".join(f"{value:.1f} %" for value in published.get(name, ()))
        best = result.get("best_on_validation")
        rows.append([name, *values, paper or "–", f"{best['top1']:.2f} % ({best['epoch']})" if best else "–"])
    notes = [
        "published: top-1 / top-5 of a ResNet-50 pretrained on ImageNet for 1000 epochs, arXiv 2103.03230",
        "best epoch: its top-1, chosen on the validation images themselves; the other columns are the last epoch's",
    ]
    return "\n".join([aligned(rows), *notes])
