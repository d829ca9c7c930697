"""The ablations as tables and a picture: ours beside the paper's, and whether they point the same way."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from barlow_recipes.ablation import DIGITS, Way
from barlow_recipes.ablation_rows import ALIKE, BASE, GROUPS, LESS, Group, Row, chosen
from barlow_recipes.reporting import drawing

NEAR = 2.0  # percentage points: a mean difference that counts as none
HEADER = ("", "here", "difference", "in the paper", "difference", "direction")
Records = Sequence[Mapping[str, Any]]
# What stands in the picture of the cross-correlation matrix.
SHOWN = {
    "both terms": BASE,
    "on-diagonal alone": BASE.but(criterion="on"),
    "off-diagonal alone": BASE.but(criterion="off"),
}


class Measured(NamedTuple):
    """By way: a value for each seed."""

    accuracies: dict[Way, dict[int, float]]

    @classmethod
    def of(cls, records: Records) -> "Measured":
        found: dict[Way, dict[int, float]] = {}
        for record in records:
            if not record["search"]:
                found.setdefault(Way.of(record["way"]), {})[record["seed"]] = record["accuracy"]
        return cls(found)

    def of_way(self, way: Way) -> list[float]:
        return [value for _, value in sorted(self.accuracies.get(way, {}).items())]

    def differences(self, row: Row) -> list[float]:
        """Of each seed that all ways have: (way − base) − (other − other_base)."""
        if row.base is None:
            return []
        by_seed = [self.accuracies.get(way, {}) for way in row.ways()]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        signs = (1, -1, -1, 1)
        return [sum(sign * values[seed] for sign, values in zip(signs, by_seed, strict=False)) for seed in seeds]


def verdict(differences: Sequence[float], expected: str) -> str:
    """Whether every seed's difference points where the paper's does; of one seed alone there is none."""
    if len(differences) < 2 or not expected:
        return ""
    if expected == ALIKE:
        return "holds" if abs(statistics.fmean(differences)) <= NEAR else "does not hold"
    agreeing = sum((value < 0) == (expected == LESS) for value in differences)
    if agreeing in (0, len(differences)):
        return "holds" if agreeing else "does not hold"
    return f"unclear ({agreeing} of {len(differences)} seeds)"


def spread(values: Sequence[float], sign: str = "") -> str:
    """The mean and the standard deviation over the seeds."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):{sign}.1f}".replace("-", "−")
    return text + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(group: Group, measured: Measured) -> str:
    lines: list[Sequence[str]] = [HEADER, ("---", *["---:"] * 4, "---")]
    bases: list[Way] = []
    for row in group.rows:
        if row.base and row.base not in bases and not row.other:
            bases.append(row.base)
            paper = "" if group.paper is None else f"{group.paper}"
            lines.append((f"**{base_name(row.base)}**", spread(measured.of_way(row.base)), "", paper, "", ""))
        differences = measured.differences(row)
        own = "" if row.other else spread(measured.of_way(row.way))
        numeric = isinstance(row.paper, float) and group.paper is not None
        paper = f"{row.paper - group.paper:+.1f}".replace("-", "−") if numeric else ""  # type: ignore[operator]
        lines.append(
            (row.name, own, spread(differences, "+"), f"{row.paper}", paper, verdict(differences, row.expected))
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def base_name(way: Way) -> str:
    width = f", {way.options[0][1]} wide" if way.options else ""
    return way.method + width + (f", {way.data}" if way.data != DIGITS else "")


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the pages of the documentation, by the name of the marks."""
    measured = Measured.of(results["records"])
    tables = {f"ablations-{group.name}": table(group, measured) for group in groups_of(results)}
    return tables | {"ablations-how": how(results), "ablations-embeddings": embeddings(results["records"])}


def groups_of(results: Mapping[str, Any]) -> list[Group]:
    return chosen(results["settings"]["only"])


def how(results: Mapping[str, Any]) -> str:
    """In words: what was measured, and what came out."""
    settings, measured = results["settings"], Measured.of(results["records"])
    verdicts = [verdict(measured.differences(row), row.expected) for group in groups_of(results) for row in group.rows]
    counts = [sum(text.startswith(start) for text in verdicts) for start in ("holds", "does not", "unclear")]
    minutes = sum(record["seconds"] for record in results["records"]) / 60
    rates = {
        f"{Way.of(record['way']).method}, {Way.of(record['way']).data}": record["rate"] for record in results["chosen"]
    }
    found = "; ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return (
        f"Of {sum(map(bool, verdicts))} directions of the paper {counts[0]} hold here and {counts[1]} do not; in "
        f"{counts[2]} the {settings['seeds']} seeds disagree. Learning rates found by search: {found}. "
        f"All {len(results['records'])} runs took {minutes:.0f} minutes of one core, with torch "
        f"{results['environment']['versions']['torch']}."
    )


def embeddings(records: Records) -> str:
    """What the methods' embeddings look like: the means over the seeds."""
    rows = {row.name: row.way for group in GROUPS for row in group.rows if group.name in ("methods", "terms")}
    lines: list[Sequence[str]] = [("", "same image", "other images", "effective rank"), ("---", *["---:"] * 3)]
    for name, way in {"**Barlow Twins**": BASE, **rows}.items():
        own = [record for record in records if Way.of(record["way"]) == way and not record["search"]]
        means = (statistics.fmean(record[kind] for record in own) for kind in ("same", "other", "rank"))
        if own:
            lines.append((name, *(f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 2, 0), strict=True))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_differences(path: Path, results: Mapping[str, Any]) -> None:
    """A panel for each group: our difference to the group's first row, and the paper's where it has a number."""
    measured = Measured.of(results["records"])
    shown = groups_of(results)
    height = sum(len(group.rows) + 2 for group in shown)
    with drawing(path, (9.0, 0.22 * height)) as figure:
        ratios = [len(group.rows) + 1 for group in shown]
        for axes, group in zip(
            figure.subplots(len(shown), height_ratios=ratios, squeeze=False)[:, 0], shown, strict=True
        ):
            draw_group(axes, group, measured)
        figure.axes[0].legend(loc="lower left", fontsize="x-small")
        figure.axes[-1].set_xlabel(
            "difference in percentage points; whiskers: the smallest and the greatest seed", fontsize="small"
        )


def draw_group(axes: Any, group: Group, measured: Measured) -> None:
    rows = [(row, found) for row in group.rows if (found := measured.differences(row))]
    means = [statistics.fmean(found) for _, found in rows]
    reach = [[mean - min(found), max(found) - mean] for mean, (_, found) in zip(means, rows, strict=True)]
    axes.barh(
        range(len(rows)), means, xerr=[*zip(*reach, strict=True)] or None, height=0.6, color="#4878a8", label="here"
    )
    paper = [
        (place, row.paper - (group.paper or 0)) for place, (row, _) in enumerate(rows) if isinstance(row.paper, float)
    ]
    axes.plot([value for _, value in paper], [place for place, _ in paper], "D", color="#c44e52", ms=5, label="paper")
    axes.set_yticks(range(len(rows)), [row.name for row, _ in rows], fontsize="x-small")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.axvline(0, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set_title(f"{group.title} ({group.source})", fontsize="small", loc="left")


def draw_matrices(path: Path, records: Records) -> None:
    """C of images that were not trained on, after training with both terms of the loss and with either alone.

    Nothing is drawn where no such run was made.
    """
    found = {
        name: record["C"]
        for name, way in SHOWN.items()
        for record in records
        if "C" in record and way == Way.of(record["way"])
    }
    if not found:
        return
    with drawing(path, (9.0, 3.4)) as figure:
        for axes, (name, matrix) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
            axes.set_title(name, fontsize="medium")
            axes.set_xticks([]), axes.set_yticks([])
        figure.colorbar(image, ax=figure.axes, fraction=0.02)


def is_shown(record: Mapping[str, Any]) -> bool:
    """Whether the picture needs the matrix of this run."""
    return record["seed"] == 0 and not record["search"] and record["way"] in SHOWN.values()
