"""Tables line up, and the progress bar fits a terminal."""

import math
from typing import Any

import pytest
from tqdm import tqdm

from barlow_recipes.tables import BAR, accuracy_cells, aligned, epoch_line, label_of, progress


def test_the_table_lines_up_also_with_gaps() -> None:
    rows = {"raw pixels": {"knn": 9.5}, "encoder": {"knn": 98.25, "linear_1": 3.0, "linear_all": 100.0}}
    assert aligned(accuracy_cells(rows)).splitlines() == [
        "             10-NN  1 label/class  all labels",
        "─────────────────────────────────────────────",
        "raw pixels   9.5 %              –           –",
        "encoder     98.2 %          3.0 %     100.0 %",
    ]
    assert label_of("linear_10") == "10 labels/class"


def test_the_line_of_an_epoch() -> None:
    row: dict[str, Any] = {"kind": "epoch", "step": 7, "epoch": 3, "unreadable": 2, "images_per_second": 1234.5}
    row |= {"knn": 50.04, "linear_all": 60.0, "unreadable_in_probe": 1}
    assert (
        epoch_line(row, 9) == "epoch 3/9: 10-NN 50.0 %, all labels 60.0 %, 1,234 images/s, 2 unreadable images replaced"
    )


STEPS = {
    "of digits": (200, 134.0657, 54.5682, 15587.7, 27.1487, 3122.9, "134.1", "54.57", "15.59k", "27.15"),
    "of ImageNet": (5_004_000, 1342.4, 8191.9, 67_100_000.0, 254.31, 12_345.0, "1342", "8192", "67.1M", "254.3"),
    "at collapse": (5_004_000, 134_567.0, 32_768.0, 1.2345e9, 1.0, 12_345.0, "134.6k", "32.77k", "1.234G", "1"),
    "not finite": (200, math.nan, math.nan, math.nan, math.nan, 0.0, "nan", "nan", "nan", "nan"),
}


@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_the_progress_bar_fits_a_terminal_of_100_columns(row: tuple[Any, ...]) -> None:
    """5,004,000 steps are 1,000 epochs of ImageNet in batches of 256, in two weeks."""
    total, *values, loss, on_diagonal, off_diagonal, rank = row
    names = ("loss", "on_diagonal", "off_diagonal", "effective_rank", "images_per_second")
    says = progress(dict(zip(names, values, strict=True)))
    parts = [f"loss {loss}", f"on-diag {on_diagonal}", f"off-diag {off_diagonal}", f"rank {rank}"]
    assert says == ", ".join([*parts, f"{values[-1]:,.0f} img/s"])
    shown = tqdm.format_meter(total // 3, total, 5 * 24 * 3600, ncols=100, bar_format=BAR, postfix=says)
    assert f" {total // 3}/{total} [" in shown
    assert shown.endswith(f", {says}]")
    assert len(shown) <= 100
