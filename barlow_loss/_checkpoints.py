"""Reading the checkpoints of the official program, facebookresearch/barlowtwins; nothing in them is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor

PREFIXES = ("module.projector.", "projector.")


def read_projector(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The projector's state_dict out of a file, or of what is in one: a checkpoint, a model's or its own state_dict.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is no dict.
        ValueError: the file could only be read by running code in it, or there is no projector in it.
    """
    loaded: object = source if isinstance(source, Mapping) else _load(source)
    if not isinstance(loaded, Mapping):
        raise TypeError(
            f"Projector.from_checkpoint: expected a checkpoint or a state_dict, got {type(loaded).__name__}. "
            "Pass the path of checkpoint.pth, or the dict that is in it."
        )
    content = cast("Mapping[str, Any]", loaded)
    model = content.get("model")
    named = cast("Mapping[str, Any]", model) if isinstance(model, Mapping) else content
    state: dict[str, Tensor] = {str(name): value for name, value in named.items()}
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in state):
            return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not state or not next(iter(state)).partition(".")[0].isdigit():
        raise ValueError(
            f"Projector.from_checkpoint: expected names such as module.projector.0.weight, got {list(state)[:3]}. "
            "resnet50.pth holds the backbone alone: pass checkpoint.pth."
        )
    return state


def _load(path: str | os.PathLike[str]) -> object:
    try:
        # The official optimiser keeps a function of this name in its groups, which weights_only refuses.
        with torch.serialization.safe_globals([(_exclude_bias_and_norm, "__main__.exclude_bias_and_norm")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # The first line of torch.load's own error advises to run what is in the file.
        reason = lines[-2] if isinstance(error, UnpicklingError) and len(lines) > 2 else lines[0]
        raise ValueError(
            f"Projector.from_checkpoint: expected {os.fspath(path)} to hold tensors and plain values alone, got an "
            f"error on reading it: {reason}. Is it a checkpoint, and whole?"
        ) from error


def _exclude_bias_and_norm(p: object) -> None:
    """Stands for the function of the file, and is never called."""
