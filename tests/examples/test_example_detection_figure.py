"""The figure: average precision on shapes, of a pretrained encoder that is fine-tuned, and of a random frozen one.

Run as a program it is one side of the contrast, with one thread, and writes its scores: both sides at once keep two
cores busy.
"""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

pytest.importorskip("pycocotools")

import shapes

SIDES = ("pretrained", "frozen")
WANTED = 50.0  # percent: the mean AP over IoU 0.5, 0.55, ..., 0.95; other rounding moves each AP by several
EPOCHS, BATCH_SIZE, SIDE = 4, 64, 64  # of the pretraining
ARCH = "timm/test_resnet"  # of 0.4 M parameters: torchvision's smallest ResNet, resnet18, takes six times as long
FLAGS = (
    *("--arch", ARCH, "--neck", "fpn", "--anchor-sizes", 16, 24, 36, 48, 64),
    *("--short-side", 96, "--candidates", 200, 200, "--proposals", 60, 30, "--anchors-per-image", 16),
    *("--rois-per-image", 16, "--batch-size", 8, "--warmup", 10, "--learning-rate", 0.04),
    *("--precise-batches", 10, "--workers", 0, "--device", "cpu"),
)
OWN = {  # with 16 channels and 500 iterations, pyramid and heads make do with random features: AP 62.9 on the VOC tree
    "voc": ("--fpn-channels", 8, "--iterations", 450),
    "coco": ("--fpn-channels", 12, "--iterations", 420),
}


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
        places = ("--data", root / layout, "--weights", weights, "--out", out)
        if transfer_detection.main([*map(str, (*FLAGS, *OWN[layout], *places, *extra))]):
            raise SystemExit(f"{layout} has failed")
        found[layout] = json.loads((out / "results.json").read_text())["scores"]
    found["seconds"] = time.perf_counter() - started
    (root / side / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
