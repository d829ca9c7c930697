"""Faster R-CNN and Mask R-CNN of torchvision on a pretrained ResNet.

conv1 to layer3 see the image, layer4 and a batch norm see each region, for boxes and masks ("C4").

As published (Base-RCNN-C4.yaml and defaults.py of detectron2, Res5ROIHeadsExtraNorm of facebookresearch/moco) are
anchors, proposals, RoIAlign and initial weights; thresholds and shares are torchvision's defaults, which are the same.
Different: box losses are smooth L1 with β = 1/9, detectron2's L1; images are resized in float, without antialiasing,
and a batch mixes their aspect ratios.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from barlow_recipes.detection.settings import Settings
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import UsageError

ASPECT_RATIOS = (0.5, 1.0, 2.0)
MASK_CHANNELS = 256  # defaults.py: ROI_MASK_HEAD.CONV_DIM
PROBED = 128  # pixels of the side of an image by which widths and strides are found out
STAGES = ("layer1", "layer2", "layer3", "layer4")
Parts = OrderedDict[str, nn.Module]


def build_detector(encoder: Encoder, settings: Settings, *, classes: int, masks: bool) -> FasterRCNN:
    """Put a detector on the encoder, whose modules become parts of it; ``classes`` are without the background.

    UsageError: the encoder is no ResNet for RGB.
    """
    module, labels = encoder.module, classes + 1
    names = ("conv1", "bn1", "relu" if hasattr(module, "relu") else "act1", "maxpool", *STAGES)  # act1 is timm's
    if not all(hasattr(module, name) for name in names) or encoder.shape[0] != 3:
        raise UsageError(f"--arch {encoder.arch}: expected a ResNet for RGB: its stages become a detector's parts")
    parts = OrderedDict((name, getattr(module, name)) for name in names)
    with torch.no_grad():
        maps = Pretrained(parts, settings, STAGES).eval()(torch.zeros(1, 3, PROBED, PROBED))
    (_, channels, side, _), (_, seen, _, _) = maps["layer3"].shape, maps["layer4"].shape
    layer4 = Pretrained(OrderedDict(layer4=parts.pop("layer4")), settings, ["layer4"])
    regions = SharedRegions(layer4, nn.BatchNorm2d(seen), 14, PROBED // side, masks=masks)
    backbone: Any = Pretrained(parts, settings, ["layer3"])
    backbone.out_channels = channels  # where torchvision's detectors look for it
    predictor, mask_predictor = FastRCNNPredictor(seen, labels), MaskRCNNPredictor(seen, MASK_CHANNELS, labels)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # detectron2's
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    for_masks = {"mask_roi_pool": regions, "mask_head": nn.Identity(), "mask_predictor": mask_predictor}
    return (MaskRCNN if masks else FasterRCNN)(
        backbone,
        min_size=settings.short_side,
        max_size=1333,
        rpn_anchor_generator=AnchorGenerator([settings.anchor_sizes], [ASPECT_RATIOS]),
        rpn_pre_nms_top_n_train=settings.candidates[0],
        rpn_pre_nms_top_n_test=settings.candidates[1],
        rpn_post_nms_top_n_train=settings.proposals[0],
        rpn_post_nms_top_n_test=settings.proposals[1],
        rpn_batch_size_per_image=settings.anchors_per_image,
        box_batch_size_per_image=settings.rois_per_image,
        box_roi_pool=regions,
        box_head=nn.AdaptiveAvgPool2d(1),
        box_predictor=predictor,
        **(for_masks if masks else {}),
    )


class Pretrained(nn.Sequential):
    """Parts of the encoder; frozen, they stay as they are, in eval(). What the ``outputs`` among them say, by name.

    It is float32: torchvision takes anchors and boxes to the features' type, too coarse in bf16.
    """

    def __init__(self, parts: Parts, settings: Settings, outputs: Sequence[str]) -> None:
        super().__init__(parts)
        self.frozen, self.bf16, self.outputs = settings.freeze_backbone, settings.precision == "bf16", outputs
        self.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Pretrained":
        return super().train(mode and not self.frozen)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = OrderedDict()
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            for name, part in self.named_children():
                features = part(features)
                if name in self.outputs:
                    found[name] = features.float()
        return found


class SharedRegions(MultiScaleRoIAlign):
    """Regions as layer4 and a batch norm see them, (N, C, H, W), for boxes and masks alike.

    RoIAlign has the half pixel that torchvision's leaves out. In training the masks are learned from regions of the
    boxes: as published, layer4 does not see them again, and the batch norms' statistics are of all regions.
    """

    def __init__(self, layer4: nn.Module, norm: nn.Module, size: int, stride: int, *, masks: bool) -> None:
        super().__init__(["layer3"], size, sampling_ratio=0)
        self.layer4, self.norm, self.size, self.stride, self.masks = layer4, norm, size, stride, masks
        self.seen: tuple[list[Tensor], Tensor] | None = None  # from the boxes' call of a step to the masks'

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        if self.seen is not None:
            (every, regions), self.seen = self.seen, None
            images = zip(boxes, every, regions.split([*map(len, every)]), strict=True)
            return torch.cat([seen[(some[:, None] == all_).all(2).int().argmax(1)] for some, all_, seen in images])
        pooled = roi_align(x["layer3"], boxes, self.size, 1 / self.stride, sampling_ratio=0, aligned=True)
        regions = self.norm(self.layer4(pooled)["layer4"])
        if self.training and self.masks:
            self.seen = boxes, regions
        return regions
