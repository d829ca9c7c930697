"""The paper's ablations, a row each: what is trained here, what is compared with it, and what the paper has.

Percentages of the paper are top-1 on ImageNet by a linear classifier. Source: Zbontar et al. (2021), arXiv 2103.03230;
those of VICReg are of Bardes et al. (2022), arXiv 2105.04906.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from barlow_recipes.ablation import COLORED, Way
from barlow_recipes.digits import CHANGES

BASE = Way()
LESS, MORE, ALIKE = "less", "more", "alike"
BASELINE = 71.4  # of the paper's ablations, 300 epochs


@dataclass(frozen=True)
class Row:
    """``way`` against ``base``; with ``other`` the difference of two such: (way − base) − (other − other_base)."""

    name: str
    way: Way
    base: Way | None = BASE
    expected: str = LESS  # in the paper, of the difference
    paper: float | str = ""  # percent, or words
    other: Way | None = None
    other_base: Way | None = None

    def ways(self) -> list[Way]:
        return [way for way in (self.way, self.base, self.other, self.other_base) if way]


@dataclass(frozen=True)
class Group:
    """A table; ``paper`` is the percentage of its first row, against which the others are compared."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    paper: float | None = None


def wide(method: str, width: int) -> Way:
    """Of the baseline's width the baseline itself, so that it is trained once."""
    usual = {"Barlow Twins": 512, "SimCLR": 128, "BYOL": 128}[method]
    return Way(method) if width == usual else Way(method).but(width=width)


def colored(method: str, *without: str) -> Way:
    return Way(method, COLORED, without=without)


SIZES, WIDTHS = (16, 32, 64, 256), (32, 128, 512, 2048)
REMOVED = (("grayscale",), ("grayscale", "color jitter"), ("grayscale", "color jitter", "solarize"))
LEFT = ("no grayscale", "no color jitter either", "crop only")

GROUPS = (
    Group("terms", "Terms of the loss", "table 5", (
        Row("only the on-diagonal term", BASE.but(criterion="on"), paper=57.3),
        Row("only the off-diagonal term", BASE.but(criterion="off"), paper=0.1),
        Row("normalised along the features too", BASE.but(criterion="feature norm"), paper=69.8),
        Row("no batch norm in the projector", BASE.but(batch_norm=False), expected=ALIKE, paper=71.2),
        Row("no batch norm, nothing standardised", BASE.but(criterion="covariance", batch_norm=False), paper=53.4),
        Row("cross-entropy with temperature", BASE.but(criterion="cross-entropy"), paper=63.3),
    ), BASELINE),
    Group("asymmetry", "Asymmetric twins", "table 6", (
        Row("stop-gradient", BASE.but(stop_gradient=True), paper=70.5),
        Row("predictor", BASE.but(predictor=True), paper=70.2),
        Row("both", BASE.but(stop_gradient=True, predictor=True), paper=61.3),
    ), BASELINE),
    Group("batch", "Batch size", "figure 2", (
        *(Row(f"Barlow Twins, {size}", Way("Barlow Twins", batch_size=size), BASE, "") for size in SIZES),
        *(Row(f"SimCLR, {size}", Way("SimCLR", batch_size=size), Way("SimCLR"), "") for size in SIZES),
        Row("Barlow Twins against SimCLR, from 128 to 16", Way(batch_size=16), BASE, MORE,
            "loses less: at 256 it loses 1.0, SimCLR about 4", Way("SimCLR", batch_size=16), Way("SimCLR")),
    )),
    Group("width", "Width of the embedding", "figure 4", (
        *(Row(f"{method}, {width}", wide(method, width), wide(method, 128), "")
          for method in ("Barlow Twins", "SimCLR", "BYOL") for width in WIDTHS if width != 128),
        *(Row(f"Barlow Twins against {method}, from 128 to 2048", wide("Barlow Twins", 2048), wide("Barlow Twins", 128),
              MORE, "gains to 16,384; the others saturate", wide(method, 2048), wide(method, 128))
          for method in ("SimCLR", "BYOL")),
    )),
    Group("depth", "Layers of the projector", "section 4", (
        Row("one layer", BASE.but(depth=1), paper="fewer layers are worse"),
        Row("two layers", BASE.but(depth=2), paper="fewer layers are worse"),
        Row("four layers", BASE.but(depth=4), expected=ALIKE, paper="saturates at three"),
        *(Row(f"{method}, {layers}", Way(method).but(depth=depth), Way(method), "")
          for method in ("SimCLR", "BYOL")
          for layers, depth in (("one layer", 1), ("three layers", 3), ("four layers", 4))),
    )),
    Group("augmentations", "Augmentations left out", "figure 3", (
        *(Row(f"{method}, {left}", colored(method, *removed), colored(method), "" if removed == REMOVED[0] else LESS,
              "" if removed == REMOVED[0] else "worse" if method != "BYOL" else "worse, by less")
          for method in ("Barlow Twins", "SimCLR", "BYOL") for removed, left in zip(REMOVED, LEFT, strict=True)),
        Row("Barlow Twins against BYOL, crop only", colored("Barlow Twins", *REMOVED[2]), colored("Barlow Twins"), LESS,
            "not robust, as SimCLR, unlike BYOL", colored("BYOL", *REMOVED[2]), colored("BYOL")),
        *(Row(f"Barlow Twins, grey digits without {change}", Way(without=(change,)), BASE, "") for change in CHANGES),
    )),
    Group("lambda", "λ", "figure 5", tuple(
        Row(f"λ = {lambd:g}", BASE.but(lambd=lambd), expected=ALIKE, paper="70.8 to 71.6 from 0.002 to 0.02")
        for lambd in (0.00128, 0.00255, 0.0102, 0.0204)
    )),
    Group("methods", "Other methods", "table 1", (
        Row("SimCLR", Way("SimCLR"), paper=69.3),
        Row("MoCo v2", Way("MoCo v2"), paper=71.1),
        Row("SimSiam", Way("SimSiam"), paper=71.3),
        Row("SwAV without multi-crop", Way("SwAV"), paper=71.8),
        Row("BYOL", Way("BYOL"), expected=MORE, paper=74.3),
        Row("VICReg", Way("VICReg"), expected=ALIKE, paper=73.2),
    ), 73.2),
)  # fmt: skip


def chosen(names: Iterable[str]) -> list[Group]:
    return [group for group in GROUPS if group.name in {*names}]


def ways_of(groups: Iterable[Group]) -> list[Way]:
    """All that is trained for these tables, each once."""
    return list(dict.fromkeys(way for group in groups for row in group.rows for way in row.ways()))
