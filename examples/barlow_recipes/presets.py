"""What is trained, and with which numbers: for each kind of data or published run, the values of the flags."""

from typing import Any

WORLD_SIZE_OF_THE_OFFICIAL_RUN = 16  # V100s, says its README; the paper says 32

PAPER: dict[str, Any] = {
    "arch": "resnet50",
    "stem": "imagenet",
    "projector": "8192-8192-8192",
    "image_size": 224,
    "batch_size": 2048,
    "epochs": 1000,
    "warmup_epochs": 10.0,
    "optimizer": "lars",
    "learning_rate_weights": 0.2,
    "learning_rate_biases": 0.0048,
    "weight_decay": 1e-6,
    "trust_coefficient": 0.001,
    "clip_trust": False,
    "scale_loss": 1.0,
    "lambd": 0.0051,
    "crop_scale": 0.08,
    "color_jitter": (0.4, 0.4, 0.2, 0.1),
    "grayscale": 0.2,
    "blur": (1.0, 0.1),
    "solarize": (0.0, 0.2),
    "probe_every": 10,
}


def official(world_size: int) -> dict[str, Any]:
    r"""The settings that give, with exact gradients, the updates of the official program on W processes.

    It sums C over the processes without differentiating the sum, and DistributedDataParallel then takes the mean, so
    its gradient is g/W, where g is the true one. Into the update of a vector (a bias, a norm's parameter) that goes as
    it is, and the vector moves as with g and a learning rate W times smaller:

    .. math:: \text{lr}\,(g/W) = (\text{lr}/W)\,g

    A matrix takes a step whose length does not depend on the scale of d, so that only the weight decay's share of d
    counts, and it is W times the written one:

    .. math::
        d = g/W + \beta p = \tfrac1W (g + W\beta\,p), \qquad
        \eta\,\|p\|\;d/\|d\| \text{ is the same for } W d = g + W\beta\,p

    Hence biases' rate / W, weight decay × W, and everything else as published.
    """
    return PAPER | {
        "learning_rate_biases": PAPER["learning_rate_biases"] / world_size,
        "weight_decay": PAPER["weight_decay"] * world_size,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "arch": "digits-cnn",
        "projector": "512-512",
        "image_size": 8,
        "batch_size": 128,
        "epochs": 60,
        "optimizer": "adamw",
        "learning_rate_weights": 4e-3,
        "learning_rate_biases": 4e-3,
        "weight_decay": 1e-4,
        "probe_every": 5,
    },
    "fashion-mnist": {
        "arch": "small-cnn",
        "projector": "512-512",
        "image_size": 28,
        "batch_size": 256,
        "epochs": 5,
        "optimizer": "adamw",
        "learning_rate_weights": 2e-3,
        "learning_rate_biases": 2e-3,
        "weight_decay": 1e-4,
        "crop_scale": 0.3,
        "color_jitter": (0.8, 0.8, 0.8, 0.4),  # colours mean nothing there
        "blur": (0.0, 0.0),
        "channels_last": True,
        "probe_every": 2,
    },
    # One GPU: the published recipe with the author's learning rate for a small batch (70.7 % after 300 epochs).
    "one-gpu": {"batch_size": 256, "epochs": 300, "learning_rate_weights": None},
    "paper": {},
    "official-16": official(WORLD_SIZE_OF_THE_OFFICIAL_RUN),
    # 32-pixel images, the numbers of solo-learn's CIFAR runs: 92.10 % on CIFAR-10, 70.90 % on CIFAR-100 (online).
    "cifar": {
        "arch": "resnet18",
        "stem": "cifar",
        "projector": "2048-2048-2048",
        "image_size": 32,
        "batch_size": 256,
        "learning_rate_weights": 0.3,
        "learning_rate_biases": 0.3,
        "weight_decay": 1e-4,
        "trust_coefficient": 0.02,
        "clip_trust": True,
        "scale_loss": 0.1,
        "blur": (0.0, 0.0),
    },
    # The same images with SGD at the rates of lightly's CIFAR benchmark, where vectors decay as well: 84.2 % by nearest
    # neighbours after 200 epochs.
    "cifar-sgd": {
        "arch": "resnet18",
        "stem": "cifar",
        "projector": "2048-2048-2048",
        "image_size": 32,
        "batch_size": 128,
        "epochs": 200,
        "warmup_epochs": 0.0,
        "optimizer": "sgd",
        "learning_rate_weights": 0.12,
        "learning_rate_biases": 0.12,
        "weight_decay": 5e-4,
        "blur": (0.0, 0.0),
    },
}


def preset(name: str) -> dict[str, Any]:
    """Every flag that a preset decides: its own numbers, and the paper's where it has none."""
    return PAPER | PRESETS[name]
