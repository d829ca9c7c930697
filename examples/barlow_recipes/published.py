"""The published numbers of linear evaluation, semi-supervised fine-tuning and linear transfer."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained: by SGD, with learning rates that are constant within an epoch."""

    epochs: int
    batch_size: int = 256  # of all processes together; the learning rates are not scaled by it
    lr_classifier: float
    lr_backbone: float | None = None  # None: the encoder is frozen, in eval()
    weight_decay: float  # of the classifier's weight and bias, and of the encoder if it is fine-tuned
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()  # after so many epochs the rates are multiplied by 0.1; (): cosine to 0

    @property
    def frozen(self) -> bool:
        return self.lr_backbone is None

    def factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch, the first is 0; by default (1 + cos(πt)) / 2."""
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


# Source: README and evaluate.py of facebookresearch/barlowtwins. The paper (appendix B.2) has 0.002 for the encoder,
# and ×0.2 after epochs 12 and 16 in place of the cosine.
SEMI_SUPERVISED = Recipe(epochs=20, lr_classifier=0.5, lr_backbone=0.005, weight_decay=0.0)
RECIPES = {
    # Source: the paper, arXiv 2103.03230, appendix B.1; evaluate.py of facebookresearch/barlowtwins.
    "linear": Recipe(epochs=100, lr_classifier=0.3, weight_decay=1e-6),
    "semi-1": SEMI_SUPERVISED,
    "semi-10": SEMI_SUPERVISED,
    # Source of both: the paper, appendix C.1, after Misra & van der Maaten (2020), PIRL, arXiv 1912.01991, appendix C:
    # ×0.1 at "two equally spaced intervals", which we read as thirds. PIRL pools to some 9,000 features, here they are
    # the encoder's own. VISSL's configurations (eval_resnet_8gpu_transfer_*_linear.yaml of facebookresearch/vissl) have
    # the batch size, and the same rate, decay and epochs; but drops after 4, 8 and 12 (24, 48 and 72) epochs and
    # Nesterov's momentum.
    "places205": Recipe(epochs=14, lr_classifier=0.01, weight_decay=5e-4, milestones=(5, 9)),
    "inaturalist18": Recipe(epochs=84, lr_classifier=0.01, weight_decay=5e-4, milestones=(28, 56)),
}

# Top-1 and perhaps top-5, in percent, of the paper's ResNet-50, pretrained on ImageNet for 1000 epochs: tables 1 to 3.
PUBLISHED = {
    "linear": (73.2, 91.0),
    "semi-1": (55.0, 79.2),
    "semi-10": (69.7, 89.3),
    "places205": (54.1,),
    "inaturalist18": (46.5,),
}
