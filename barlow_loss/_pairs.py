"""Which pairs of views the loss is a mean over, and how much each of them weighs.

L = Σ_{i<j} w_ij L_ij / Σ_{i<j} w_ij. Everything here is Python numbers, known before the first value is read.
"""

from __future__ import annotations

import itertools

from torch import Tensor

__all__ = ["TWO_VIEWS", "Stack", "Weights", "all_alike", "each", "normalized", "pairs_of", "weights_of_pairs"]

# u of two views is one buffer, (2, N, D), of more a buffer of each: above 32 MB glibc asks the system for fresh pages
# in every step, and their first use can cost more than all the rest.
Stack = Tensor | tuple[Tensor, ...]
Weights = tuple[tuple[float, ...], ...]  # V rows of V numbers, symmetric, Σ_{i<j} w_ij = 1

TWO_VIEWS: Weights = ((0.0, 1.0), (1.0, 0.0))


def each(u: Stack) -> tuple[Tensor, ...]:
    """u of every view, (N, D)."""
    return u.unbind() if isinstance(u, Tensor) else u


def all_alike(views: int) -> Weights:
    """The plain mean over the V(V − 1)/2 pairs."""
    w = 2 / (views * (views - 1))
    return tuple(tuple(0.0 if i == j else w for j in range(views)) for i in range(views))


def normalized(rows: Weights) -> Weights:
    """The weights of all pairs sum to 1; the largest goes out first, so that no size of them overflows."""
    largest = max(max(row) for row in rows)
    scaled = [[w / largest for w in row] for row in rows]
    total = sum([scaled[i][j] for i in range(len(rows)) for j in range(i)])
    return tuple(tuple(w / total for w in row) for row in scaled)


def pairs_of(views: int) -> tuple[tuple[int, int], ...]:
    """The pairs i < j in the order in which their numbers are kept: (0, 1), (0, 2), …, (1, 2), and so on."""
    return tuple(itertools.combinations(range(views), 2))


def weights_of_pairs(weights: Weights) -> tuple[float, ...]:
    """w_ij in the order of ``pairs_of``."""
    return tuple(weights[i][j] for i, j in pairs_of(len(weights)))
