"""Checks at the face: each message names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from barlow_loss._pairs import Weights, all_alike, normalized

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_choice",
    "check_eps",
    "check_flags",
    "check_pair_weights",
    "check_target",
    "check_tensor",
    "check_views",
    "check_weight",
    "two_dimensions",
    "weight_rows",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REAL: Any = (float, int, Real)  # in this order: the last one, numpy's numbers, takes longest to ask for
_TWO_DIMENSIONS = {
    0: "Pass the embeddings of the whole batch, not a number.",
    1: "Rows are samples: use z.unsqueeze(1) for one feature, or torch.stack the samples.",
    3: "Pool tokens with z.mean(dim=1), flatten them with z.flatten(1), or make each a sample with z.flatten(0, 1).",
}
_MORE_DIMENSIONS = (
    "Pool feature maps with z.flatten(2).mean(2), flatten them with z.flatten(1), "
    "or make each position a sample with z.movedim(1, -1).flatten(0, -2)."
)


def check_views(caller: str, *views: Any, names: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """Two or more (N, D) floating tensors of one shape, dtype and device, D ≥ 1. How many rows suffice, all ranks know.

    names: those of the arguments, where they are not z1, z2 and so on.

    Raises:
        TypeError: not tensors, not floating, sparse, or of different dtypes.
        ValueError: fewer than two views, wrong or different shapes, different devices or D = 0.
    """
    z1: Any = views[0] if len(views) >= 2 else None
    fits = isinstance(z1, torch.Tensor) and z1.dtype in _DTYPES and not z1.is_nested
    fits = fits and z1.ndim == 2 and z1.shape[1] != 0
    for z in views:
        fits = fits and isinstance(z, torch.Tensor) and (type(z) is Tensor or not _spread(z)) and not z.is_nested
        fits = fits and z.shape == z1.shape and z.dtype == z1.dtype
        fits = fits and z.device == z1.device and z.layout == torch.strided
    if fits:
        return views
    raise _refusal(caller, views, names or [f"z{number}" for number in range(1, len(views) + 1)])


def _refusal(caller: str, views: tuple[Any, ...], names: Sequence[str]) -> Exception:
    if len(views) < 2:
        return ValueError(f"{caller}: expected at least two views, got {_too_few(views)}.")
    for name, z in zip(names, views, strict=True):
        check_tensor(caller, name, z)
    shapes = f"got {_listed(names, [tuple(z.shape) for z in views])}"
    count = "two" if len(views) == 2 else str(len(views))
    every = "both views" if len(views) == 2 else f"all {len(views)} views"
    if any(z.ndim != 2 for z in views):
        odd = next(z.ndim for z in views if z.ndim != 2)
        return ValueError(f"{caller}: expected {count} tensors of shape (N, D), {shapes}. {two_dimensions(odd)}")
    if len({z.shape for z in views}) > 1:
        rows = "Row n of z1 and row n of z2" if len(views) == 2 else "Row n of every view"
        return ValueError(
            f"{caller}: expected the same (N, D) for {every}, {shapes}. "
            f"{rows} must come from the same sample, through the same projector width."
        )
    other = next((name for name, z in zip(names, views, strict=True) if z.dtype != views[0].dtype), None)
    if other is not None:
        return TypeError(
            f"{caller}: expected one dtype for {every}, got {_listed(names, [z.dtype for z in views])}. "
            f"Cast one of them, for example {other}.to(z1.dtype)."
        )
    other = next((name for name, z in zip(names, views, strict=True) if z.device != views[0].device), None)
    if other is not None:
        places = _listed(names, [f"on {z.device}" for z in views])
        return ValueError(
            f"{caller}: expected {every} on one device, got {places}. "
            f"Move one of them, for example {other}.to(z1.device)."
        )
    return ValueError(f"{caller}: expected D ≥ 1 features, {shapes}. Check the projector's output width.")


def two_dimensions(ndim: int) -> str:
    """How a tensor of so many dimensions becomes (N, D)."""
    return _TWO_DIMENSIONS.get(ndim, _MORE_DIMENSIONS)


def _too_few(views: tuple[Any, ...]) -> str:
    only: Any = views[0] if views else None
    if isinstance(only, (list, tuple)):
        return f"one {type(cast('Any', only)).__name__}. Write loss(*views)"
    if isinstance(only, torch.Tensor) and not only.is_nested and only.ndim == 3:
        return f"one tensor of shape {tuple(only.shape)}. If its first dimension counts the views: loss(*z.unbind())"
    return f"{len(views)}. Call it as loss(z1, z2)"


def _spread(z: Tensor) -> bool:
    """A DTensor, which is one tensor on many processes."""
    return hasattr(z, "full_tensor") and hasattr(z, "to_local")


def _listed(names: Sequence[str], values: list[Any]) -> str:
    """z1 (4, 8) and z2 (4, 9); of many views the first and those that differ from it."""
    shown = [(n, v) for n, v in zip(names, values, strict=True) if len(names) <= 4 or n == names[0] or v != values[0]]
    return " and ".join(f"{name} {value}" for name, value in shown[:4])


def check_pair_weights(caller: str, pair_weights: Any, views: int) -> Weights:
    """w_ij / Σ_{i<j} w_ij from V rows of V numbers, or the plain mean.

    Raises:
        TypeError: not numbers in rows.
        ValueError: not V×V, not symmetric, negative or not finite, a diagonal that is not 0, or nothing but zeros.
    """
    if pair_weights is None:
        return all_alike(views)
    rows = weight_rows(caller, pair_weights)
    if len(rows) != views:
        raise ValueError(
            f"{caller}: expected pair_weights of shape ({views}, {views}) for {views} views, "
            f"got {len(rows)} rows. Give a row and a column for every view."
        )
    return normalized(rows)


def weight_rows(caller: str, pair_weights: Any) -> Weights:
    """The rows as tuples of floats, checked for all but their number."""
    if isinstance(pair_weights, torch.Tensor):
        pair_weights = cast("Any", pair_weights.detach()).tolist()
    try:
        rows = tuple(tuple(float(w) for w in row) for row in pair_weights)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{caller}: expected pair_weights to be a square tensor or a sequence of rows of numbers, got "
            f"{type(pair_weights).__name__} ({error}). For three views: [[0, 1, 1], [1, 0, 1], [1, 1, 0]]."
        ) from None
    size = len(rows)
    got = f"got {[list(row) for row in rows]}" if size <= 4 else f"got {size} rows"
    if size < 2 or any(len(row) != size for row in rows):
        raise ValueError(f"{caller}: expected pair_weights of shape (V, V) with V ≥ 2, {got}.")
    if not all(0 <= w < math.inf for row in rows for w in row):
        raise ValueError(f"{caller}: expected pair_weights to be finite and ≥ 0, {got}. 0 leaves a pair out.")
    if any(rows[i][i] for i in range(size)):
        raise ValueError(f"{caller}: expected a diagonal of 0 in pair_weights, {got}. No view pairs with itself.")
    if any(rows[i][j] != rows[j][i] for i in range(size) for j in range(i)):
        raise ValueError(f"{caller}: expected symmetric pair_weights, {got}. A pair has one weight: use (w + w.T) / 2.")
    if not any(w for row in rows for w in row):
        raise ValueError(f"{caller}: expected a positive weight in pair_weights, {got}. All pairs are left out.")
    return rows


def check_tensor(caller: str, name: str, z: Any) -> None:
    """A dense tensor of a floating dtype, with any shape.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"{caller}: expected {name} to be a tensor, got {type(z).__name__}. {_what_to_pass(z)}")
    if _spread(z):
        raise TypeError(
            f"{caller}: expected {name} to be a tensor of this process, got {type(z).__name__}. Use {name}.to_local() "
            f"for this process's rows, or {name}.full_tensor() with synchronize=False for those of all."
        )
    if z.is_nested:
        raise TypeError(
            f"{caller}: expected {name} to be a dense tensor, got a nested one. Pool each sample over its tokens, for "
            f"example torch.stack([sample.mean(0) for sample in {name}.unbind()])."
        )
    if z.layout != torch.strided:
        raise TypeError(
            f"{caller}: expected {name} to be a dense tensor, got layout {z.layout}. Use {name}.to_dense()."
        )
    if z.dtype not in _DTYPES:
        raise TypeError(
            f"{caller}: expected {name} to be float64, float32, bfloat16 or float16, got {z.dtype}. "
            f"Cast it, for example {f'torch.view_as_real({name}).flatten(1)' if z.is_complex() else f'{name}.float()'}."
        )


def _what_to_pass(z: Any) -> str:
    """In place of what is no tensor."""
    items: list[Any] = [*z] if type(z) in (list, tuple) else []
    inside: dict[Any, Any] = {**z} if hasattr(z, "keys") else getattr(z, "__dict__", {})
    tensors = [str(name) for name, value in inside.items() if isinstance(value, torch.Tensor)]
    if isinstance(z, _REAL) and not isinstance(z, bool):
        return f"Settings go by name, for example lambd={z}."
    if tensors:
        return f"Pass a tensor in it: {', '.join(tensors[:3])}."
    if any(isinstance(item, torch.Tensor) for item in items):
        return "Pass the tensors in it one by one, for example loss(*views)."
    if items or hasattr(z, "__array__"):
        return "Use torch.as_tensor."
    return "Pass the embeddings that the projector returns."


def check_eps(caller: str, eps: Any) -> None:
    """A finite number ≥ 0."""
    if isinstance(eps, bool) or not isinstance(eps, _REAL):
        raise TypeError(f"{caller}: expected eps to be a float, got {type(eps).__name__}. The usual value is 1e-5.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{caller}: expected eps to be finite and ≥ 0, got {eps}. The usual value is 1e-5.")


def check_weight(caller: str, name: str, value: Any, usual: float) -> None:
    """A finite number ≥ 0 or a real 0-d tensor, whose value is not read: that would wait for the device."""
    if isinstance(value, torch.Tensor):
        if value.ndim != 0 or value.is_complex():
            raise ValueError(
                f"{caller}: expected {name} to be a float or a real 0-d tensor, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}. Use {name}.squeeze() or float({name})."
            )
        return
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(
            f"{caller}: expected {name} to be a float or a 0-d tensor, got {type(value).__name__}. "
            f"The usual value is {usual}."
        )
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{caller}: expected {name} to be finite and ≥ 0, got {value}. The usual value is {usual}; "
            "0 leaves the term out."
        )


def check_flags(caller: str, **flags: Any) -> None:
    """True or False: other values would count as one of them, and "no" as true."""
    for name, value in flags.items():
        if type(value) is not bool:
            raise TypeError(f"{caller}: expected {name} to be True or False, got {value!r}.")


def check_target(caller: str, target: Any) -> None:
    """A finite number."""
    if isinstance(target, bool) or not isinstance(target, _REAL):
        raise TypeError(
            f"{caller}: expected off_diagonal_target to be a float, got {type(target).__name__}. "
            "Barlow Twins has 0, the form of HSIC −1."
        )
    if not abs(target) < math.inf:
        raise ValueError(
            f"{caller}: expected off_diagonal_target to be finite, got {target}. Barlow Twins has 0, HSIC's form −1."
        )


def check_choice(caller: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{caller}: expected {name} to be one of {listed}, got {value!r}.")
