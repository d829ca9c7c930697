"""The report on the views' embeddings: plain numbers, their table and a verdict. It measures nothing itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CollapseReport", "PairReports"]

# A judgement, not a theorem: random embeddings reach most of the attainable rank, collapsed ones a few directions.
_LOW_RANK = 0.05
_LITTLE_AGREEMENT = 0.1
# The mean of squares over D(D − 1) entries hardly varies, so 10 % above the floor is signal.
_AT_THE_FLOOR = 1.1


@dataclass(frozen=True)
class CollapseReport:
    """What :func:`barlow_loss.collapse_report` measured; ``print(report)`` is a table with the meaning of each number.

    Attributes:
        n: samples N.
        d: features D.
        lambd: λ of the loss reported.
        eps: ε of the loss reported.
        loss: on_diagonal + λ·off_diagonal.
        loss_noise_floor: λ·D(D − 1)/(N − 1), the part of the loss that chance makes.
        on_diagonal: Σ_i (C_ii − 1)²; 0 where the views agree, D at collapse.
        off_diagonal: Σ_{i≠j} C_ij².
        off_diagonal_noise_floor: D(D − 1)/(N − 1), its value for random embeddings.
        mean_diagonal: mean of C_ii, the correlation of the views, in [−1, 1].
        off_diagonal_rms: root of the mean of C_ij², i ≠ j, in [0, 1]; 0 for D = 1.
        off_diagonal_rms_noise_floor: 1/√(N − 1), its value for random embeddings.
        dead_features: features that carry nothing in one view or both: v ≤ ε, so that ε makes more than half of v + ε,
            or a standard deviation below the spacing of the dtype's numbers around the mean, which rounding can make.
        std_min: smallest standard deviation (biased) of a feature, over both views.
        std_p10: their 10 % quantile.
        std_median: their median.
        std_p90: their 90 % quantile.
        std_max: the largest.
        effective_rank_1: :func:`~barlow_loss.diagnostics.effective_rank` of the centred z1, at most min(N − 1, D).
        effective_rank_2: the same of z2.
        alignment: mean of ‖z1/‖z1‖ − z2/‖z2‖‖² over the pairs, in [0, 4]: 0 for equal directions, 2 for unrelated ones.
            1 − alignment/2 is the mean cosine. Small alignment alone proves nothing: collapse has it too.
    """

    n: int
    d: int
    lambd: float
    eps: float
    loss: float
    loss_noise_floor: float
    on_diagonal: float
    off_diagonal: float
    off_diagonal_noise_floor: float
    mean_diagonal: float
    off_diagonal_rms: float
    off_diagonal_rms_noise_floor: float
    dead_features: int
    std_min: float
    std_p10: float
    std_median: float
    std_p90: float
    std_max: float
    effective_rank_1: float
    effective_rank_2: float
    alignment: float

    def as_dict(self) -> dict[str, float | int]:
        """The fields by name, as plain numbers for a logger."""
        return asdict(self)

    @property
    def attainable_rank(self) -> int:
        """min(N − 1, D), which no centred batch exceeds."""
        return min(self.n - 1, self.d)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each reason to worry; empty where there is none."""
        if not math.isfinite(self.loss):
            return ("the loss is not finite: NaN, infinity or overflow in the embeddings",)
        found: list[str] = []
        if self.dead_features > 0:
            found.append(f"{self.dead_features} of {self.d} features are dead: ε or rounding outweighs their variance")
        rank = min(self.effective_rank_1, self.effective_rank_2)
        if rank < _LOW_RANK * self.attainable_rank or rank < 2 <= self.attainable_rank:
            found.append(f"rank collapse: {rank:.3g} effective directions of {self.attainable_rank} attainable")
        if self.mean_diagonal < _LITTLE_AGREEMENT:
            found.append(
                f"the views share little, mean diagonal {self.mean_diagonal:.2g}: untrained, or pairs mixed up"
            )
        return tuple(found)

    @property
    def verdict(self) -> str:
        """The warnings, or what the off-diagonal says where there are none."""
        if self.warnings:
            return "\n".join(f"WARNING: {warning}" for warning in self.warnings)
        if self.off_diagonal_rms <= _AT_THE_FLOOR * self.off_diagonal_rms_noise_floor:
            return "No sign of collapse; as decorrelated as a batch of this size can show."
        ratio = self.off_diagonal_rms / self.off_diagonal_rms_noise_floor
        return (
            f"No sign of collapse; the off-diagonal is {ratio:.3g} times its noise floor: features are still redundant."
        )

    def __str__(self) -> str:
        head = f"N = {self.n} samples, D = {self.d} features, λ = {self.lambd:g}, ε = {self.eps:g}"
        rows = [("quantity", "value", "compare with", "meaning"), *self._rows()]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        table = [f"{q:<{widths[0]}}  {v:>{widths[1]}}  {c:<{widths[2]}}  {meaning}" for q, v, c, meaning in rows]
        return "\n".join([head, *(line.rstrip() for line in table), self.verdict])

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        head, *lines = str(self).splitlines()
        rows = [("quantity", "value", "compare with", "meaning"), *self._rows()]
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        verdict = "<br>".join(map(escape, lines[len(rows) :]))
        return f"<p>{escape(head)}</p><table>{table}</table><p>{verdict}</p>"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        n, d, top = _number(self.n), _number(self.d), _number(self.attainable_rank)
        off_floor = _number(self.off_diagonal_noise_floor)
        return [
            ("loss", _number(self.loss), f"floor {_number(self.loss_noise_floor)}", "on-diagonal + λ·off-diagonal"),
            ("on-diagonal", _number(self.on_diagonal), f"collapse {d}", "Σ (C_ii − 1)²: 0 where the views agree"),
            ("off-diagonal", _number(self.off_diagonal), f"floor {off_floor}", "Σ C_ij², i ≠ j: redundancy"),
            ("mean diagonal", _number(self.mean_diagonal), "best 1", "correlation of the views, per feature"),
            (
                "off-diagonal RMS",
                _number(self.off_diagonal_rms),
                f"floor {_number(self.off_diagonal_rms_noise_floor)}",
                f"correlation of different features; random: 1/√(N − 1) at N = {n}",
            ),
            ("dead features", _number(self.dead_features), f"of {d}", "variance lost in ε or in rounding"),
            ("feature std, min", _number(self.std_min), f"√ε {_number(math.sqrt(self.eps))}", "spread over the batch"),
            ("feature std, 10 %", _number(self.std_p10), "", ""),
            ("feature std, median", _number(self.std_median), "", ""),
            ("feature std, 90 %", _number(self.std_p90), "", ""),
            ("feature std, max", _number(self.std_max), "", ""),
            ("effective rank, z1", _number(self.effective_rank_1), f"at most {top}", "directions in use (RankMe)"),
            ("effective rank, z2", _number(self.effective_rank_2), f"at most {top}", ""),
            ("alignment", _number(self.alignment), "best 0, unrelated 2", "squared distance of a pair's directions"),
        ]


class PairReports(dict[tuple[int, int], CollapseReport]):
    """The :class:`CollapseReport` of every pair of views: (i, j) with i < j, counted from 0, to its report.

    ``print`` shows a line for each pair, and the whole table of the worst.
    """

    def __init__(self, reports: Mapping[tuple[int, int], CollapseReport]) -> None:
        super().__init__(reports)

    @property
    def worst(self) -> tuple[int, int]:
        """The pair whose loss is not finite, or with the most warnings, and of these the one with the highest loss."""

        def badness(pair: tuple[int, int]) -> tuple[bool, int, float]:
            report = self[pair]
            return not math.isfinite(report.loss), len(report.warnings), report.loss

        return max(self, key=badness)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        head = ("pair", "loss", "mean diagonal", "off-diagonal RMS", "rank", "rank", "dead", "warnings")
        rows = [head, *(_line(pair, report) for pair, report in self.items())]
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, f"Worst: {_named(self.worst)}, here as z1 and z2", str(self[self.worst])])


def _named(pair: tuple[int, int]) -> str:
    """As a user counts the arguments."""
    return f"z{pair[0] + 1}, z{pair[1] + 1}"


def _line(pair: tuple[int, int], report: CollapseReport) -> tuple[str, ...]:
    ranks = report.effective_rank_1, report.effective_rank_2
    numbers = report.loss, report.mean_diagonal, report.off_diagonal_rms, *ranks, report.dead_features
    return _named(pair), *map(_number, numbers), str(len(report.warnings))


def _number(value: float) -> str:
    """Four significant digits, and thousands spelt out."""
    return f"{value:,.0f}" if isinstance(value, int) or 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
