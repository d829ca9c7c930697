"""The figure: average precision on shapes, of a pretrained encoder that is fine-tuned, and of a random frozen one.

Run as a program it is one side of the contrast, with one thread, and writes its scores: both sides at once keep two
cores busy.
"""

import json
import sys
import time
from collections import OrderedDict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")

import shapes

SIDES = ("pretrained", "frozen")
WANTED = 50.0  # percent: the mean AP over IoU 0.5, 0.55, ..., 0.95; other rounding moves each AP by several
EPOCHS, BATCH_SIZE, SIDE = 4, 64, 64  # of the pretraining
ARCH = "timm/test_resnet"  # of 0.4 M parameters: torchvision's smallest ResNet, resnet18, takes six times as long
FLAGS = (
    *("--arch", ARCH, "--anchor-sizes", 16, 24, 36, 48, 64),
    *("--short-side", 96, "--candidates", 200, 200, "--proposals", 60, 30, "--anchors-per-image", 16),
    *("--rois-per-image", 16, "--batch-size", 8, "--warmup", 10, "--learning-rate", 0.04),
    *("--precise-batches", 10, "--workers", 0, "--device", "cpu"),
)
ITERATIONS = {"voc": 450, "coco": 420}
# With 16 channels and 500 iterations, pyramid and heads make do with random features: AP 62.9 on the VOC tree.
CHANNELS = {"voc": 8, "coco": 12}


@pytest.mark.figure
@pytest.mark.timeout(900)
def test_a_pretrained_encoder_detects_what_random_frozen_features_do_not(tmp_path: Path) -> None:
    """Same data, heads, iterations and rates. The form alone tells the classes apart; colours are random.

    What is shown is the transfer as a whole, pretraining and fine-tuning against neither: with 0.4 M parameters and two
    minutes the pretraining's own part is small. On two idle cores both sides together take less than three minutes.
    """
    from programs import start

    shapes.voc_tree(tmp_path / "voc", train=600, test=60)
    shapes.coco_tree(tmp_path / "coco", train=600, test=60)
    list(shapes.pictures(tmp_path / "unlabelled" / "all", 512))
    with ExitStack() as stack:
        runs = [stack.enter_context(start([sys.executable, __file__, side, tmp_path], tmp_path)) for side in SIDES]
        assert [run.wait(800) for run in runs] == [0, 0], "\n".join(run.output + run.errors for run in runs)
    found = {side: json.loads((tmp_path / side / "scores.json").read_text()) for side in SIDES}
    print(json.dumps(found))
    for layout, kind in (("voc", "box"), ("coco", "box"), ("coco", "mask")):
        assert found["pretrained"][layout][kind]["AP"] > WANTED, (layout, kind, found)
        assert found["frozen"][layout][kind]["AP"] < WANTED, (layout, kind, found)


def pretrain(images: Path, out: Path) -> None:
    """Barlow Twins on images without labels, by the parts of the pretraining; the encoder's state_dict in ``out``."""
    from barlow_loss import BarlowTwinsLoss, Projector
    from barlow_recipes.encoders import build_encoder
    from barlow_recipes.images import load_images
    from barlow_recipes.models import BarlowTwins
    from barlow_recipes.optimization import build_optimizer, build_schedule
    from barlow_recipes.settings import Settings

    torch.manual_seed(0)
    encoder = build_encoder(ARCH)
    model = BarlowTwins(encoder.module, Projector(encoder.features, 256, 256, num_layers=2))
    views = {"crop_scale": 0.4, "blur": (0.0, 0.0), "solarize": (0.0, 0.0)}
    how = {"image_size": SIDE, "batch_size": BATCH_SIZE, "workers": 0, "loader_timeout": 60, "probe": False}
    data = load_images(Settings(data=str(images), **views, **how))  # type: ignore[arg-type]
    optimizer = build_optimizer("adamw", model, batch_size=256, lr_weights=2e-3, lr_biases=2e-3, weight_decay=1e-4)
    schedule = build_schedule(optimizer, EPOCHS * len(data.pairs), warmup_steps=5)
    loss_fn = BarlowTwinsLoss(0.02)
    for epoch in range(EPOCHS):
        for batch in data.pairs.batches(epoch):
            optimizer.zero_grad()
            loss_fn(*map(model, batch.views)).backward()
            optimizer.step()
            schedule.step()
    torch.save(encoder.module.state_dict(), out)


def pyramid_detector(width: int, encoder: Any, settings: Any, *, classes: int, masks: bool) -> Any:
    """All four stages see the image, a feature pyramid is on top: C4 would need larger images and more time."""
    from torch import nn
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    from barlow_recipes.detection.models import ASPECT_RATIOS, STAGES, Pretrained

    names = ("conv1", "bn1", "act1", "maxpool", *STAGES)
    stages = Pretrained(OrderedDict((name, getattr(encoder.module, name)) for name in names), settings, STAGES)
    with torch.no_grad():
        widths = [features.shape[1] for features in stages.eval()(torch.zeros(1, 3, 128, 128)).values()]
    pyramid = FeaturePyramidNetwork(widths, width, LastLevelMaxPool(), nn.BatchNorm2d)
    backbone: Any = nn.Sequential(OrderedDict(stages=stages, pyramid=pyramid))
    backbone.out_channels = width
    heads = {
        "box_roi_pool": MultiScaleRoIAlign([*STAGES], 7, sampling_ratio=2),
        "box_head": FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], nn.BatchNorm2d),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        "mask_roi_pool": MultiScaleRoIAlign([*STAGES], 14, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(width, [width] * 4, 1, nn.BatchNorm2d),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
    }
    for layer, deviation in ((heads["box_predictor"].cls_score, 0.01), (heads["box_predictor"].bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    anchors = [(size,) for size in settings.anchor_sizes]
    return (MaskRCNN if masks else FasterRCNN)(
        backbone,
        min_size=settings.short_side,
        max_size=1333,
        rpn_anchor_generator=AnchorGenerator(anchors, [ASPECT_RATIOS] * len(anchors)),
        rpn_pre_nms_top_n_train=settings.candidates[0],
        rpn_pre_nms_top_n_test=settings.candidates[1],
        rpn_post_nms_top_n_train=settings.proposals[0],
        rpn_post_nms_top_n_test=settings.proposals[1],
        rpn_batch_size_per_image=settings.anchors_per_image,
        box_batch_size_per_image=settings.rois_per_image,
        **{name: part for name, part in heads.items() if masks or not name.startswith("mask")},
    )


def main(side: str, root: Path) -> None:
    """``pretrained``: pretrain, and fine-tune on both trees; ``frozen``: train heads on random weights."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import transfer_detection

    torch.set_num_threads(1)
    started, found = time.perf_counter(), {}
    weights, extra = "random", ["--freeze-backbone"]
    if side == "pretrained":
        weights, extra = str(root / "encoder.pt"), []
        pretrain(root / "unlabelled", Path(weights))
    for layout in ("voc", "coco"):
        out = root / side / layout
        places = ("--data", root / layout, "--weights", weights, "--out", out, "--iterations", ITERATIONS[layout])
        transfer_detection.build_detector = partial(pyramid_detector, CHANNELS[layout])
        if transfer_detection.main([*map(str, (*FLAGS, *places, *extra))]):
            raise SystemExit(f"{layout} has failed")
        found[layout] = json.loads((out / "results.json").read_text())["scores"]
    found["seconds"] = time.perf_counter() - started
    (root / side / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
