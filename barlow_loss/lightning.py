"""A callback for Lightning's Trainer. It needs ``lightning`` or ``pytorch_lightning``, which nothing else here does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from barlow_loss.monitoring import WATCHED, CollapseMonitor

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from barlow_loss.monitoring import Gate

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_warn
except ImportError:
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities import rank_zero_warn
    except ImportError as error:
        raise ImportError(
            "barlow_loss.lightning: expected the package lightning or pytorch_lightning, found neither. "
            "Use pip install lightning, or barlow_loss.CollapseMonitor, which needs torch alone."
        ) from error

__all__ = ["CollapseCallback"]


class CollapseCallback(Callback):
    """Sends every k steps a collapse report to the Trainer's loggers, and stops the Trainer where a gate says so.

    The LightningModule stays as it is: its losses tell their views. Steps are those of the optimiser
    (``trainer.global_step``), and of the calls of losses within one the first counts. Nothing is reported from within
    ``torch.compile``.

    Args:
        every: steps between two reports, ≥ 1; the first is of step 0.
        gate: called with the report and the step; returns None, or why the run shall stop. See
            :class:`~barlow_loss.CollapseGate`. All processes stop in the same step, with a warning that says why.
        prefix: begins the names of the numbers that are logged.

    Raises:
        TypeError, ValueError: a setting out of its range or of the wrong type; a LightningModule without a
            ``BarlowTwinsLoss``, ``VICRegLoss`` or ``MixedBarlowTwinsLoss`` among its modules, when training starts.

    Example:
        >>> from barlow_loss import CollapseGate
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CollapseCallback(every=100, gate=CollapseGate(after=1000))])
    """

    def __init__(self, every: int = 100, *, gate: Gate | None = None, prefix: str = "collapse/") -> None:
        super().__init__()
        self.prefix = prefix
        self._monitor = CollapseMonitor(every, log=self._log, gate=gate, end=self._end)
        self._trainer: Any = None
        self._reports = 0
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the losses of the module."""
        losses = [module for module in pl_module.modules() if isinstance(module, WATCHED)]
        if not losses:
            raise ValueError(
                f"CollapseCallback: expected a loss among the modules of {type(pl_module).__name__}, found none. Make "
                "it an attribute, as self.loss_fn = BarlowTwinsLoss(), or call a CollapseMonitor in training_step."
            )
        self._trainer = trainer
        self._handles = [self._monitor.watch(loss, lambda: trainer.global_step) for loss in losses]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the losses alone."""
        if self._monitor.gate is not None and self._reports == 0 and trainer.global_step:
            rank_zero_warn(
                "CollapseCallback: no report in this run, so the gate could not speak. Within torch.compile no value "
                "can be read: call a CollapseMonitor with the views after the compiled step."
            )
        for handle in self._handles:
            handle.remove()
        self._handles, self._trainer = [], None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same where training ends early."""
        self.on_train_end(trainer, pl_module)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._reports += 1
        for logger in self._trainer.loggers:
            logger.log_metrics({self.prefix + name: value for name, value in values.items()}, step=step)

    def _end(self, reason: str) -> None:
        self._trainer.should_stop = True
        rank_zero_warn(f"CollapseCallback: the run is stopped. {reason}")
