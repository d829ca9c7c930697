"""Checks what a run of the example left in its output folder: it learned, and it drew.

python .ci/check_demo.py digits FOLDER
python .ci/check_demo.py fashion-mnist FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import torch

# Points of accuracy that a run promises; of the digits, the shortened run as well.
PROMISES = {
    "digits": ("linear_1", {"untrained encoder": 15, "raw pixels": 8}),
    "fashion-mnist": ("linear_all", {"untrained encoder": 25, "raw pixels": 25}),
}


def check_metrics(rows: list[dict[str, Any]], probe: str, margins: dict[str, int]) -> str:
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) > 1, f"expected several steps in the metrics, found {len(steps)}"
    for row in steps:
        for name in ("loss", "on_diagonal", "off_diagonal", "effective_rank"):
            assert row[name] is not None, f"{name} is not finite at step {row['step']}"
            assert math.isfinite(row[name]), f"{name} is not finite at step {row['step']}"
    first, last = steps[0]["loss"], steps[-1]["loss"]
    assert last < first, f"expected the loss to fall, found {first} at first and {last} at last"

    found = {row["representation"]: row[probe] for row in rows if row["kind"] == "evaluation"}
    for other, margin in margins.items():
        gain = found["pretrained encoder"] - found[other]
        assert gain >= margin, f"expected {margin} points above {other} by {probe}, found {gain:.1f}"
    return f"loss {first:.1f} to {last:.1f}; {probe}: {found}"


def check_picture(path: Path) -> None:
    pixels = mpimg.imread(path)
    assert min(pixels.shape[:2]) >= 300, f"{path.name} has only {pixels.shape[:2]} pixels"
    assert pixels.std() > 0.05, f"{path.name} is blank"


def check_page(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2, f"{path.name} has not its two pictures"
    assert "http" not in page.replace("http-equiv", ""), f"{path.name} points to the network"


def main(data: str, folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = check_metrics([json.loads(line) for line in lines], *PROMISES[data])
    for name in ("curves.png", "cross_correlation.png"):
        check_picture(folder / name)
    check_page(folder / "report.html")
    for name in ("checkpoint.pt", "backbone.pt"):
        assert torch.load(folder / name, weights_only=True), f"{name} is empty"
    print(f"{folder.name}: {found}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
