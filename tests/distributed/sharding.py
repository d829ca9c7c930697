"""One batch, cut into shards that differ: what every distributed test gives its ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from strategies import Batch

# Rows per rank: as many everywhere, not, none on one, one each.
SHARES = {
    1: {"even": (13,)},
    2: {"even": (7, 7), "uneven": (3, 10), "empty": (9, 0), "first-empty": (0, 9), "one-each": (1, 1)},
    3: {"even": (5, 5, 5), "uneven": (2, 9, 4), "empty": (6, 0, 5), "first-empty": (0, 6, 5), "one-each": (1, 1, 1)},
    4: {
        "even": (4, 4, 4, 4),
        "uneven": (1, 7, 2, 5),
        "empty": (4, 6, 0, 3),
        "first-empty": (0, 4, 6, 3),
        "one-each": (1,) * 4,
    },
}
CASES = [(world_size, name) for world_size, shares in SHARES.items() for name in shares]


def global_batch(
    counts: tuple[int, ...],
    d: int,
    dtype: torch.dtype,
    kind: str = "trained",
    mean: float = 3.0,
    std: float = 0.5,
    views: int = 2,
) -> tuple[Tensor, ...]:
    """The views of the whole batch. Every shard has a mean and a spread of its own, by more than one deviation.

    With shards drawn alike, statistics per rank would nearly be the global ones, and mistakes in combining them small.
    """
    every = Batch(sum(counts), d, 7, kind, mean=mean, std=std).more_views(views)
    generator = torch.Generator().manual_seed(11)
    start = 0
    for count in counts:
        shift = 2 * std * torch.randn(d, generator=generator, dtype=torch.float64)
        spread = 0.5 + torch.rand(d, generator=generator, dtype=torch.float64)
        for z in every:
            rows = z[start : start + count]
            rows.copy_(mean + (rows - mean) * spread + shift)
        start += count
    return tuple(z.to(dtype) for z in every)


def shard(z: Tensor, counts: tuple[int, ...], rank: int | None = None) -> Tensor:
    """This rank's rows."""
    return z.split(counts)[dist.get_rank() if rank is None else rank].clone()
