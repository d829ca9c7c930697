"""Objectives of pretraining on two views: Barlow Twins and its ablations, and others by lightly's losses and heads.

Each is a module around an encoder that takes two views to a loss.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from barlow_loss import Projector, barlow_twins_loss, standardize
from barlow_recipes.errors import require

HIDDEN = 512  # width of a head's hidden layers
# Of the target networks of BYOL and MoCo, rising to 1 by a cosine as BYOL's, whose 0.996 is for a thousand epochs.
MOMENTUM = 0.96
TEMPERATURE = 0.2  # of MoCo v2; the others' are lightly's defaults
BANK = 1024  # MoCo's negatives
PROTOTYPES = 64  # SwAV's: no more than images in a batch, so that no queue is needed
CROSS_ENTROPY_TEMPERATURE = 0.1  # of the ablation; the paper does not tell its own


Criterion = Callable[[Tensor, Tensor, float], Tensor]  # of two embeddings (N, D) and λ


def full(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    return barlow_twins_loss(z1, z2, lambd=lambd)


def on_diagonal(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    return barlow_twins_loss(z1, z2, return_terms=True).on_diagonal


def off_diagonal(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    return barlow_twins_loss(z1, z2, return_terms=True).off_diagonal


def of_matrix(c: Tensor, lambd: float) -> Tensor:
    on, off = (c.diagonal() - 1).square().sum(), c.square().sum() - c.diagonal().square().sum()
    return on + lambd * off


def feature_norm(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """Rows of length √D, after standardising: C = ẑ₁ᵀ ẑ₂ / N, so that C_ii = 1 for equal views, as before."""
    rows1, rows2 = (F.normalize(standardize(z), dim=1) * z.shape[1] ** 0.5 for z in (z1, z2))
    return of_matrix(rows1.T @ rows2 / len(z1), lambd)


def covariance(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """C = cross-covariance: features are centred, and not scaled."""
    return of_matrix((z1 - z1.mean(dim=0)).T @ (z2 - z2.mean(dim=0)) / len(z1), lambd)


def cross_entropy(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """L = −log Σ_i exp(C_ii/τ) + λ log Σ_i Σ_{j≠i} exp(max(C_ij, 0)/τ). Source: the paper, section 4."""
    C = standardize(z1).T @ standardize(z2) / len(z1) / CROSS_ENTROPY_TEMPERATURE
    others = C.clamp(min=0) + C.new_full((len(C),), -math.inf).diag_embed()  # exp(−∞) = 0
    return lambd * others.logsumexp(dim=(0, 1)) - C.diagonal().logsumexp(dim=0)


CRITERIA: dict[str, Criterion] = {
    "": full,
    "on": on_diagonal,
    "off": off_diagonal,
    "feature norm": feature_norm,
    "covariance": covariance,
    "cross-entropy": cross_entropy,
}


class Method(nn.Module):
    """``method(x1, x2)`` is the loss of two views of the same images; ``embed(x)`` are the embeddings it is made of."""

    head: nn.Module

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(x))
        return z

    def after_step(self, progress: float) -> None:
        """What is done when the optimizer has moved; ``progress`` goes from 0 to 1."""


class BarlowTwins(Method):
    """The projector is that of the paper, narrower; the asymmetries are those of its table 6."""

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        *,
        width: int = HIDDEN,
        depth: int = 3,
        lambd: float = 0.0051,
        criterion: str = "",  # of CRITERIA
        batch_norm: bool = True,
        stop_gradient: bool = False,
        predictor: bool = False,
    ) -> None:
        super().__init__(encoder)
        norm = nn.BatchNorm1d if batch_norm else nn.Identity
        self.head = Projector(features, HIDDEN, width, num_layers=depth, norm_layer=norm)
        self.predictor = Projector(width, HIDDEN, width, num_layers=2) if predictor else nn.Identity()
        self.criterion, self.lambd, self.stop_gradient = CRITERIA[criterion], lambd, stop_gradient

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.embed(x1), self.embed(x2)
        return self.criterion(self.predictor(z1), z2.detach() if self.stop_gradient else z2, self.lambd)


class Joint(Method):
    """The loss is of the embeddings of both views."""

    criterion: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.criterion(self.embed(x1), self.embed(x2))


class SimCLR(Joint):
    """InfoNCE: each view against all others of the batch."""

    def __init__(self, encoder: nn.Module, features: int, *, width: int = 128, depth: int = 2) -> None:
        super().__init__(encoder)
        self.head = mlp(features, width, depth, nn.BatchNorm1d(width))
        self.criterion = parts().loss.NTXentLoss()


class VICReg(Joint):
    """Variance, invariance, covariance."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__(encoder)
        self.head = Projector(features, HIDDEN, HIDDEN)
        self.criterion = parts().loss.VICRegLoss()


class SwAV(Method):
    """Each view predicts to which prototypes the other was assigned; without multi-crop and queue."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__(encoder)
        lightly = parts()
        self.head = lightly.modules.SwaVProjectionHead(features, HIDDEN, 128)
        self.prototypes = lightly.modules.SwaVPrototypes(128, PROTOTYPES)
        self.criterion = lightly.loss.SwaVLoss()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        self.prototypes.normalize()
        logits = [self.prototypes(F.normalize(self.embed(x), dim=1)) for x in (x1, x2)]
        loss: Tensor = self.criterion(logits, [])
        return loss


class Predicting(Method):
    """A predictor turns the embedding of each view into a target made of the other, which gets no gradient."""

    predictor: nn.Module

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.criterion = parts().loss.NegativeCosineSimilarity()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.embed(x1), self.embed(x2)
        target1, target2 = self.targets(z1, z2, x1, x2)
        return (self.criterion(self.predictor(z1), target2) + self.criterion(self.predictor(z2), target1)) / 2

    def targets(self, z1: Tensor, z2: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SimSiam(Predicting):
    """The target is the embedding of the other view."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__(encoder)
        lightly = parts()
        self.head = lightly.modules.SimSiamProjectionHead(features, HIDDEN, HIDDEN)
        self.predictor = lightly.modules.SimSiamPredictionHead(HIDDEN, HIDDEN // 4, HIDDEN)

    def targets(self, z1: Tensor, z2: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return z1.detach(), z2.detach()


class BYOL(Predicting):
    """The target is what a slowly moving mean of the network makes of the other view."""

    def __init__(self, encoder: nn.Module, features: int, *, width: int = 128, depth: int = 2) -> None:
        super().__init__(encoder)
        self.head = mlp(features, width, depth)
        self.predictor = parts().modules.BYOLPredictionHead(width, HIDDEN, width)
        self.target = MovingMean(encoder, self.head)

    def targets(self, z1: Tensor, z2: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.target(x1), self.target(x2)

    def after_step(self, progress: float) -> None:
        self.target.follow(self.encoder, self.head, progress)


class MoCo(Method):
    """InfoNCE of one view against the queue of what a slowly moving mean of the network made of the other."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__(encoder)
        lightly = parts()
        self.head = lightly.modules.MoCoProjectionHead(features, HIDDEN, 128)
        self.criterion = lightly.loss.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(BANK, 128))
        self.target = MovingMean(encoder, self.head)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.embed(x1), self.target(x2))
        return loss

    def after_step(self, progress: float) -> None:
        self.target.follow(self.encoder, self.head, progress)


class MovingMean(nn.Module):
    """Encoder and head as they were on the mean of the last steps, without gradient."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(nn.Sequential(encoder, head)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(x)
        return embedding

    def follow(self, encoder: nn.Module, head: nn.Module, progress: float) -> None:
        models: Any = require("lightly.models.utils", "BYOL and MoCo")
        momentum = 1 - (1 - MOMENTUM) * (math.cos(math.pi * progress) + 1) / 2
        models.update_momentum(nn.Sequential(encoder, head), self.network, momentum)


def mlp(features: int, width: int, depth: int, last: nn.Module | None = None) -> nn.Module:
    """lightly's head of so many layers; of two it is that of SimCLR, or without a last norm that of BYOL."""
    sizes = [features, *[HIDDEN] * (depth - 1)]
    hidden = [(n_in, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU()) for n_in in sizes[:-1]]
    head: nn.Module = parts().modules.heads.ProjectionHead([*hidden, (sizes[-1], width, last, None)])
    return head


def parts() -> Any:
    """lightly's losses and heads, the published ones."""
    require("lightly", "the other methods")
    return SimpleNamespace(loss=require("lightly.loss", ""), modules=require("lightly.models.modules", ""))


METHODS: dict[str, type[Any]] = {
    "Barlow Twins": BarlowTwins,
    "SimCLR": SimCLR,
    "MoCo v2": MoCo,
    "BYOL": BYOL,
    "SimSiam": SimSiam,
    "SwAV": SwAV,
    "VICReg": VICReg,
}
