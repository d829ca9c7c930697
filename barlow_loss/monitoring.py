"""Watch a run: the collapse report every k steps of any training loop, and a rule that ends what has collapsed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from barlow_loss._collectives import Group, check_group, gather_integers, gather_texts, group_of, is_first
from barlow_loss._header import check_on_all_ranks, may_synchronize
from barlow_loss._plan import is_traced
from barlow_loss._report import CollapseReport, PairReports
from barlow_loss._validation import check_eps, check_flags, check_weight
from barlow_loss.diagnostics import collapse_report
from barlow_loss.loss import BarlowTwinsLoss
from barlow_loss.mixed import MixedBarlowTwinsLoss
from barlow_loss.vicreg import VICRegLoss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

    Gate = Callable[[CollapseReport | PairReports, int], str | None]

__all__ = ["WATCHED", "CollapseGate", "CollapseMonitor", "TrainingCollapsed"]

_CALLER = "CollapseMonitor"
WATCHED = (BarlowTwinsLoss, MixedBarlowTwinsLoss, VICRegLoss)


class TrainingCollapsed(RuntimeError):
    """A gate has ended the run; the message says at which step and why."""


def print_line(step: int, values: dict[str, float]) -> None:
    """The numbers of a report that tell most, in a line."""
    rank = min(values["effective_rank_1"], values["effective_rank_2"])
    print(
        f"step {step}: loss {values['loss']:.4g}, mean diagonal {values['mean_diagonal']:.3f}, "
        f"effective rank {rank:.1f} of {min(values['n'] - 1, values['d'])}, dead features {values['dead_features']}",
        flush=True,
    )


class CollapseMonitor:
    """Reports every k steps what :func:`~barlow_loss.collapse_report` measures, and ends the run where a gate says so.

    Call it in every step of any loop: between the reports it costs a division. Or let it watch the loss, which leaves
    the loop as it is. With several processes all of them call it, and a report is about the batch of all.

    Args:
        every: steps between two reports, ≥ 1; the first is of step 0.
        log: called with the step and the report's numbers by name, of more than two views those of the worst pair, on
            the first process only. Default: prints a line.
        gate: called with the report and the step, on every process; returns None, or why the run shall end. What it
            returns on one process holds for all. :class:`CollapseGate` is one.
        end: called with that reason on every process. Default: raises :class:`TrainingCollapsed`.
        lambd: λ of the loss reported, ≥ 0.
        eps: ε of the loss reported, ≥ 0.
        process_group: the processes whose shards form one batch (default: the world, where torch.distributed is
            initialised).
        synchronize: False reports on this process's rows alone, and logs on every process.

    Raises:
        TypeError, ValueError: a setting out of its range or of the wrong type, already here.

    Example:
        >>> monitor = CollapseMonitor(every=2, gate=CollapseGate(patience=1))
        >>> z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> for step in range(4):
        ...     _ = monitor(step, z, z)
        step 0: loss 0.02139, mean diagonal 1.000, effective rank 15.3 of 16, dead features 0
        step 2: loss 0.02139, mean diagonal 1.000, effective rank 15.3 of 16, dead features 0
        >>> _ = monitor(4, torch.ones(64, 16), torch.ones(64, 16))
        Traceback (most recent call last):
        barlow_loss.monitoring.TrainingCollapsed: step 4: the effective rank is 0, below 0.05 of the attainable 16
    """

    def __init__(
        self,
        every: int = 100,
        *,
        log: Callable[[int, dict[str, float]], object] = print_line,
        gate: Gate | None = None,
        end: Callable[[str], object] | None = None,
        lambd: float | Tensor = 0.0051,
        eps: float = 1e-5,
        process_group: ProcessGroup | None = None,
        synchronize: bool = True,
    ) -> None:
        _check_count(_CALLER, "every", every, 1)
        for name, function in {"log": log, "gate": gate, "end": end}.items():
            if not callable(function) and (function is not None or name == "log"):
                raise TypeError(f"CollapseMonitor: expected {name} to be a function, got {type(function).__name__}.")
        check_weight(_CALLER, "lambd", lambd, 0.0051)
        check_eps(_CALLER, eps)
        check_group(_CALLER, process_group)
        check_flags(_CALLER, synchronize=synchronize)
        self.every = every
        self.log = log
        self.gate = gate
        self.end = end or _raise
        self._settings = {"lambd": lambd, "eps": eps, "process_group": process_group, "synchronize": synchronize}
        self._last: int | None = None
        self._counted: nn.Module | None = None  # the watched loss whose calls are the steps, if nothing else tells them
        self._calls = count()

    def __call__(self, step: int, *views: Tensor) -> CollapseReport | PairReports | None:
        """The report of the (n, D) views in the steps that have one, and None in the others.

        Raises:
            TrainingCollapsed: the gate has ended the run, on every process alike.
            TypeError, ValueError: ``step`` is not an int; what :func:`~barlow_loss.collapse_report` raises; ``step``,
                ``every`` or whether there is a gate differ among the processes.
        """
        return self._report(_checked_step(step), views, self._settings)

    def watch(self, loss_fn: nn.Module, step: Callable[[], int] | None = None) -> RemovableHandle:
        """Report of the views of every k-th call of a loss, with the settings of the loss in place of one's own.

        Calls without gradients, as in validation, do not count. What is raised comes from the call of the loss. Within
        ``torch.compile``, ``torch.func`` and CUDA graphs, where no value can be read, nothing counts and is reported:
        call the monitor with the views after such a step.

        Args:
            loss_fn: a ``BarlowTwinsLoss``, ``VICRegLoss`` or ``MixedBarlowTwinsLoss``; of the last, z1 and z2.
            step: tells the step; of several calls in one step the first counts. Default: every call is a step, of
                several losses every call of the one that is called first.

        Returns:
            A handle, of which ``handle.remove()`` ends it. Copies of the loss, in memory or in a file, are not watched.

        Raises:
            TypeError: another module, or a ``step`` that is no function.

        Example:
            >>> loss_fn = BarlowTwinsLoss()
            >>> handle = CollapseMonitor(every=100).watch(loss_fn)
            >>> z1, z2 = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            >>> loss_fn(z1, z2).backward()
            step 0: loss 16.69, mean diagonal -0.016, effective rank 15.3 of 16, dead features 0
        """
        if not isinstance(loss_fn, WATCHED):
            names = ", ".join(module.__name__ for module in WATCHED)
            raise TypeError(
                f"CollapseMonitor: expected a loss of {names} to watch, got {type(loss_fn).__name__}. "
                "Call monitor(step, z1, z2) in the loop instead."
            )
        if step is not None and not callable(step):
            raise TypeError(f"CollapseMonitor: expected step to be a function that returns it, got {step!r}.")
        return loss_fn.register_forward_hook(_Watch(self, step), with_kwargs=True)

    def _see(self, loss_fn: nn.Module, views: tuple[Tensor, ...], step: Callable[[], int] | None) -> None:
        """A call of a watched loss."""
        now = self._count(loss_fn) if step is None else _checked_step(step())
        if now is not None and now != self._last:
            self._last = now
            self._report(now, views, self._settings | _settings(loss_fn))

    def _count(self, loss_fn: nn.Module) -> int | None:
        """The number of this call; None for a loss whose calls are not counted."""
        self._counted = self._counted or loss_fn
        return next(self._calls) if loss_fn is self._counted else None

    def _report(
        self, step: int, views: tuple[Tensor, ...], settings: dict[str, Any]
    ) -> CollapseReport | PairReports | None:
        if step % self.every:
            return None
        group = group_of(_CALLER, settings["process_group"], settings["synchronize"])
        must_match = {"step": step, "every": self.every, "gate": "none" if self.gate is None else "one"}
        check_on_all_ranks(_CALLER, group, next(iter(views), None), lambda: (0, must_match))
        report: CollapseReport | PairReports = collapse_report(*views, **settings)
        reason = self._judged(group, report, step, views[0])
        if is_first(group):  # after the last exchange: what fails in a logger leaves no process waiting
            self.log(step, (report[report.worst] if isinstance(report, PairReports) else report).as_dict())
        if reason:
            self.end(f"step {step}: {reason}")
        return report

    def _judged(self, group: Group, report: CollapseReport | PairReports, step: int, z: Tensor) -> str | None:
        """What the gate says, on this process or another; what it raises on one is raised on all."""
        gate, reasons = self.gate, list[str | None]()
        if gate is None:
            return None

        def judge() -> tuple[int, dict[str, Any]]:
            reasons.append(gate(report, step))
            return 0, {}

        check_on_all_ranks(_CALLER, group, z, judge)
        return _of_any(group, reasons[0], z)


class _Watch:
    """The hook of a watched loss. A copy of it watches nothing, as the copy of a loss that it comes with."""

    def __init__(self, monitor: CollapseMonitor, step: Callable[[], int] | None) -> None:
        self._monitor, self._step = monitor, step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        views = _views(module, args, kwargs)
        if torch.is_grad_enabled() and _have_values(*views):
            self._monitor._see(module, views, self._step)  # pyright: ignore[reportPrivateUsage]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unwatched, ()


class _Unwatched:
    def __call__(self, *_: Any) -> None: ...


@dataclass
class CollapseGate:
    """Ends a run that has a low rank, many dead features or no finite loss in several reports in a row.

    Of more than two views any pair counts. It remembers the bad reports so far: every run needs a gate of its own.

    Args:
        min_rank: least effective rank, as a share of the attainable min(N − 1, D), in [0, 1].
        max_dead: most dead features, as a share of D, in [0, 1].
        patience: reports in a row that must be bad, ≥ 1.
        after: first step that is judged, ≥ 0; an untrained projector may be worse than it will be.

    Raises:
        TypeError, ValueError: a setting out of its range or of the wrong type.

    Example:
        >>> gate = CollapseGate(max_dead=0.1, patience=2)
        >>> z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> z[:, :4] = 0.0
        >>> report = collapse_report(z, z)
        >>> print(gate(report, 0))
        None
        >>> print(gate(report, 100))
        4 of 16 features are dead, more than 0.1; so in 2 reports in a row
    """

    min_rank: float = 0.05
    max_dead: float = 0.5
    patience: int = 3
    after: int = 0
    _bad: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("min_rank", "max_dead"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (float, int)):
                raise TypeError(f"CollapseGate: expected {name} to be a float, got {type(value).__name__}.")
            if not 0 <= value <= 1:
                raise ValueError(f"CollapseGate: expected {name} in [0, 1], got {value}. It is a share.")
        _check_count("CollapseGate", "patience", self.patience, 1)
        _check_count("CollapseGate", "after", self.after, 0)

    def __call__(self, report: CollapseReport | PairReports, step: int) -> str | None:
        """Why the run shall end at this step, if it shall."""
        if step < self.after:
            return None
        reports = report.values() if isinstance(report, PairReports) else [report]
        reason = next(filter(None, map(self._reason, reports)), None)
        self._bad = self._bad + 1 if reason else 0
        if self._bad < self.patience:
            return None
        return f"{reason}; so in {self._bad} reports in a row" if self._bad > 1 else reason

    def _reason(self, report: CollapseReport) -> str | None:
        if not math.isfinite(report.loss):
            return "the loss is not finite"
        rank = min(report.effective_rank_1, report.effective_rank_2)
        if rank < self.min_rank * report.attainable_rank:
            return (
                f"the effective rank is {rank:.3g}, below {self.min_rank:g} of the attainable {report.attainable_rank}"
            )
        if report.dead_features > self.max_dead * report.d:
            return f"{report.dead_features} of {report.d} features are dead, more than {self.max_dead:g}"
        return None


def _raise(reason: str) -> None:
    raise TrainingCollapsed(reason)


def _of_any(group: Group, reason: str | None, z: Tensor) -> str | None:
    """The reason of the first process that has one."""
    if group.size == 1 or not any(said for (said,) in gather_integers(_CALLER, group, (bool(reason),), z)):
        return reason
    return next(filter(None, gather_texts(_CALLER, group, reason or "", z)))


def _have_values(*views: Tensor) -> bool:
    return may_synchronize(views[0]) and not is_traced(*views) and not views[0].is_meta


def _views(loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the loss was called with, by position or by name."""
    named = (kwargs[name] for name in ("z1", "z2") if kwargs.get(name) is not None)
    views = *args, *named
    return views[:2] if isinstance(loss_fn, MixedBarlowTwinsLoss) else views


def _settings(loss_fn: Any) -> dict[str, Any]:
    """What a report shares with the loss; VICReg's ε is another one, and it has no λ."""
    own = () if isinstance(loss_fn, VICRegLoss) else ("lambd", "eps")
    return {name: getattr(loss_fn, name) for name in (*own, "process_group", "synchronize")}


def _checked_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise TypeError(f"CollapseMonitor: expected step to be an int, got {step!r}. Number the steps from 0.")
    return int(step)


def _check_count(caller: str, name: str, value: Any, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{caller}: expected {name} to be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"{caller}: expected {name} ≥ {least}, got {value}.")
