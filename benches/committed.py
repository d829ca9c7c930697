"""Where results lie, which are the newest, and which were committed.

A run writes its results beside the committed ones. Until they are added to the repository they are nobody's reference:
README and the regression gate go by those that git knows. Outside of a repository all count.
"""

from __future__ import annotations

import json
import subprocess
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from machine import RESULTS

if TYPE_CHECKING:
    from pathlib import Path

PATTERN = "20??-??-??-*.json"


def newest(folder: Path = RESULTS) -> Path:
    """The newest results in ``folder``, by the date that begins their name.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise FileNotFoundError(f"{folder}: expected results named {PATTERN}, found none: run make bench")
    return found[-1]


def tracked(folder: Path = RESULTS) -> Path:
    """The newest results in ``folder`` that git tracks, as they lie there now."""
    listed = _git(folder, "ls-files", ".")
    found = sorted(name for name in (listed or "").splitlines() if fnmatch(name, PATTERN))
    return folder / found[-1] if found else newest(folder)


def baseline(folder: Path = RESULTS) -> tuple[str, dict[str, Any]]:
    """Name and content of the newest results of the last commit, whatever a later run has written over them."""
    path = tracked(folder)
    content = _git(folder, "show", f"HEAD:./{path.name}")
    return path.name, json.loads(content) if content else load(path)


def _git(folder: Path, *command: str) -> str | None:
    """What git says in ``folder``, or None where there is none, or no repository."""
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def load(path: Path) -> dict[str, Any]:
    """The results in a file."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
