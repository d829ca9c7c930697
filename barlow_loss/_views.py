"""Checks that the relatives of the loss share: any number of views, weights of terms, how samples were mixed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from barlow_loss._validation import check_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["check_alike", "check_alpha", "check_permutation", "check_weight", "claim_of_weight", "needing_gradients"]


def check_alike(caller: str, views: Mapping[str, Any]) -> None:
    """Two or more (N, D) floating tensors of one shape, dtype and device, D ≥ 1, by name.

    Raises:
        TypeError: not tensors, not floating, sparse, or of different dtypes.
        ValueError: fewer than two, wrong or different shapes, different devices or D = 0.
    """
    if len(views) < 2:
        raise ValueError(
            f"{caller}: expected two views or more, got {len(views)}. Call it as loss(z1, z2), with an embedding of "
            "each view of the same samples."
        )
    for name, z in views.items():
        check_tensor(caller, name, z)
    first, *others = views.values()
    if any(z.ndim != 2 for z in views.values()):
        raise ValueError(
            f"{caller}: expected tensors of shape (N, D), got {_listed(views, _shape)}. Pool feature maps with "
            "z.mean(dim=(2, 3)), flatten them with z.flatten(1), or make each token a sample with z.flatten(0, 1)."
        )
    if any(z.shape != first.shape for z in others):
        raise ValueError(
            f"{caller}: expected the same (N, D) for all views, got {_listed(views, _shape)}. "
            "Row n of each must come from the same sample, through the same projector width."
        )
    if any(z.dtype != first.dtype for z in others):
        raise TypeError(
            f"{caller}: expected one dtype for all views, got {_listed(views, lambda z: str(z.dtype))}. "
            "Cast them to one, for example with z.to(z1.dtype)."
        )
    if any(z.device != first.device for z in others):
        raise ValueError(
            f"{caller}: expected all views on one device, got {_listed(views, lambda z: f'on {z.device}')}. "
            "Move them, for example with z.to(z1.device)."
        )
    if first.shape[1] == 0:
        raise ValueError(
            f"{caller}: expected D ≥ 1 features, got {_listed(views, _shape)}. Check the projector's output width."
        )


def _listed(views: Mapping[str, Tensor], what: Callable[[Tensor], str]) -> str:
    return " and ".join([f"{name} {what(z)}" for name, z in views.items()])


def _shape(z: Tensor) -> str:
    return str(tuple(z.shape))


def check_weight(caller: str, name: str, value: Any, usual: float) -> None:
    """A finite number ≥ 0 or a real 0-d tensor, whose value is not read: that would wait for the device."""
    if isinstance(value, torch.Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(
                f"{caller}: expected {name} to be a float or a real 0-d tensor, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}. Use {name}.squeeze() or float({name})."
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{caller}: expected {name} to be a float or a 0-d tensor, got {type(value).__name__}. "
            f"The usual value is {usual}."
        )
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{caller}: expected {name} to be finite and ≥ 0, got {value}. The usual value is {usual}; "
            "0 leaves the term out."
        )


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


def needing_gradients(views: Mapping[str, Tensor]) -> list[bool]:
    """Which views there will be gradients for: alike on all ranks."""
    return [torch.is_grad_enabled() and z.requires_grad for z in views.values()]
