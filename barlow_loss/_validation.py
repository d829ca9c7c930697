"""Checks at the face: each message names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_choice", "check_eps", "check_lambd", "check_tensor", "check_views"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_POOL_OR_FLATTEN = (
    "Pool feature maps with z.mean(dim=(2, 3)), flatten them with z.flatten(1), "
    "or make each token a sample with z.flatten(0, 1)."
)


def check_views(caller: str, *views: Any) -> tuple[Tensor, Tensor]:
    """Two (N, D) floating tensors of one shape, dtype and device, D ≥ 1. How many rows are enough, all ranks know.

    Raises:
        TypeError: not tensors, not floating, sparse, or of different dtypes.
        ValueError: wrong number of views, wrong or different shapes, different devices or D = 0.
    """
    if len(views) == 2 and isinstance(views[0], torch.Tensor) and isinstance(views[1], torch.Tensor):
        z1, z2 = views
        alike = z1.shape == z2.shape and z1.dtype == z2.dtype and z1.device == z2.device and z1.layout == z2.layout
        if alike and z1.layout == torch.strided and z1.dtype in _DTYPES and z1.ndim == 2 and z1.shape[1] != 0:
            return z1, z2
    if len(views) != 2:
        raise ValueError(
            f"{caller}: expected exactly two views, got {len(views)}. "
            "Call it as loss(z1, z2); for more views, add up the losses of the pairs."
        )
    z1, z2 = views
    for name, z in (("z1", z1), ("z2", z2)):
        check_tensor(caller, name, z)
    shapes = f"got z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)}"
    if z1.ndim != 2 or z2.ndim != 2:
        raise ValueError(f"{caller}: expected two tensors of shape (N, D), {shapes}. {_POOL_OR_FLATTEN}")
    if z1.shape != z2.shape:
        raise ValueError(
            f"{caller}: expected the same (N, D) for both views, {shapes}. "
            "Row n of z1 and row n of z2 must come from the same sample, through the same projector width."
        )
    if z1.dtype != z2.dtype:
        raise TypeError(
            f"{caller}: expected one dtype for both views, got z1 {z1.dtype} and z2 {z2.dtype}. "
            "Cast one of them, for example z2.to(z1.dtype)."
        )
    if z1.device != z2.device:
        raise ValueError(
            f"{caller}: expected both views on one device, got z1 on {z1.device} and z2 on {z2.device}. "
            "Move one of them, for example z2.to(z1.device)."
        )
    raise ValueError(f"{caller}: expected D ≥ 1 features, {shapes}. Check the projector's output width.")


def check_tensor(caller: str, name: str, z: Any) -> None:
    """A dense tensor of a floating dtype, with any shape.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"{caller}: expected {name} to be a tensor, got {type(z).__name__}. Use torch.as_tensor.")
    if z.layout != torch.strided:
        raise TypeError(
            f"{caller}: expected {name} to be a dense tensor, got layout {z.layout}. Use {name}.to_dense()."
        )
    if z.dtype not in _DTYPES:
        raise TypeError(
            f"{caller}: expected {name} to be float64, float32, bfloat16 or float16, got {z.dtype}. "
            f"Cast it, for example {name}.float()."
        )


def check_eps(caller: str, eps: Any) -> None:
    """A finite number ≥ 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{caller}: expected eps to be a float, got {type(eps).__name__}. The usual value is 1e-5.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{caller}: expected eps to be finite and ≥ 0, got {eps}. The usual value is 1e-5.")


def check_lambd(caller: str, lambd: Any) -> None:
    """A finite number ≥ 0 or a real 0-d tensor, whose value is not read: that would wait for the device."""
    if isinstance(lambd, torch.Tensor):
        if lambd.ndim != 0 or lambd.is_complex():
            raise ValueError(
                f"{caller}: expected lambd to be a float or a real 0-d tensor, got a tensor of shape "
                f"{tuple(lambd.shape)} and dtype {lambd.dtype}. Use lambd.squeeze() or float(lambd)."
            )
        return
    if isinstance(lambd, bool) or not isinstance(lambd, int | float):
        raise TypeError(
            f"{caller}: expected lambd to be a float or a 0-d tensor, got {type(lambd).__name__}. "
            "The paper's value is 0.0051."
        )
    if not 0 <= lambd < math.inf:
        raise ValueError(f"{caller}: expected lambd to be finite and ≥ 0, got {lambd}. The paper's value is 0.0051.")


def check_choice(caller: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{caller}: expected {name} to be one of {listed}, got {value!r}.")
