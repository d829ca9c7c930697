"""What is trained, and with which numbers, for each kind of data or published run.

Each has the flags that differ from the defaults of :class:`~barlow_recipes.settings.Settings`, which are the paper's.
"""

from typing import Any

WORLD_SIZE_OF_THE_OFFICIAL_RUN = 16  # V100s, says its README; the paper says 32

LEARNING_RATE_BIASES, WEIGHT_DECAY = 0.0048, 1e-6  # as published


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
    return {"learning_rate_biases": LEARNING_RATE_BIASES / world_size, "weight_decay": WEIGHT_DECAY * world_size}


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
    "one-gpu": {"batch_size": 256, "epochs": 300},  # and the weights' learning rate by the batch size
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
