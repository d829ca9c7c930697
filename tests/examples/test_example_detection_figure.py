"""The figure: average precision on shapes, of a pretrained encoder that is fine-tuned, and of a random frozen one."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from programs import start

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
pytest.importorskip("timm")

import shapes

PROGRAM = Path(__file__).with_name("shapes_transfer.py")
SIDES = ("pretrained", "frozen")
WANTED = 50.0  # percent: the mean AP over IoU 0.5, 0.55, ..., 0.95


@pytest.mark.figure
@pytest.mark.timeout(900)
def test_a_pretrained_encoder_detects_what_random_frozen_features_do_not(tmp_path: Path) -> None:
    """Same data, heads, iterations and rates. The form alone tells the classes apart; colours are random.

    What is shown is the transfer as a whole, pretraining and fine-tuning against neither: with 0.4 M parameters and two
    minutes the pretraining's own part is small. On two idle cores both sides together take less than three minutes.
    """
    shapes.voc_tree(tmp_path / "voc", train=600, test=60)
    shapes.coco_tree(tmp_path / "coco", train=600, test=60)
    shapes.class_folder(tmp_path / "unlabelled", 512)
    with ExitStack() as stack:
        runs = [stack.enter_context(start([sys.executable, PROGRAM, side, tmp_path], tmp_path)) for side in SIDES]
        assert [run.wait(800) for run in runs] == [0, 0], "\n".join(run.output + run.errors for run in runs)
    pretrained, frozen = (json.loads((tmp_path / side / "scores.json").read_text()) for side in SIDES)
    print(json.dumps({"pretrained": pretrained, "frozen": frozen}))
    for layout, kind in (("voc", "box"), ("coco", "box"), ("coco", "mask")):
        assert pretrained[layout][kind]["AP"] > WANTED, (layout, kind, pretrained)
        assert frozen[layout][kind]["AP"] < WANTED, (layout, kind, frozen)
