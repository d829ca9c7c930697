"""Checks what a run of the demo left in its output folder: it learned, and it drew.

python .ci/check_demo.py FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import torch

# Points of accuracy with one label per class: what the full run promises, kept by the shortened one as well.
ABOVE_UNTRAINED, ABOVE_PIXELS = 15, 8


def check_metrics(rows: list[dict[str, Any]]) -> str:
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) > 1, f"expected several steps in the metrics, found {len(steps)}"
    for row in steps:
        for name in ("loss", "on_diagonal", "off_diagonal", "effective_rank"):
            assert row[name] is not None, f"{name} is not finite at step {row['step']}"
            assert math.isfinite(row[name]), f"{name} is not finite at step {row['step']}"
    first, last = steps[0]["loss"], steps[-1]["loss"]
    assert last < first, f"expected the loss to fall, found {first} at first and {last} at last"

    one_label = {row["representation"]: row["linear_1"] for row in rows if row["kind"] == "evaluation"}
    for other, margin in {"untrained encoder": ABOVE_UNTRAINED, "raw pixels": ABOVE_PIXELS}.items():
        gain = one_label["pretrained encoder"] - one_label[other]
        assert gain >= margin, f"expected {margin} points above {other} with one label per class, found {gain:.1f}"
    return f"loss {first:.1f} to {last:.1f}; one label per class: {one_label}"


def check_picture(path: Path) -> None:
    pixels = mpimg.imread(path)
    assert min(pixels.shape[:2]) >= 300, f"{path.name} has only {pixels.shape[:2]} pixels"
    assert pixels.std() > 0.05, f"{path.name} is blank"


def main(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = check_metrics([json.loads(line) for line in lines])
    for name in ("curves.png", "cross_correlation.png"):
        check_picture(folder / name)
    for name in ("checkpoint.pt", "backbone.pt"):
        assert torch.load(folder / name, weights_only=True), f"{name} is empty"
    print(f"{folder.name}: {found}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
