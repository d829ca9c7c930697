"""What the property tests draw: a description of two views, small enough to read in a failure report."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cpu"  # see conftest.py

# Name of a kind of embeddings -> its two views, standard-normal-like in size, before `std` and `mean` are applied.
KINDS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {}


def _kind(views: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    KINDS[views.__name__] = views
    return views


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@_kind
def gaussian(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Independent views: an untrained network, C is noise."""
    return _normal(n, d, generator=generator), _normal(n, d, generator=generator)


@_kind
def trained(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One signal seen twice through a little noise: C_ii near 1."""
    signal = _normal(n, d, generator=generator)
    return tuple(signal + 0.2 * _normal(n, d, generator=generator) for _ in range(2))


@_kind
def heavy_tailed(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Student's t with three degrees of freedom: a few samples dominate every sum."""
    return tuple(
        _normal(n, d, generator=generator) / _normal(3, n, d, generator=generator).square().mean(0).sqrt()
        for _ in range(2)
    )


@_kind
def low_rank(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every feature is a mixture of two: C is far from diagonal."""
    mixture = _normal(2, d, generator=generator)
    return tuple(_normal(n, 2, generator=generator) @ mixture for _ in range(2))


@_kind
def near_collapsed(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A spread of about √ε (at std = 1), where ε in the root is felt."""
    return tuple(3e-3 * view for view in trained(n, d, generator))


@_kind
def dead_features(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every third feature is constant in both views, the one after it in the first view only."""
    z1, z2 = trained(n, d, generator)
    z1[:, ::3] = z2[:, ::3] = 0
    z1[:, 1::3] = 0
    return z1, z2


@_kind
def whitened(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Equal views with uncorrelated features of variance 1: the optimum. Needs d < n."""
    centered = _normal(n, d, generator=generator)
    orthonormal, _ = torch.linalg.qr(centered - centered.mean(0))
    view = (orthonormal - orthonormal.mean(0)) * n**0.5
    return view, view.clone()


@dataclass(frozen=True)
class Batch:
    """Two views of `n` samples with `d` features, reproducible from this line alone."""

    n: int
    d: int
    seed: int
    kind: str
    mean: float = 0.0
    std: float = 1.0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def views(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = self.generator()
        views = KINDS[self.kind](self.n, self.d, generator)
        # Every feature of every view has a mean of its own, of the order of `mean`.
        means = self.mean * (0.5 + torch.rand(2, self.d, generator=generator, dtype=torch.float64))
        z1, z2 = (self.std * view + mean for view, mean in zip(views, means, strict=True))
        return z1.to(DEVICE, dtype), z2.to(DEVICE, dtype)

    def more_views(self, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The two, then mixtures of them with some noise, each with a size and a mean of its own."""
        z1, z2 = self.views()
        generator = self.generator()
        others = []
        for number in range(2, count):
            share = torch.rand((), generator=generator, dtype=torch.float64)
            noise = 0.3 * self.std * _normal(self.n, self.d, generator=generator).to(DEVICE)
            others.append(number * (share * z1 + (1 - share) * z2 + noise))
        return tuple(z.to(dtype) for z in (z1, z2, *others))


# Free sizes, and the corners: the smallest batch, one feature, N = D (even, odd), N ≪ D, N ≫ D.
_shapes = st.one_of(
    st.tuples(st.integers(2, 24), st.integers(1, 48)),
    st.sampled_from([(2, 1), (2, 9), (7, 1), (16, 16), (17, 17), (5, 61), (61, 5)]),
)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    means: tuple[float, ...] = (0.0, 1.0, 1e4),
    stds: tuple[float, ...] = (1.0, 1e-2, 1e2),
) -> Batch:
    """Two views of any size and kind. Laws that round the inputs once more keep `means` near the spread."""
    n, d = draw(_shapes)
    kind = draw(st.sampled_from([kind for kind in kinds if kind != "whitened" or d < n] or ["gaussian"]))
    return Batch(n, d, draw(st.integers(0, 2**16)), kind, draw(st.sampled_from(means)), draw(st.sampled_from(stds)))


@st.composite
def whitened_batches(draw: st.DrawFn) -> Batch:
    """Equal, whitened views: every C_ii is k = v/(v + ε) and every other C_ij is 0."""
    n = draw(st.integers(2, 32))
    return Batch(n, draw(st.integers(1, n - 1)), draw(st.integers(0, 2**16)), "whitened", std=draw(stds_near_root_eps))


stds_near_root_eps = st.sampled_from([1.0, 1e-2, 3e-3, 1e2])
epsilons = st.sampled_from([1e-5, 1e-12, 1e-2, 1.0])
lambdas = st.sampled_from([0.0051, 0.0, 0.05, 1.0])
