"""Detectors on an encoder: their parts, what of them is frozen, the schedule, and the scores."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

from barlow_recipes.detection import scores
from barlow_recipes.detection.models import AlignedPool, C4Heads, DetectorOptions, build_detector
from barlow_recipes.detection.recipes import COCO, VOC, learning_rate_factor
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import UsageError

OPTIONS = {
    "classes": 2, "masks": True, "neck": "c4", "frozen": False, "short_side": (64,), "max_side": 128,
    "anchor_sizes": (16, 32), "anchors_per_image": 32, "rois_per_image": 8, "candidates": (100, 100),
    "proposals": (20, 10), "roi_size": 4, "fpn_channels": 8, "precision": "fp32",
}  # fmt: skip
FPN = {"neck": "fpn", "anchor_sizes": (8, 16, 32, 48, 64)}
TARGET = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1])}
Build = Callable[..., Any]


@pytest.fixture
def build() -> Build:
    def build(arch: str = "resnet18", stem: str = "imagenet", **options: Any) -> Any:
        torch.manual_seed(0)
        return build_detector(build_encoder(arch, stem), DetectorOptions(**(OPTIONS | options)))

    return build


def images(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]


def targets(count: int = 2) -> list[dict[str, torch.Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 10:40] = 1
    return [TARGET | {"masks": masks} for _ in range(count)]


@pytest.mark.parametrize("neck", [{}, FPN], ids=["c4", "fpn"])
@pytest.mark.parametrize("masks", [False, True])
def test_every_parameter_learns_and_detections_are_in_the_image(
    neck: dict[str, Any], masks: bool, build: Build
) -> None:
    model = build(**neck, masks=masks).train()
    for name, parameter in model.named_parameters():  # zero-initialised residual branches hide what is before them
        if name.endswith("bn2.weight"):
            nn.init.ones_(parameter)
    losses = model(images(), targets())
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    model.roi_heads.score_thresh = 0.0
    for found in model(images()):
        assert len(found["boxes"])
        assert found["boxes"].min() >= 0
        assert found["boxes"].max() <= 64
        assert set(found["labels"].tolist()) <= {1, 2}
        if masks:
            assert found["masks"].shape == (len(found["boxes"]), 1, 64, 64)


def test_an_image_without_a_detection_has_no_mask(build: Build) -> None:
    model = build().eval()
    model.roi_heads.score_thresh = 1.0
    (found,) = model(images(1))
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 1, 64, 64)


def test_c4_boxes_and_masks_share_layer4_and_a_norm(build: Build) -> None:
    """In training layer4 sees each region once; conv1 to layer3 are the backbone, of stride 16."""
    model = build().train()
    assert isinstance(model.roi_heads, C4Heads)
    assert [name for name, _ in model.backbone.named_children()][-1] == "layer3"
    assert model.roi_heads.box_roi_pool.stride == 16
    assert isinstance(model.roi_heads.box_head.norm, nn.BatchNorm2d)
    seen: list[int] = []
    model.roi_heads.box_head.pretrained.register_forward_hook(lambda *_: seen.append(1))
    model(images(), targets())
    assert seen == [1]


@pytest.mark.parametrize(("arch", "stem", "stride"), [("resnet18", "cifar", 4), ("resnet50", "imagenet", 16)])
def test_stride_and_channels_are_found_out(arch: str, stem: str, stride: int, build: Build) -> None:
    model = build(arch, stem)
    assert model.roi_heads.box_roi_pool.stride == stride
    assert model.backbone.out_channels == (1024 if arch == "resnet50" else 256)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("neck", [{}, FPN], ids=["c4", "fpn"])
def test_a_frozen_encoder_stays_as_it_is(neck: dict[str, Any], build: Build) -> None:
    model = build(**neck, frozen=True)
    before = copy.deepcopy(build_encoder_state(model))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model(images(), targets()).values()).backward()
    optimizer.step()
    after = build_encoder_state(model)
    assert before.keys() == after.keys()
    assert len(before) > 100
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def build_encoder_state(model: nn.Module) -> dict[str, torch.Tensor]:
    names = ("conv1.", "bn1.", "layer")
    return {n: t for n, t in model.state_dict().items() if any(part.startswith(names) for part in bare(n))}


def bare(name: str) -> list[str]:
    """A name's endings that may begin with a stage of the encoder; the heads of FPN have layers of other names."""
    starts = ("backbone.pyramid.body.", "backbone.", "roi_heads.box_head.pretrained.")
    return [name.removeprefix(start) for start in starts if name.startswith(start)]


def test_pooling_is_aligned_to_pixels() -> None:
    """A linear map is sampled at the middles of the cells: torchvision's MultiScaleRoIAlign is off by half a pixel."""
    ramp = (torch.arange(16.0) + 0.5).expand(1, 1, 16, 16)  # the position of each pixel's middle, in strides
    pooled = AlignedPool(2, stride=4)({"0": ramp}, [torch.tensor([[16.0, 16, 32, 32]])], [(64, 64)])
    assert pooled[0, 0, 0].tolist() == pytest.approx([5.0, 7.0])


def test_other_encoders_and_anchors_are_refused(build: Build) -> None:
    with pytest.raises(UsageError, match="--arch small-cnn: expected a ResNet"):
        build("small-cnn")
    with pytest.raises(UsageError, match="--anchor-sizes: expected 5 for --neck fpn"):
        build(neck="fpn")


def test_bf16_is_for_the_stages_alone(build: Build) -> None:
    """Anchors and boxes would be as coarse as the features: four pixels at 800."""
    model = build(precision="bf16").train()
    assert model.backbone(torch.rand(1, 3, 64, 64)).dtype == torch.float32
    full, half = (
        build(precision=precision).eval().backbone(torch.rand(1, 3, 64, 64)) for precision in ("fp32", "bf16")
    )
    assert not torch.equal(full, half)
    assert all(loss.dtype == torch.float32 for loss in model(images(), targets()).values())


@pytest.mark.parametrize(
    ("recipe", "step", "expected"),
    [
        (VOC, 0, 0.0333),
        (VOC, 500, 0.1 * (0.333 + 0.667 / 2)),
        (VOC, 1000, 0.1),
        (VOC, 17_999, 0.1),
        (VOC, 18_000, 0.01),
        (VOC, 23_999, 0.001),
        (COCO, 0, 0.03 / 1000),
        (COCO, 59_999, 0.03),
        (COCO, 80_000, 0.0003),
    ],
)
def test_the_published_schedule(recipe: Any, step: int, expected: float) -> None:
    factor = learning_rate_factor(step, recipe.milestones, recipe.warmup, recipe.warmup_factor)
    assert recipe.learning_rate * factor == pytest.approx(expected)


def detections(boxes: list[list[float]], labels: list[int], confidence: list[float]) -> dict[str, torch.Tensor]:
    shape = torch.tensor(boxes).reshape(-1, 4)
    return {"boxes": shape, "labels": torch.tensor(labels, dtype=torch.long), "scores": torch.tensor(confidence)}


def truth(boxes: list[list[float]], labels: list[int], ignored: list[int]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "iscrowd": torch.tensor(ignored)}


ONE, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


@pytest.mark.parametrize(
    ("found", "there", "points", "expected"),
    {
        "all found": (([ONE, OTHER], [1, 1], [0.9, 0.8]), ([ONE, OTHER], [1, 1], [0, 0]), 101, 100.0),
        "another class": (([ONE], [2], [0.9]), ([ONE], [1], [0]), 101, 0.0),
        "an ignored one is not missed": (([ONE], [1], [0.9]), ([ONE, OTHER], [1, 1], [0, 1]), 101, 100.0),
        "nor is it wrong": (([OTHER, ONE], [1, 1], [0.9, 0.8]), ([ONE, OTHER], [1, 1], [0, 1]), 101, 100.0),
        # recall 1/2 with precision 1: 51 of 101 points, or 6 of 11
        "half, at 101 points": (([ONE], [1], [0.9]), ([ONE, OTHER], [1, 1], [0, 0]), 101, 100 * 51 / 101),
        "half, at 11 points": (([ONE], [1], [0.9]), ([ONE, OTHER], [1, 1], [0, 0]), 11, 100 * 6 / 11),
    }.values(),
)
def test_average_precision(found: Any, there: Any, points: int, expected: float) -> None:
    metric = scores.build_metric(masks=False, recall_points=points)
    metric.update([detections(*found)], [truth(*there)])
    measured = scores.scores_of(metric.compute(), masks=False)
    assert measured["box"]["AP"] == pytest.approx(expected, abs=1e-4)


def test_ap_counts_all_ious_ap50_and_ap75_one() -> None:
    """A box of IoU 0.8 is found at 0.5 to 0.8: at seven of the ten."""
    metric = scores.build_metric(masks=False, recall_points=101)
    metric.update([detections([[0.0, 0.0, 10.0, 8.1]], [1], [0.9])], [truth([ONE], [1], [0])])
    measured = scores.scores_of(metric.compute(), masks=False)["box"]
    assert {name: round(value or 0, 3) for name, value in measured.items()} == {
        "AP": 70.0,
        "AP50": 100.0,
        "AP75": 100.0,
    }


def test_nothing_to_find_has_no_score() -> None:
    metric = scores.build_metric(masks=False, recall_points=101)
    metric.update([detections([], [], [])], [truth([ONE], [1], [1])])
    assert scores.scores_of(metric.compute(), masks=False)["box"]["AP"] is None


def test_precise_norms_are_the_mean_of_the_batches() -> None:
    norm, frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen = norm, frozen

        def train(self, mode: bool = True) -> "Model":
            super().train(mode)
            self.frozen.eval()
            return self

    model = Model()
    batches = [torch.randn(8, 3, 4, 4) + shift for shift in (0.0, 1.0, 2.0)]
    with scores.Precise(model):
        for batch in batches:
            norm(batch)
            frozen(batch)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1
    assert torch.equal(frozen.running_var, torch.ones(3))  # type: ignore[arg-type]


def test_the_table_is_markdown() -> None:
    ours = {"box": {"AP": 12.34, "AP50": 30.0, "AP75": None}, "mask": {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}}
    assert scores.table({"ours": ours}).splitlines() == [
        "|  | box AP | box AP50 | box AP75 | mask AP | mask AP50 | mask AP75 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| ours | 12.3 | 30.0 | – | 1.0 | 2.0 | 3.0 |",
    ]
