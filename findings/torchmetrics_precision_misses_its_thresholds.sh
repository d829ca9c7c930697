#!/usr/bin/env bash
# torchmetrics 1.9.0 with pycocotools 2.0.11 (and with faster-coco-eval 1.8.0): MeanAveragePrecision of plain boxes.
#
# Guess: with backend="pycocotools" and nothing else given, map is the first number that pycocotools gives.
# Seen: torchmetrics hands thresholds of its own over, made by torch.linspace in float32: 0.6 is 0.60000002 and 0.8 is
# 0.80000001, and of the 101 points of recall 96 are others, too. Where 3 of 5 objects are found without an error map is
# 0.5941, and pycocotools says 0.6040; so, of 50 objects, for 20 of the 50 numbers that can be found. Four objects that
# are all found at an IoU of 0.6 have 0.2 in place of 0.3, at 0.8 they have 0.6 in place of 0.7. With faster-coco-eval
# it is the same. With numpy's thresholds given by hand all numbers are pycocotools'.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torchmetrics==1.9.0 pycocotools==2.0.11 faster-coco-eval==1.8.0 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import contextlib
import io

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

NUMPYS = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}


def scene(objects, found, height=10):
    """Squares of ten pixels side by side, of which the first are found, each as a box of its own width."""
    there = [[20.0 * number, 0.0, 10.0, 10.0] for number in range(objects)]
    return there, [[*box[:3], float(height)] for box in there[:found]], np.linspace(0.9, 0.5, found)


def of_pycocotools(there, boxes, scores):
    of_all = {"image_id": 1, "category_id": 1, "area": 100.0, "iscrowd": 0}
    annotations = [of_all | {"id": number, "bbox": box} for number, box in enumerate(there, 1)]
    found = [{"image_id": 1, "category_id": 1, "bbox": b, "score": float(s)} for b, s in zip(boxes, scores)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1}], "info": {}}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def of_torchmetrics(there, boxes, scores, backend="pycocotools", **thresholds):
    metric = MeanAveragePrecision(box_format="xywh", backend=backend, **thresholds)
    found = {"boxes": torch.tensor(boxes), "labels": torch.ones(len(boxes)).long(), "scores": torch.tensor(scores)}
    metric.update([found], [{"boxes": torch.tensor(there), "labels": torch.ones(len(there)).long()}])
    return float(metric.compute()["map"])


def close(a, b):
    return abs(a - b) < 1e-4


for what, official, theirs in (
    ((5, 3), 0.6040, 0.5941),
    ((10, 7), 0.6931, 0.7030),
    ((4, 4, 6), 0.3, 0.2),
    ((4, 4, 8), 0.7, 0.6),
):
    assert close(of_pycocotools(*scene(*what)), official), what
    for backend in ("pycocotools", "faster_coco_eval"):
        assert close(of_torchmetrics(*scene(*what), backend), theirs), (what, backend)
        assert close(of_torchmetrics(*scene(*what), backend, **NUMPYS), official), (what, backend)

scenes = [scene(50, found) for found in range(1, 51)]
others = [not close(of_pycocotools(*of_fifty), of_torchmetrics(*of_fifty)) for of_fifty in scenes]
assert sum(others) == 20, sum(others)
print("as described")
PYTHON
