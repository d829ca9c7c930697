"""Faster R-CNN and Mask R-CNN on a pretrained ResNet, from torchvision's parts.

"c4", the published one: conv1 to layer3 see the image, layer4 sees each region, and boxes and masks share what it makes
of them; a batch norm follows it. "fpn": all four stages see the image, a feature pyramid is on top of them, and the
heads are those of torchvision's maskrcnn_resnet50_fpn_v2, convolutions with batch norms.

As published (detectron2's Base-RCNN-C4.yaml and defaults.py; Res5ROIHeads and, with the additional norm,
Res5ROIHeadsExtraNorm of facebookresearch/moco, detection/train_net.py): anchors, 12,000 proposals (6,000 in the test)
of which 2,000 (1,000) are left, RoIAlign of 14×14 with aligned pixels, 512 regions for each image, a quarter positive,
and the initial weights. Different: torchvision's box losses are smooth L1 with β = 1/9, detectron2's are L1; images are
resized in float, without antialiasing, and a batch mixes their aspect ratios.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align

from barlow_recipes.errors import UsageError
from barlow_recipes.pixels import MEAN, STD

if TYPE_CHECKING:
    from barlow_recipes.encoders import Encoder

NECKS = ("c4", "fpn")
MODES = ("training", "testing")
ASPECT_RATIOS = (0.5, 1.0, 2.0)
MASK_CHANNELS = 256  # defaults.py: ROI_MASK_HEAD.CONV_DIM
PROBED = 128  # pixels of the side of an image by which widths and strides are found out
STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What a detector is, beside its encoder."""

    classes: int  # without the background
    masks: bool
    neck: str
    frozen: bool  # nothing pretrained learns, and its batch norms keep their statistics
    short_side: tuple[int, ...]
    max_side: int
    anchor_sizes: tuple[int, ...]
    anchors_per_image: int  # that the proposals are learned from
    rois_per_image: int
    candidates: tuple[int, int]  # regions of an image in training and in the test, before overlaps are removed
    proposals: tuple[int, int]  # and after
    roi_size: int  # pixels of a region's side, after RoIAlign
    fpn_channels: int
    precision: str  # of the pretrained stages; everything else is computed in float32


def build_detector(encoder: "Encoder", options: DetectorOptions) -> GeneralizedRCNN:
    """Put a detector on the encoder, whose modules become parts of it.

    Raises:
        UsageError: the encoder is no ResNet, or the anchors do not fit the neck.
    """
    if not all(hasattr(encoder.module, name) for name in ("conv1", "bn1", *STAGES)):
        raise UsageError(f"--arch {encoder.arch}: expected a ResNet, whose stages a detector shares among its parts")
    build = _on_c4 if options.neck == "c4" else _on_fpn
    backbone, anchors, heads = build(encoder, options)
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.anchors_per_image,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(MODES, options.candidates, strict=True)),
        post_nms_top_n=dict(zip(MODES, options.proposals, strict=True)),
        nms_thresh=0.7,
    )
    resize = GeneralizedRCNNTransform(options.short_side, options.max_side, [*MEAN], [*STD])
    return GeneralizedRCNN(backbone, rpn, heads, resize)


class Pretrained(nn.Sequential):
    """Stages of the encoder; frozen, they stay as they are, in eval()."""

    def __init__(self, stages: OrderedDict[str, nn.Module], *, frozen: bool, precision: str) -> None:
        super().__init__(stages)
        self.frozen, self.precision = frozen, precision
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Pretrained":
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        with low_precision(images, self.precision):
            features = super().forward(images)
        return cast("Tensor", features.float())


def low_precision(images: Tensor, precision: str) -> torch.autocast:
    """Autocast for the stages alone: torchvision takes anchors and boxes to the features' type, too coarse in bf16."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")


def stages(encoder: "Encoder") -> OrderedDict[str, nn.Module]:
    """The parts of the encoder in their order, by the names in its state_dict."""
    module = encoder.module
    activation = "relu" if hasattr(module, "relu") else "act1"  # timm's
    return OrderedDict((name, getattr(module, name)) for name in ("conv1", "bn1", activation, "maxpool", *STAGES))


@torch.no_grad()
def geometry(parts: OrderedDict[str, nn.Module]) -> tuple[list[int], list[int]]:
    """The channels and the strides of layer1 to layer4, found out without computing anything."""
    features, channels, strides = torch.zeros(1, 3, PROBED, PROBED, device="meta"), [], []
    for name, part in parts.items():
        features = copy.deepcopy(part).to("meta").eval()(features)
        if name in STAGES:
            channels.append(features.shape[1])
            strides.append(PROBED // features.shape[2])
    return channels, strides


def _on_c4(encoder: "Encoder", options: DetectorOptions) -> tuple[nn.Module, AnchorGenerator, RoIHeads]:
    parts = stages(encoder)
    (*_, mapped, seen), (*_, stride, _) = geometry(parts)
    layer4 = parts.pop("layer4")
    backbone = Pretrained(parts, frozen=options.frozen, precision=options.precision)
    backbone.out_channels = mapped  # type: ignore[assignment]
    last = Pretrained(OrderedDict(layer4=layer4), frozen=options.frozen, precision=options.precision)
    shared = nn.Sequential(OrderedDict(pretrained=last, norm=nn.BatchNorm2d(seen)))
    predictor = MaskRCNNPredictor(seen, MASK_CHANNELS, options.classes + 1) if options.masks else None
    heads = C4Heads(
        AlignedPool(options.roi_size, stride),
        shared,
        _box_predictor(seen, options.classes),
        mask_predictor=predictor,
        **_head_settings(options),
    )
    return backbone, AnchorGenerator((options.anchor_sizes,), (ASPECT_RATIOS,)), heads


def _on_fpn(encoder: "Encoder", options: DetectorOptions) -> tuple[nn.Module, AnchorGenerator, RoIHeads]:
    if len(options.anchor_sizes) != len(STAGES) + 1:
        raise UsageError(f"--anchor-sizes: expected {len(STAGES) + 1} for --neck fpn, one for each of its levels")
    channels, levels = options.fpn_channels, [str(level) for level in range(len(STAGES))]
    backbone = Pyramid(encoder, channels, options)
    hidden = 4 * channels
    heads = RoIHeads(
        MultiScaleRoIAlign(levels, options.roi_size, sampling_ratio=2),
        FastRCNNConvFCHead((channels, options.roi_size, options.roi_size), [channels] * 4, [hidden], nn.BatchNorm2d),
        _box_predictor(hidden, options.classes),
        mask_roi_pool=MultiScaleRoIAlign(levels, 2 * options.roi_size, sampling_ratio=2) if options.masks else None,
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, nn.BatchNorm2d) if options.masks else None,
        mask_predictor=MaskRCNNPredictor(channels, channels, options.classes + 1) if options.masks else None,
        **_head_settings(options),
    )
    sizes = tuple((size,) for size in options.anchor_sizes)
    return backbone, AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)), heads


class Pyramid(nn.Module):
    """torchvision's feature pyramid, with batch norms, on the four pretrained stages."""

    def __init__(self, encoder: "Encoder", channels: int, options: DetectorOptions) -> None:
        super().__init__()
        body = Pretrained(stages(encoder), frozen=options.frozen, precision=options.precision)
        widths, _ = geometry(stages(encoder))
        names = {stage: str(level) for level, stage in enumerate(STAGES)}
        self.pyramid = BackboneWithFPN(body, names, widths, channels, norm_layer=nn.BatchNorm2d)
        self.out_channels, self.options = channels, options

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        self.pyramid.body.train(mode and not self.options.frozen)  # torchvision has taken the stages out of Pretrained
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with low_precision(images, self.options.precision):
            features = self.pyramid(images)
        return {name: level.float() for name, level in features.items()}


def _head_settings(options: DetectorOptions) -> dict[str, Any]:
    return {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": options.rois_per_image,
        "positive_fraction": 0.25,
        "bbox_reg_weights": None,  # 10, 10, 5, 5
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_img": 100,
    }


def _box_predictor(features: int, classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(features, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # detectron2's
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return predictor


class AlignedPool(nn.Module):
    """RoIAlign on one feature map, with the half pixel that torchvision's MultiScaleRoIAlign leaves out."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
        return roi_align(features["0"], boxes, self.size, 1 / self.stride, sampling_ratio=0, aligned=True)


class C4Heads(RoIHeads):
    """torchvision's heads, but boxes and masks are predicted from the same features of the same regions.

    In training layer4 sees each region once; in the test it sees the regions, and then the boxes found in them.
    """

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training and targets is not None:
            return [], self._losses(features, proposals, image_shapes, targets)
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, changes = self.box_predictor(regions.mean((2, 3)))
        found = self.postprocess_detections(logits, changes, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.mask_predictor is not None:
            boxes, _, labels = found
            regions = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            for result, masks in zip(results, maskrcnn_inference(self.mask_predictor(regions), labels), strict=True):
                result["masks"] = masks
        return results, {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        chosen, matched, labels, changes = self.select_training_samples(proposals, targets)
        regions = self.box_head(self.box_roi_pool(features, chosen, image_shapes))
        classifier, boxes = fastrcnn_loss(*self.box_predictor(regions.mean((2, 3))), labels, changes)
        losses = {"loss_classifier": classifier, "loss_box_reg": boxes}
        if self.mask_predictor is not None:
            positive = [label > 0 for label in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(regions[torch.cat(positive)]),
                [boxes[chosen] for boxes, chosen in zip(chosen, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [objects[chosen] for objects, chosen in zip(matched, positive, strict=True)],
            )
        return losses
