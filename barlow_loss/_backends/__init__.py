"""A backend is a module that offers the stretches of work between two global sums: see ``eager``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from barlow_loss._backends import eager

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["resolve"]


def resolve(backend: str) -> ModuleType:
    """The module behind a resolved backend name. Only the choice of Triton imports triton."""
    if backend == "triton":
        from barlow_loss._backends import triton

        return triton
    assert backend == "eager", backend
    return eager
