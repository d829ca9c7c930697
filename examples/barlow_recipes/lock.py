"""Where callers still look for it: see :mod:`barlow_recipes.folders`."""

from barlow_recipes.folders import LOCK, locked

__all__ = ["LOCK", "locked"]
