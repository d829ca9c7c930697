"""Files of exactly the layout that facebookresearch/barlowtwins writes: its own cannot be downloaded in a test."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILTER = "exclude_bias_and_norm"


@contextmanager
def function_of_main(name: str = FILTER) -> Iterator[Callable[[Tensor], bool]]:
    """A function that pickles as one of the program's own: its LARS keeps it in the groups."""

    def function(p: Tensor) -> bool:
        return p.ndim == 1

    function.__module__, function.__qualname__ = "__main__", name
    setattr(sys.modules["__main__"], name, function)
    try:
        yield function
    finally:
        delattr(sys.modules["__main__"], name)


class OfficialBarlowTwins(nn.Module):
    """``BarlowTwins`` of ``main.py``: the module that DistributedDataParallel wraps as ``module``."""

    def __init__(self, arch: str = "resnet18", projector: str = "64-64-64") -> None:
        from torchvision import models

        super().__init__()
        self.backbone = models.get_model(arch, zero_init_residual=True)
        sizes = [self.backbone.fc.in_features, *map(int, projector.split("-"))]
        self.backbone.fc = nn.Identity()
        layers: list[nn.Module] = []
        for width, wider in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(width, wider, bias=False), nn.BatchNorm1d(wider), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.bn = nn.BatchNorm1d(sizes[-1], affine=False)


def official_model(arch: str = "resnet18", projector: str = "64-64-64", seed: int = 5) -> OfficialBarlowTwins:
    """One with batch statistics that are not those of a new module."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OfficialBarlowTwins(arch, projector)
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5 if buffer.is_floating_point() else torch.tensor(77))
            assert "running" in name or "num_batches" in name
    return model


def official_optimizer(model: nn.Module, filters: Any) -> dict[str, Any]:
    """``optimizer.state_dict()``: two groups, numbered through, with μ of every parameter."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 1) == vector] for vector in (False, True))
    options = {"weight_decay": 1e-6, "momentum": 0.9, "eta": 0.001}
    options |= {"weight_decay_filter": filters, "lars_adaptation_filter": filters}
    generator = torch.Generator().manual_seed(6)
    return {
        "state": {
            number: {"mu": torch.randn(p.shape, generator=generator) / 100}
            for number, p in enumerate([*matrices, *vectors])
        },
        "param_groups": [
            {"lr": 1.2, **options, "params": [*range(len(matrices))]},
            {"lr": 0.03, **options, "params": [*range(len(matrices), len(matrices) + len(vectors))]},
        ],
    }


def write_official(
    folder: Path, model: OfficialBarlowTwins, epoch: int = 1, *, newer: bool = False
) -> tuple[Path, Path]:
    """``checkpoint.pth`` and ``resnet50.pth``. The newer version of the program has True where it had a function."""
    folder.mkdir(parents=True, exist_ok=True)
    with function_of_main() as function:
        state = {
            "epoch": epoch,
            "model": {f"module.{name}": value for name, value in model.state_dict().items()},
            "optimizer": official_optimizer(model, True if newer else function),
        }
        torch.save(state, folder / "checkpoint.pth")
    torch.save(model.backbone.state_dict(), folder / "resnet50.pth")
    return folder / "checkpoint.pth", folder / "resnet50.pth"
