"""Faster R-CNN and Mask R-CNN of torchvision on a pretrained ResNet.

"c4", the published one: conv1 to layer3 see the image, layer4 and a batch norm see each region, for boxes and masks.
"fpn": all four stages see the image, a feature pyramid is on top, and the heads are maskrcnn_resnet50_fpn_v2's.

As published (Base-RCNN-C4.yaml and defaults.py of detectron2, Res5ROIHeadsExtraNorm of facebookresearch/moco) are
anchors, proposals, RoIAlign and initial weights; thresholds and shares are torchvision's defaults, which are the same.
Different: box losses are smooth L1 with β = 1/9, detectron2's L1; images are resized in float, without antialiasing,
and a batch mixes their aspect ratios.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from barlow_recipes.detection.settings import Settings
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import UsageError

ASPECT_RATIOS = (0.5, 1.0, 2.0)
MASK_CHANNELS = 256  # defaults.py: ROI_MASK_HEAD.CONV_DIM
PROBED = 128  # pixels of the side of an image by which widths and strides are found out
STAGES = ("layer1", "layer2", "layer3", "layer4")
Parts = OrderedDict[str, nn.Module]
Built = tuple[Any, int, dict[str, Any], dict[str, Any]]  # the backbone, its channels, the parts of boxes and of masks


def build_detector(encoder: Encoder, settings: Settings, *, classes: int, masks: bool) -> FasterRCNN:
    """Put a detector on the encoder, whose modules become parts of it; ``classes`` are without the background.

    Raises:
        UsageError: the encoder is no ResNet, or the anchors do not fit the neck.
    """
    module, on_c4 = encoder.module, settings.neck == "c4"
    names = ("conv1", "bn1", "relu" if hasattr(module, "relu") else "act1", "maxpool", *STAGES)  # act1 is timm's
    if not all(hasattr(module, name) for name in names) or next(module.conv1.parameters()).shape[1] != 3:
        raise UsageError(
            f"--arch {encoder.arch}: expected a ResNet for RGB, to share its stages among a detector's parts"
        )
    anchors = [settings.anchor_sizes] if on_c4 else [(size,) for size in settings.anchor_sizes]
    if not on_c4 and len(anchors) != len(STAGES) + 1:
        raise UsageError(f"--anchor-sizes: expected {len(STAGES) + 1} for --neck fpn, one for each of its levels")
    parts = OrderedDict((name, getattr(module, name)) for name in names)
    backbone, channels, of_boxes, of_masks = (_on_c4 if on_c4 else _on_fpn)(parts, settings, classes + 1, masks)
    backbone.out_channels = channels  # where torchvision's detectors look for it
    predictor = of_boxes["box_predictor"]
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # detectron2's
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return (MaskRCNN if masks else FasterRCNN)(
        backbone,
        min_size=settings.short_side,
        max_size=settings.max_side,
        rpn_anchor_generator=AnchorGenerator(anchors, [ASPECT_RATIOS] * len(anchors)),
        rpn_pre_nms_top_n_train=settings.candidates[0],
        rpn_pre_nms_top_n_test=settings.candidates[1],
        rpn_post_nms_top_n_train=settings.proposals[0],
        rpn_post_nms_top_n_test=settings.proposals[1],
        rpn_batch_size_per_image=settings.anchors_per_image,
        box_batch_size_per_image=settings.rois_per_image,
        **of_boxes,
        **(of_masks if masks else {}),
    )


def _on_c4(parts: Parts, settings: Settings, labels: int, masks: bool) -> Built:
    (*_, channels, seen), (*_, stride, _) = _geometry(parts)
    layer4 = Pretrained(OrderedDict(layer4=parts.pop("layer4")), settings)
    regions = SharedRegions(layer4, nn.BatchNorm2d(seen), settings.roi_size, stride, masks=masks)
    boxes, mask = FastRCNNPredictor(seen, labels), MaskRCNNPredictor(seen, MASK_CHANNELS, labels)
    of_boxes = {"box_roi_pool": regions, "box_head": nn.AdaptiveAvgPool2d(1), "box_predictor": boxes}
    of_masks = {"mask_roi_pool": regions, "mask_head": nn.Identity(), "mask_predictor": mask}
    return Pretrained(parts, settings), channels, of_boxes, of_masks


def _on_fpn(parts: Parts, settings: Settings, labels: int, masks: bool) -> Built:
    width, size = settings.fpn_channels, settings.roi_size
    pyramid = FeaturePyramidNetwork(_geometry(parts)[0], width, LastLevelMaxPool(), nn.BatchNorm2d)
    backbone = nn.Sequential(OrderedDict(stages=Pretrained(parts, settings, levels=True), pyramid=pyramid))
    of_boxes = {
        "box_roi_pool": MultiScaleRoIAlign([*STAGES], size, sampling_ratio=2),
        "box_head": FastRCNNConvFCHead((width, size, size), [width] * 4, [4 * width], nn.BatchNorm2d),
        "box_predictor": FastRCNNPredictor(4 * width, labels),
    }
    of_masks = {
        "mask_roi_pool": MultiScaleRoIAlign([*STAGES], 2 * size, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(width, [width] * 4, 1, nn.BatchNorm2d),
        "mask_predictor": MaskRCNNPredictor(width, width, labels),
    }
    return backbone, width, of_boxes, of_masks


@torch.no_grad()
def _geometry(parts: Parts) -> tuple[list[int], list[int]]:
    """The channels and the strides of layer1 to layer4."""
    maps, features = [], torch.zeros(1, 3, PROBED, PROBED)
    for name, part in parts.items():
        features = part.eval()(features)
        maps += [features] if name in STAGES else []
    return [features.shape[1] for features in maps], [PROBED // features.shape[2] for features in maps]


class Pretrained(nn.Sequential):
    """Parts of the encoder; frozen, they stay as they are, in eval().

    What comes out is float32: torchvision takes anchors and boxes to the features' type, too coarse in bf16.
    """

    def __init__(self, parts: Parts, settings: Settings, *, levels: bool = False) -> None:
        super().__init__(parts)
        self.frozen, self.bf16, self.levels = settings.freeze_backbone, settings.precision == "bf16", levels
        self.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Pretrained":
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Any:  # type: ignore[override]
        """The last part's features; with ``levels`` those of all four stages, by their names."""
        levels: OrderedDict[str, Tensor] = OrderedDict()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            for name, part in self.named_children():
                images = part(images)
                if self.levels and name in STAGES:
                    levels[name] = images.float()
        return levels or images.float()


class SharedRegions(MultiScaleRoIAlign):
    """Regions as layer4 and a batch norm see them, (N, C, H, W), for boxes and masks alike.

    RoIAlign has the half pixel that torchvision's leaves out. In training the masks are learned from regions of the
    boxes: as published, layer4 does not see them again, and the batch norms' statistics are of all regions.
    """

    def __init__(self, layer4: nn.Module, norm: nn.Module, size: int, stride: int, *, masks: bool) -> None:
        super().__init__(["0"], size, sampling_ratio=0)
        self.layer4, self.norm, self.size, self.stride, self.masks = layer4, norm, size, stride, masks
        self.seen: tuple[list[Tensor], Tensor] | None = None  # from the boxes' call of a step to the masks'

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        if self.seen is not None:
            (every, regions), self.seen = self.seen, None
            of_images = regions.split([*map(len, every)])
            images = zip(boxes, every, of_images, strict=True)
            return torch.cat([seen[(some[:, None] == all_).all(2).int().argmax(1)] for some, all_, seen in images])
        pooled = roi_align(x["0"], boxes, self.size, 1 / self.stride, sampling_ratio=0, aligned=True)
        regions = self.norm(self.layer4(pooled))
        if self.training and self.masks:
            self.seen = boxes, regions
        return regions
