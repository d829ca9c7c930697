"""One step of training: the gradients, and whether they are applied."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, BarlowTwinsTerms
from barlow_recipes import distributed
from barlow_recipes.data import Batch
from barlow_recipes.errors import Aborted
from barlow_recipes.run import Run
from barlow_recipes.views import finished

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_SKIPPED, MOST_SKIPPED_IN_FP16 = 5, 25  # steps in a row; each halves the scale of fp16, which begins at 2¹⁶


class Step(NamedTuple):
    """What a step has computed, before it is applied."""

    z1: Tensor  # (N, D), the last part's embeddings of view 1
    z2: Tensor  # (N, D), and of view 2
    terms: BarlowTwinsTerms  # means over the parts
    gradient_norm: Tensor
    finite: bool  # the loss and every gradient
    unreadable: int
    learning_rate: float  # of matrices and kernels


def gradients(now: Run, batches: Iterator[Batch]) -> Step:
    """Compute the gradients of one step: of a batch's loss, or of the mean of the losses of several (--accumulate)."""
    settings, state, watch = now.settings, now.state, now.watch
    autocast = torch.autocast(settings.device.type, AUTOCAST.get(settings.precision), settings.precision != "fp32")
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    loss_fn = BarlowTwinsLoss(settings.lambd, backend=settings.backend)
    parts: list[BarlowTwinsTerms] = []
    unreadable = 0
    state.optimizer.zero_grad()
    keep_buffers(now)
    while len(parts) < settings.accumulate:
        last = len(parts) == settings.accumulate - 1
        with watch.lap("data"):
            batch = next(batches)
        with contextlib.nullcontext() if last else distributed.without_exchange(now.network):
            with watch.lap("forward"), autocast:
                # The views pass through the network one after the other: each has its own batch statistics.
                views = (finished(view, settings.device, now.data.pixels) for view in batch.views)
                z1, z2 = (now.network(view.to(memory_format=layout)) for view in views)
            leaf1, leaf2 = (z.detach().requires_grad_() for z in (z1, z2))  # parts the loss's backward from the rest
            with watch.lap("loss"):
                with autocast:
                    terms = loss_fn(leaf1, leaf2, return_terms=True)
                state.scaler.scale(terms.loss * (settings.scale_loss / settings.accumulate)).backward()
            with watch.lap("backward"):
                torch.autograd.backward([z1, z2], [leaf1.grad, leaf2.grad])
        parts.append(BarlowTwinsTerms(*(value.detach() for value in terms)))
        unreadable += batch.unreadable
    with watch.lap("optimizer"):
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    mean = BarlowTwinsTerms(*(torch.stack(values).mean() for values in zip(*parts, strict=True)))
    finite, rate = bool(mean.loss.isfinite() & norm.isfinite()), state.optimizer.param_groups[0]["lr"]
    return Step(leaf1.detach(), leaf2.detach(), mean, norm, finite, unreadable, rate)


def keep_buffers(now: Run) -> None:
    """Note the running statistics of batch norms: a forward pass moves them, whether or not its step is taken."""
    buffers = list(now.state.model.buffers())
    now.buffers_before = now.buffers_before or [buffer.clone() for buffer in buffers]
    torch._foreach_copy_(now.buffers_before, buffers)


def apply(now: Run, *, good: bool) -> None:
    """Take the step, or leave it out altogether; the schedule and the order of the images go on either way."""
    state = now.state
    with now.watch.lap("optimizer"):
        if good:
            state.scaler.step(state.optimizer)
        else:
            torch._foreach_copy_(list(state.model.buffers()), now.buffers_before)
        state.scaler.update()
        state.schedule.step()
    state.step += 1
    if not good:
        now.tell("the loss or its gradient was not finite: the step was not applied")


def check_health(now: Run, epoch: int, unreadable: int, skipped: int) -> None:
    """End a run that cannot become anything.

    Raises:
        Aborted: too many unreadable images in this epoch, or too many steps in a row that could not be applied.
    """
    tolerated = now.data.tolerated_unreadable
    if unreadable > tolerated:
        raise Aborted(
            f"{unreadable} images of epoch {epoch + 1} could not be read, {tolerated} are tolerated: "
            f"{now.data.pairs.first_unreadable or f'is {now.settings.data} damaged?'}"
        )
    if skipped == (MOST_SKIPPED_IN_FP16 if now.state.scaler.is_enabled() else MOST_SKIPPED):
        raise Aborted(
            f"the loss or its gradient was not finite in {skipped} steps in a row (they were not applied): "
            "try a lower learning rate"
        )
