"""Entry points of PyTorch Hub: ``torch.hub.load("OWNER/barlow-loss", NAME, ...)``, or of a clone with source="local".

    loss_fn = torch.hub.load(repository, "barlow_twins_loss", lambd=0.0051)
    model = torch.hub.load(repository, "resnet50")                                # the paper's encoder and its weights
    model = torch.hub.load(repository, "encoder", "export/backbone.safetensors")  # one of your own, with its weights
    projector = torch.hub.load(repository, "projector", "checkpoint.pth")

They need torch alone; encoders need torchvision or timm, safetensors files safetensors.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

# torch.hub has this folder on its path only while it loads this file.
PATHS = [str(Path(__file__).parent), str(Path(__file__).parent / "examples")]
sys.path[:0] = PATHS
try:
    from barlow_loss import BarlowTwinsLoss, Projector
    from barlow_recipes.weights import load_encoder
finally:
    del sys.path[: len(PATHS)]

dependencies = ["torch"]

# 1000 epochs at batch 2048; 73.5 % with a linear classifier. Its terms are those of facebookresearch/barlowtwins.
OFFICIAL = "https://dl.fbaipublicfiles.com/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth"


def barlow_twins_loss(**settings: Any) -> BarlowTwinsLoss:
    """The loss: see :class:`barlow_loss.BarlowTwinsLoss`."""
    return BarlowTwinsLoss(**settings)


def projector(weights: str | None = None, in_features: int = 2048, **settings: Any) -> Projector:
    """The projector: with new weights, or with those of an official ``checkpoint.pth``, a path or an address."""
    if weights is None:
        return Projector(in_features, **settings)
    return Projector.from_checkpoint(_local(weights), **settings)


def resnet50(pretrained: bool = True, weights: str = OFFICIAL) -> nn.Module:
    """torchvision's ResNet-50, whose classifier ``fc`` is new, as the official entry point of this name gives it.

    If ``pretrained`` it has the paper's weights, which are downloaded once, or those of another path or address.
    """
    from torchvision.models import resnet50 as build

    model = build()
    if pretrained:
        state = load_encoder(_local(weights), "resnet50").module.state_dict()
        model.load_state_dict(state, strict=False)  # but for fc, which the encoder has not
    return model


def encoder(weights: str, arch: str | None = None, stem: str | None = None, **images: int) -> nn.Module:
    """The encoder in a file of weights, in eval(): images (N, C, H, W) to features (N, F).

    Args:
        weights: a path or an address, of any layout that the example reads: its own runs and exports, the official
            files, a state_dict of torchvision, timm or another program.
        arch: where the file does not say it: of torchvision, "timm/NAME" or "module:callable".
        stem: "imagenet" or "cifar", likewise.
        images: their ``channels`` and ``image_size``, likewise.
    """
    return load_encoder(_local(weights), arch, stem, **images).module.eval()


def _local(weights: str) -> Path:
    """The file, downloaded into the hub's folder where it is an address."""
    address = urlparse(str(weights))
    if address.scheme not in ("http", "https", "file"):
        return Path(weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints" / "barlow-loss"
    folder.mkdir(parents=True, exist_ok=True)
    # Of two addresses with the same end, each has a file of its own.
    path = folder / f"{hashlib.sha256(str(weights).encode()).hexdigest()[:8]}-{Path(address.path).name}"
    if not path.exists():
        torch.hub.download_url_to_file(str(weights), str(path))  # one that is cut off leaves nothing
    return path
