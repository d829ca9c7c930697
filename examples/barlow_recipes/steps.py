"""A run of the program, and one step of it: the gradients, whether they are applied, and where the time goes."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, BarlowTwinsTerms, CollapseReport
from barlow_recipes import checkpoint, distributed
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import Batch, PretrainingData, seed_of
from barlow_recipes.errors import Aborted
from barlow_recipes.metrics import Metrics
from barlow_recipes.outputs import CHECKPOINT
from barlow_recipes.settings import Settings
from barlow_recipes.views import completed

Accuracies = dict[str, dict[str, float]]  # of each representation, in percent
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_SKIPPED, MOST_SKIPPED_IN_FP16 = 5, 25  # steps in a row; each halves the scale of fp16, which begins at 2¹⁶


class Stopwatch:
    """How fast an epoch's steps are, of so many images each, and what their parts take (of a ``profile`` exactly)."""

    def __init__(self, device: torch.device, images: int, profile: bool = False) -> None:
        self.device, self.images, self.profile = device, images, profile
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.began = self.ended = self._now()
        self.steps, self.parts = 0, Counter[str]()  # seconds

    @contextlib.contextmanager
    def lap(self, part: str) -> Iterator[None]:
        began = self._now()
        yield
        self.parts[part] += self._now() - began

    def end_step(self) -> None:
        self.steps, self.ended = self.steps + 1, self._now()

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def images_per_second(self) -> float:
        return self.images * self.steps / self.seconds if self.steps else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """The mean of each part of a step, and its share; what was in no part is "other"."""
        parts = {**self.parts, "other": self.seconds - self.parts.total()}
        per_step, share = 1000 / self.steps, 1 / self.seconds
        return [{"part": part, "milliseconds": per_step * s, "share": share * s} for part, s in parts.items()]

    def _now(self) -> float:
        if self.profile and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Run:
    """What the parts of a run share, on this process."""

    settings: Settings
    data: PretrainingData
    state: TrainingState
    out: Path
    metrics: Metrics
    watch: Stopwatch
    network: nn.Module  # the model as it is trained: synchronised, compiled
    begun: str | None = None  # in words, where the weights came from that were not random
    buffers_before: list[Tensor] = field(default_factory=list)  # the model's, as they were before the step
    monitor_baselines: Accuracies = field(default_factory=dict)  # the monitor's, without pretraining
    final_baselines: Accuracies = field(default_factory=dict)  # and the final evaluation's
    accuracies: Accuracies = field(default_factory=dict)  # the newest, beside those without
    before: Tensor | None = None  # the cross-correlation of the initial weights
    collapse: CollapseReport | None = None  # the newest, on the embeddings of the first pairs

    def __post_init__(self) -> None:
        self.steps_per_epoch = len(self.data.pairs) // self.settings.accumulate
        self.checkpoint = self.out / CHECKPOINT
        self.last_step = min(self.settings.epochs * self.steps_per_epoch, self.settings.limit_steps or sys.maxsize)

    def save(self) -> None:
        must_match = self.settings.must_match() | {"images": self.data.images}
        checkpoint.save(self.checkpoint, self.state.state_dict() | {"settings": must_match}, keep_previous=True)


class Step(NamedTuple):
    """What a step has computed, before it is applied."""

    z1: Tensor  # (N, D), the last part's embeddings of view 1
    z2: Tensor  # (N, D), and of view 2: what is looked at, though there may be more
    terms: BarlowTwinsTerms  # means over the parts
    gradient_norm: Tensor
    finite: bool  # the loss and every gradient
    unreadable: int
    learning_rate: float  # of matrices and kernels


def gradients(run: Run, batches: Iterator[Batch]) -> Step:
    """Compute the gradients of one step: of the next batch's loss, or of the mean of several (--accumulate).

    What the encoder draws, in a dropout say, is a pure function of (seed, step, rank).
    """
    settings, state, watch = run.settings, run.state, run.watch
    torch.manual_seed(seed_of(settings.seed, state.step, distributed.rank()))
    autocast = torch.autocast(settings.device.type, AUTOCAST.get(settings.precision), settings.precision != "fp32")
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    loss_fn = BarlowTwinsLoss(settings.lambd, backend=settings.backend, pair_weights=settings.pair_weights())
    state.optimizer.zero_grad()
    # A forward pass moves the running statistics of batch norms, whether or not its step is taken.
    buffers = list(state.model.buffers())
    run.buffers_before = run.buffers_before or [buffer.clone() for buffer in buffers]
    torch._foreach_copy_(run.buffers_before, buffers)
    parts, unreadable = list[BarlowTwinsTerms](), 0
    for _ in range(settings.accumulate):
        with watch.lap("data"):
            batch = next(batches)
        with watch.lap("forward"), autocast:
            # The views pass through the network one after the other: each has its own batch statistics.
            views = (completed(view, settings.device, run.data.pixels) for view in batch.views)
            embeddings = [run.network(view.to(memory_format=layout)) for view in views]
        leaves = [z.detach().requires_grad_() for z in embeddings]  # part the loss's backward from the rest
        with watch.lap("loss"):
            with autocast:
                terms = loss_fn(*leaves, return_terms=True)
            state.scaler.scale(terms.loss * (settings.scale_loss / settings.accumulate)).backward()
        with watch.lap("backward"):
            torch.autograd.backward(embeddings, [leaf.grad for leaf in leaves])
        parts.append(BarlowTwinsTerms(*(value.detach() for value in terms)))
        unreadable += batch.unreadable
    with watch.lap("optimizer"):
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    mean = BarlowTwinsTerms(*(torch.stack(values).mean() for values in zip(*parts, strict=True)))
    finite, rate = bool(mean.loss.isfinite() & norm.isfinite()), state.optimizer.param_groups[0]["lr"]
    return Step(leaves[0].detach(), leaves[1].detach(), mean, norm, finite, unreadable, rate)


def apply(run: Run, *, good: bool) -> None:
    """Take the step, or leave it out altogether; the schedule and the order of the images go on either way."""
    state = run.state
    with run.watch.lap("optimizer"):
        if good:
            state.scaler.step(state.optimizer)
        else:
            torch._foreach_copy_(list(state.model.buffers()), run.buffers_before)
        state.scaler.update()
        state.schedule.step()
    state.step += 1
    if not good:
        text = "the loss or its gradient was not finite: the step was not applied"
        run.metrics.add("event", {"step": state.step, "text": text})


def check_health(run: Run, epoch: int, unreadable: int, skipped: int) -> None:
    """Abort a run with too many unreadable images in this epoch, or too many steps in a row that were left out."""
    if unreadable > (tolerated := run.data.tolerated_unreadable):
        first = run.data.pairs.first_unreadable or f"is {run.settings.data} damaged?"
        counted = f"{unreadable} images of epoch {epoch + 1} could not be read, {tolerated} are tolerated"
        raise Aborted(f"{counted}: {first}")
    if skipped == (MOST_SKIPPED_IN_FP16 if run.state.scaler.is_enabled() else MOST_SKIPPED):
        lost = f"the loss or its gradient was not finite in {skipped} steps in a row (they were not applied)"
        raise Aborted(f"{lost}: try a lower learning rate")
