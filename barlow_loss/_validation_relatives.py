"""Checks that the relatives of the loss share: weights of terms, how samples were mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_alpha", "check_permutation", "claim_of_weight", "needing_gradients"]


def claim_of_weight(value: float | Tensor) -> Any:
    """What every rank must have alike of a weight: its value, if that is known without waiting."""
    return "a tensor" if isinstance(value, torch.Tensor) else float(value)


def check_alpha(caller: str, alpha: Any) -> None:
    """A number in [0, 1] or a real 0-d tensor, whose value is not read."""
    if isinstance(alpha, torch.Tensor):
        if alpha.ndim != 0 or alpha.is_complex():
            raise ValueError(
                f"{caller}: expected alpha to be a float or a real 0-d tensor, got a tensor of shape "
                f"{tuple(alpha.shape)} and dtype {alpha.dtype}. Draw one for the rows of this process."
            )
        return
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(
            f"{caller}: expected alpha to be a float or a 0-d tensor, got {type(alpha).__name__}. Draw it uniformly "
            "from 0 to 1."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"{caller}: expected alpha in [0, 1], got {alpha}. It is the share of the first view in the mixed samples."
        )


def check_permutation(caller: str, permutation: Any, z: Tensor) -> None:
    """(n,) integers on the device of z, (n, D). That each is from 0 to n − 1 and there once is not looked at."""
    if not isinstance(permutation, torch.Tensor):
        raise TypeError(
            f"{caller}: expected permutation to be a tensor, got {type(permutation).__name__}. "
            "Use torch.randperm(len(z1), device=z1.device)."
        )
    if permutation.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{caller}: expected permutation to be int64 or int32, got {permutation.dtype}. "
            "Use torch.randperm(len(z1), device=z1.device)."
        )
    if permutation.shape != z.shape[:1]:
        raise ValueError(
            f"{caller}: expected permutation of shape ({z.shape[0]},), an index for each row of this process, got "
            f"{tuple(permutation.shape)}. Use torch.randperm(len(z1), device=z1.device)."
        )
    if permutation.device != z.device:
        raise ValueError(
            f"{caller}: expected permutation on the device of the views, got {permutation.device} and {z.device}. "
            "Use permutation.to(z1.device)."
        )


def needing_gradients(views: Iterable[Tensor]) -> list[bool]:
    """Which views there will be gradients for: alike on all ranks."""
    return [torch.is_grad_enabled() and z.requires_grad for z in views]
