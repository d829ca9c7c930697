"""How the tests start the program, and how they read what it leaves."""

import json
import os
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = {"cross_correlation.png", "curves.png", "report.html"}
FILES = PICTURES | {"backbone.pt", "checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", ".lock"}
SHORT_DIGITS = ("--epochs", 2, "--projector", "64-64")
SMALL_RESNET = (
    *("--arch", "resnet18", "--projector", "64-64-64", "--image-size", 32),
    *("--batch-size", 8, "--epochs", 2, "--workers", 0, "--device", "cpu"),
)


def environment() -> dict[str, str]:
    """Of a process that runs the program."""
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def rows(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def states(*folders: str | Path) -> list[dict[str, object]]:
    return [torch.load(Path(folder) / "checkpoint.pt", weights_only=True) for folder in folders]


def differences(left: object, right: object) -> list[str]:
    """The places where two nested states differ, tensors bit for bit."""
    if isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        return [f"{key}.{place}" for key in left for place in differences(left[key], right[key])]
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [""]  # type: ignore[arg-type]
    return [] if left == right else [""]
