"""Flags of short runs of the program, and how the tests read what it leaves."""

import json
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = {"cross_correlation.png", "curves.png", "report.html"}
FILES = PICTURES | {"backbone.pt", "checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "settings.yaml", ".lock"}
SHORT_DIGITS = ("--epochs", 2, "--projector", "64-64")
# What a run imports late; a fork has it at once.
IMPORTED = (
    "PIL.Image", "matplotlib.pyplot", "sklearn.datasets", "sklearn.linear_model", "torch._dynamo",
    "torch.distributed.run", "torchvision.datasets.folder", "torchvision.transforms.v2", "tqdm", "imagenet_pretrain",
    "barlow_recipes.reporting",
)  # fmt: skip
SMALL = ("--batch-size", 8, "--epochs", 2, "--workers", 0, "--device", "cpu")
SMALL_CNN = ("--arch", "small-cnn", "--projector", "64-64", "--image-size", 28, *SMALL)
SMALL_RESNET = ("--arch", "resnet18", "--projector", "64-64-64", "--image-size", 32, *SMALL)


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
