"""One run at a time in an output folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from barlow_recipes.errors import UsageError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, which lets go of it however it ends; no child inherits the lock.

    A restarted or requeued run can begin before the old one has died, and two would spoil each other's files.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(f"--out {folder}: another run is writing there. Wait for its end, or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
