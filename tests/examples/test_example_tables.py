"""Tables line up."""

from typing import Any

from barlow_recipes.metrics import NO_ACCURACY, accuracy_cells, accuracy_table, aligned, epoch_line, label_of


def test_the_table_lines_up_also_with_gaps() -> None:
    rows = {"raw pixels": {"knn": 9.5}, "encoder": {"knn": 98.25, "linear_1": 3.0, "linear_all": 100.0}}
    assert aligned(accuracy_cells(rows)).splitlines() == [
        "             10-NN  1 label/class  all labels",
        "─────────────────────────────────────────────",
        "raw pixels   9.5 %              –           –",
        "encoder     98.2 %          3.0 %     100.0 %",
    ]
    assert label_of("linear_10") == "10 labels/class"


def test_without_an_image_to_measure_on_a_sentence_says_so() -> None:
    row: dict[str, Any] = {
        "epoch": 3,
        "unreadable": 0,
        "unreadable_in_probe": 4,
        "images_per_second": 9,
        "waiting": 0.5,
    }
    assert accuracy_table({"raw pixels": row, "encoder": row}) == NO_ACCURACY
    assert epoch_line(row, 9).startswith(f"epoch 3/9: {NO_ACCURACY}, 9 images/s")
    assert "no accuracy" not in epoch_line(row | {"knn": 9.0}, 9)
    del row["unreadable_in_probe"]  # there was no look
    assert epoch_line(row, 9).startswith("epoch 3/9: 9 images/s")


def test_the_line_of_an_epoch() -> None:
    row: dict[str, Any] = {"kind": "epoch", "step": 7, "epoch": 3, "unreadable": 2, "unreadable_in_probe": 1}
    row |= {"images_per_second": 1234.5, "waiting": 0.43, "knn": 50.04, "linear_all": 60.0}
    told = "10-NN 50.0 %, all labels 60.0 %, 1,234 images/s, 43% of the time waiting for them"
    assert epoch_line(row, 9) == f"epoch 3/9: {told}, 2 unreadable images replaced"
