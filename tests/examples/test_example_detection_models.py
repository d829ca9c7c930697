"""Detectors on an encoder: their parts, what of them is frozen, the schedule, and the scores."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("pycocotools")

import transfer_detection as training
from barlow_recipes.detection.data import Batch
from barlow_recipes.detection.models import Pretrained, SharedRegions, build_detector
from barlow_recipes.detection.settings import COCO, VOC, Settings
from barlow_recipes.encoders import build_encoder
from barlow_recipes.errors import UsageError

SMALL = replace(
    VOC, short_side=(64,), anchor_sizes=(16, 32), anchors_per_image=32, rois_per_image=8, candidates=(100, 100),
    proposals=(20, 10),
)  # fmt: skip
Build = Callable[..., Any]


@pytest.fixture
def build() -> Build:
    def build(arch: str = "resnet18", stem: str = "imagenet", masks: bool = True, **settings: Any) -> Any:
        torch.manual_seed(0)
        return build_detector(build_encoder(arch, stem), replace(SMALL, **settings), classes=2, masks=masks)

    return build


def images() -> list[torch.Tensor]:
    return [*torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))]


def targets() -> list[dict[str, torch.Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 10:40] = 1
    return 2 * [{"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1]), "masks": masks}]


@pytest.mark.parametrize("masks", [False, True])
def test_every_parameter_learns_and_detections_are_in_the_image(masks: bool, build: Build) -> None:
    model = build(masks=masks).train()
    for name, parameter in model.named_parameters():  # zero-initialised residual branches hide what is before them
        if name.endswith("bn2.weight"):
            nn.init.ones_(parameter)
    losses = model(images(), targets())
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    for threshold in (0.0, 1.0):  # all, and none
        model.roi_heads.score_thresh = threshold
        for found in model(images()):
            assert bool(len(found["boxes"])) == (threshold == 0)
            assert ((found["boxes"] >= 0) & (found["boxes"] <= 64)).all()
            assert {*found["labels"].tolist()} <= {1, 2}
            assert not masks or found["masks"].shape == (len(found["boxes"]), 1, 64, 64)


def test_c4_boxes_and_masks_share_layer4_and_a_norm(build: Build) -> None:
    """In training layer4 sees each region once, and the masks are learned from what it made of the positive ones."""
    model = build().train()
    heads = model.roi_heads
    assert [name for name, _ in model.backbone.named_children()][-1] == "layer3"
    assert isinstance(heads.box_roi_pool.norm, nn.BatchNorm2d)
    seen, masked, chosen, select = [], [], [], heads.select_training_samples
    heads.box_roi_pool.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    heads.mask_head.register_forward_hook(lambda *call: masked.append(call[-1]))
    heads.select_training_samples = lambda *images: chosen.append(select(*images)) or chosen[0]
    model(images(), targets())
    positive = torch.cat(chosen[0][2]) > 0
    assert 0 < positive.sum() < len(positive)
    assert len(seen) == 1
    assert torch.equal(masked[0], seen[0][positive])


@pytest.mark.parametrize(("arch", "stem", "stride"), [("resnet18", "cifar", 4), ("resnet50", "imagenet", 16)])
def test_stride_and_channels_are_found_out(arch: str, stem: str, stride: int, build: Build) -> None:
    model = build(arch, stem)
    assert model.roi_heads.box_roi_pool.stride == stride
    assert model.backbone.out_channels == (1024 if arch == "resnet50" else 256)


def test_the_published_detector() -> None:
    """Base-RCNN-C4.yaml and defaults.py of detectron2, Base-RCNN-C4-BN.yaml of moco."""
    model = build_detector(build_encoder("resnet18"), VOC, classes=20, masks=True)
    rpn, heads = model.rpn, model.roi_heads
    assert rpn.anchor_generator.sizes == [(32, 64, 128, 256, 512)]
    assert rpn.anchor_generator.aspect_ratios == [(0.5, 1.0, 2.0)]
    assert [*rpn._pre_nms_top_n.values(), *rpn._post_nms_top_n.values()] == [12_000, 6_000, 2_000, 1_000]
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold, rpn.nms_thresh) == (0.7, 0.3, 0.7)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_coder.weights == (10, 10, 5, 5)
    assert heads.box_roi_pool.size == 14
    assert heads.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert (model.transform.min_size, model.transform.max_size) == (tuple(range(480, 801, 32)), 1333)
    assert COCO.short_side == (640, 672, 704, 736, 768, 800)


def test_a_frozen_encoder_stays_as_it_is() -> None:
    encoder = build_encoder("resnet18")
    before = copy.deepcopy(encoder.module.state_dict())
    model = build_detector(encoder, replace(SMALL, freeze_backbone=True), classes=2, masks=True).train()
    optimizer = training.build_optimizer(model, SMALL)
    sum(model(images(), targets()).values()).backward()
    optimizer.step()
    assert all(torch.equal(before[name], after) for name, after in encoder.module.state_dict().items())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_pooling_is_aligned_to_pixels() -> None:
    """A linear map is sampled at the middles of the cells: torchvision's MultiScaleRoIAlign is off by half a pixel."""
    ramp = (torch.arange(16.0) + 0.5).expand(1, 1, 16, 16)  # the position of each pixel's middle, in strides
    layer4 = Pretrained(OrderedDict(layer4=nn.Identity()), SMALL, ["layer4"])
    pool = SharedRegions(layer4, nn.Identity(), 2, stride=4, masks=False)
    pooled = pool({"layer3": ramp}, [torch.tensor([[16.0, 16, 32, 32]])], [(64, 64)])
    assert pooled[0, 0, 0].tolist() == pytest.approx([5.0, 7.0])


def test_other_encoders_are_refused(build: Build) -> None:
    with pytest.raises(UsageError, match="--arch small-cnn: expected a ResNet"):
        build("small-cnn")
    with pytest.raises(UsageError, match="expected a ResNet for RGB"):
        build_detector(build_encoder("resnet18", channels=4), SMALL, classes=2, masks=False)


def test_bf16_is_for_the_stages_alone(build: Build) -> None:
    """Anchors and boxes would be as coarse as the features: four pixels at 800."""
    model = build(precision="bf16").train()
    builds = (build(precision=precision).eval().backbone(images()[0][None]) for precision in ("fp32", "bf16"))
    (full,), (half,) = (features.values() for features in builds)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert all(loss.dtype == torch.float32 for loss in model(images(), targets()).values())


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        (VOC, {0: 0.0333, 500: 0.06665, 1000: 0.1, 17_999: 0.1, 18_000: 0.01, 23_999: 0.001}),
        (COCO, {0: 0.03 / 1000, 59_999: 0.03, 60_000: 0.003, 80_000: 0.0003}),
    ],
)
def test_the_published_schedule(recipe: Settings, rates: dict[int, float]) -> None:
    found = {step: recipe.learning_rate * training.learning_rate_factor(step, recipe) for step in rates}
    assert found == pytest.approx(rates)
    assert (recipe.batch_size, recipe.weight_decay) == (16, 1e-4)
    assert recipe.iterations == {VOC: 24_000, COCO: 90_000}[recipe]


ONE, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


@pytest.mark.parametrize(
    ("found", "there", "ignored", "points", "expected"),
    {
        "all found": ([ONE, OTHER], [ONE, OTHER], [0, 0], 101, (100, 100, 100)),
        "one of IoU 0.8, found at seven of ten": ([[0, 0, 10, 8.1]], [ONE], [0], 101, (70, 100, 100)),
        "an ignored one is not missed": ([ONE], [ONE, OTHER], [0, 1], 101, (100, 100, 100)),
        "nor is it wrong": ([OTHER, ONE], [ONE, OTHER], [0, 1], 101, (100, 100, 100)),
        # recall 1/2 with precision 1: 51 of 101 points, or 6 of 11
        "half, at 101 points": ([ONE], [ONE, OTHER], [0, 0], 101, [100 * 51 / 101] * 3),
        "half, at 11 points": ([ONE], [ONE, OTHER], [0, 0], 11, [100 * 6 / 11] * 3),
        "nothing to find": ([], [ONE], [1], 101, None),
    }.values(),
)
def test_average_precision(found: Any, there: Any, ignored: Any, points: int, expected: Any) -> None:
    boxes, labels = torch.tensor(found).reshape(-1, 4), torch.ones(2).long()
    detected = {"boxes": boxes, "labels": labels[: len(found)], "scores": torch.tensor([0.9, 0.8])[: len(found)]}
    truth = {"boxes": torch.tensor(there), "labels": labels[: len(there)], "iscrowd": torch.tensor(ignored)}
    metric = training.build_metric(masks=False, recall_points=points)
    metric.update([detected], [truth])
    figures = training.scores_of(metric.compute())["box"].values()
    assert [*figures] == ([None] * 3 if expected is None else pytest.approx(expected, abs=1e-4))


def test_the_thresholds_are_those_of_coco() -> None:
    """Those of torchmetrics itself are float32 numbers: an IoU of 0.6 is below its 0.6, and a recall of 3/5 too."""
    params = pytest.importorskip("pycocotools.cocoeval").Params("bbox")
    metric = training.build_metric(masks=False, recall_points=101)
    assert (metric.iou_thresholds, metric.rec_thresholds) == (params.iouThrs.tolist(), params.recThrs.tolist())


@pytest.mark.parametrize(
    ("objects", "found", "height", "expected"),
    {
        "three of five, exactly": (5, 3, 10, 100 * 61 / 101),
        "seven of twenty, whose share is below COCO's 36th point": (20, 7, 10, 100 * 35 / 101),
        "all, at an IoU of 0.6": (4, 4, 6, 30),
        "all, at an IoU of 0.8": (4, 4, 8, 70),
    }.values(),
)
def test_average_precision_at_a_threshold(objects: int, found: int, height: int, expected: float) -> None:
    """As pycocotools' own evaluation has it, and so the published numbers."""
    left = 20.0 * torch.arange(objects)
    there = torch.stack([left, 0 * left, left + 10, 0 * left + 10], 1)
    scores, labels = torch.linspace(0.9, 0.5, found), torch.ones(objects).long()
    boxes = torch.cat([there[:found, :3], torch.full((found, 1), float(height))], 1)
    metric = training.build_metric(masks=False, recall_points=101)
    detected = {"boxes": boxes, "labels": labels[:found], "scores": scores}
    metric.update([detected], [{"boxes": there, "labels": labels}])
    assert training.scores_of(metric.compute())["box"]["AP"] == pytest.approx(expected, abs=1e-4)


class Batches(NamedTuple):
    """In place of a folder's images."""

    batches: list[Batch]

    def from_step(self, _: int) -> list[Batch]:
        return self.batches


def test_a_test_measures_norms_again(build: Build) -> None:
    """The statistics become the means over the batches; frozen ones stay."""
    whole = [(255 * image).to(torch.uint8) for image in images()]
    pair = [whole, [255 - image for image in whole]]
    batches: Any = Batches([Batch(each, targets(), 0) for each in pair])
    settings, cpu = replace(SMALL, precise_batches=2, test_short_side=80), torch.device("cpu")
    model = build()
    resized = [model.transform([image / 255 for image in each])[0].tensors for each in pair]
    means = torch.stack([model.backbone.conv1(each).mean((0, 2, 3)) for each in resized])
    training.prepare_test(model, batches, settings, cpu)
    torch.testing.assert_close(model.backbone.bn1.running_mean, means.mean(0))
    assert model.transform.min_size == (80,)
    frozen = build(freeze_backbone=True)
    before = frozen.backbone.bn1.running_mean.clone()
    training.prepare_test(frozen, batches, settings, cpu)
    assert torch.equal(frozen.backbone.bn1.running_mean, before)
    assert frozen.roi_heads.box_roi_pool.norm.running_mean.any()
