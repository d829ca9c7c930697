"""The run's metrics in TensorBoard: ``tensorboard --logdir runs`` shows them while it trains."""

import importlib
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from barlow_recipes.errors import Aborted, require


class TensorBoard:
    """A mirror of :class:`reporting.Metrics`: the numbers of every row that has a step, as ``kind/name``."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """After ``resumed_step``, the step of a checkpoint, what an earlier run has written in this folder is void."""
        require("tensorboard", "--tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        purge_step = None if resumed_step is None else resumed_step + 1
        self.folder = folder
        try:
            self.writer = writer(str(folder), purge_step=purge_step)
        except OSError as error:
            raise self._failure(error) from None

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        if "step" not in row:
            return
        prefix = "/".join([kind, *([str(row["representation"])] if "representation" in row else [])])
        try:
            for name, value in row.items():
                if name != "step" and isinstance(value, Real) and not isinstance(value, bool):
                    self.writer.add_scalar(f"{prefix}/{name}", value, row["step"])
            self.writer.flush()  # with it a row takes 0.2 ms, and a crash loses nothing
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> Aborted:
        return Aborted(f"cannot write {self.folder}: {error.strerror or error}")
