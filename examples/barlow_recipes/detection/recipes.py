"""The published settings of the two transfers.

Sources: Zbontar et al. (2021), arXiv 2103.03230, appendix, transfer learning: iterations, batch, learning rates and
warm-up of VOC07+12 (linear, from a third of the rate), "the other parameters the same as in the 1× schedule" for COCO.
They follow He et al. (2019), arXiv 1911.05722: ``detection/configs`` of facebookresearch/moco, which has
``pascal_voc_R_50_C4_24k.yaml`` (short sides, milestones) and ``Base-RCNN-C4-BN.yaml`` (synchronised batch norms, all
trained; precise batch norm before a test; proposals of the test). The rest is detectron2's ``Base-RCNN-C4.yaml`` (the
1× schedule, COCO's short sides) and ``config/defaults.py``.
"""

from dataclasses import dataclass

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # defaults.py: ANCHOR_GENERATOR.SIZES; their aspect ratios are 1/2, 1 and 2
ANCHORS_PER_IMAGE = 256  # defaults.py: RPN.BATCH_SIZE_PER_IMAGE, half of them positive if there are as many
ROIS_PER_IMAGE = 512  # defaults.py: ROI_HEADS.BATCH_SIZE_PER_IMAGE, a quarter of them positive
CANDIDATES = (12_000, 6_000)  # defaults.py and Base-RCNN-C4-BN.yaml: RPN.PRE_NMS_TOPK, in training and test
PROPOSALS = (2_000, 1_000)  # there: RPN.POST_NMS_TOPK
PRECISE_BATCHES = 200  # defaults.py: TEST.PRECISE_BN.NUM_ITER, which Base-RCNN-C4-BN.yaml switches on


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe:
    """The learning rate is that of a batch of ``batch_size``; ×0.1 after each milestone."""

    iterations: int
    milestones: tuple[int, ...]
    learning_rate: float
    warmup: int  # iterations
    warmup_factor: float  # of the learning rate, in the first iteration
    short_side: tuple[int, ...]  # of training images, one of them drawn for each
    test_short_side: int = 800
    max_side: int = 1333
    batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4  # 0 for batch norms: defaults.py, WEIGHT_DECAY_NORM


VOC = DetectionRecipe(
    iterations=24_000,
    milestones=(18_000, 22_000),
    learning_rate=0.1,
    warmup=1000,
    warmup_factor=0.333,
    short_side=tuple(range(480, 801, 32)),
)
COCO = DetectionRecipe(
    iterations=90_000,
    milestones=(60_000, 80_000),
    learning_rate=0.03,
    warmup=1000,
    warmup_factor=0.001,
    short_side=tuple(range(640, 801, 32)),
)


def learning_rate_factor(step: int, milestones: tuple[int, ...], warmup: int, warmup_factor: float) -> float:
    """What multiplies the learning rate in a step: linear to 1 in the warm-up, times 0.1 for each milestone passed."""
    factor = 0.1 ** sum(step >= milestone for milestone in milestones)
    done = min(step / warmup, 1.0) if warmup else 1.0
    return factor * (warmup_factor * (1 - done) + done)
