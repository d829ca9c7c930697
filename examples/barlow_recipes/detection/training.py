"""A detector's training, step by step; several processes take each step together."""

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from barlow_recipes import distributed
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import seed_of
from barlow_recipes.detection.images import Batch, TrainingBatches
from barlow_recipes.detection.recipes import learning_rate_factor
from barlow_recipes.detection.scores import Precise, floats
from barlow_recipes.detection.settings import Settings
from barlow_recipes.errors import Aborted

MEASURED = 2**40  # in place of an epoch's number: of the batches by which batch norms are measured again
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, settings: Settings) -> optim.SGD:
    """SGD on what is not frozen; without weight decay for norms, as detectron2's WEIGHT_DECAY_NORM."""
    norms = [p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()]
    ids = {id(parameter) for parameter in norms}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "weight_decay": decay}
        for parameters, decay in ((others, settings.weight_decay), (norms, 0.0))
    ]
    kept = [group for group in groups if group["params"]]
    return optim.SGD(kept, lr=settings.learning_rate, momentum=settings.momentum)


def build_schedule(optimizer: optim.Optimizer, settings: Settings) -> LambdaLR:
    """The schedule of the whole run, to be advanced after every step."""
    factor = partial(
        learning_rate_factor,
        milestones=settings.milestones,
        warmup=settings.warmup,
        warmup_factor=settings.warmup_factor,
    )
    return LambdaLR(optimizer, factor)


def losses_of(network: nn.Module, batch: Batch, device: torch.device, masks: bool) -> dict[str, Tensor]:
    """The detector's losses on this process's images."""
    names = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    targets = [{name: target[name].to(device, non_blocking=True) for name in names} for target in batch.targets]
    losses: dict[str, Tensor] = network([floats(image, device) for image in batch.images], targets)
    return losses


def take_step(
    network: nn.Module, state: TrainingState, batch: Batch, settings: Settings, masks: bool
) -> dict[str, float]:
    """One step of the optimiser, from gradients of all processes' images; the losses, as this process sees them.

    Which sides and which regions are drawn is a pure function of (seed, step, rank): a resumed run draws the same. As
    in detectron2, each process takes the mean over its own regions, so two processes' gradient is not to the bit that
    of one; here, uneven shares of a batch weigh as many images as they have.

    Raises:
        Aborted: a loss is not finite. The step is not taken.
    """
    torch.manual_seed(seed_of(settings.seed, state.step, distributed.rank()))
    losses = losses_of(network, batch, settings.device, masks)
    total = torch.stack([*losses.values()]).sum()
    state.optimizer.zero_grad()
    share = len(batch.images) * distributed.world_size() / settings.batch_size
    (total * share).backward()
    numbers = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
    (bad,) = distributed.totals([not total.isfinite().item()])
    if bad:
        raise Aborted(f"step {state.step + 1}: the loss is not finite ({numbers}): try a smaller --learning-rate")
    state.optimizer.step()
    state.schedule.step()
    state.step += 1
    return {"loss": sum(numbers.values()), **numbers}


def endless(batches: TrainingBatches, step: int) -> Iterator[Batch]:
    """The batches from a step of the run on, epoch after epoch."""
    epoch, first = divmod(step, len(batches))
    while True:
        yield from batches.batches(epoch, first)
        epoch, first = epoch + 1, 0


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """A test amid the training leaves no trace in it: the batch norms' statistics are as before."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    model.load_state_dict(kept, strict=False)


@torch.no_grad()
def measure_norms(
    network: nn.Module, model: GeneralizedRCNN, batches: TrainingBatches, settings: Settings, masks: bool
) -> None:
    """Measure the batch norms that are not frozen by training batches, as they are to be used in the test."""
    if not settings.precise_batches:
        return
    torch.manual_seed(seed_of(settings.seed, MEASURED, distributed.rank()))
    with Precise(model):
        for batch in islice(batches.batches(MEASURED), settings.precise_batches):
            losses_of(network, batch, settings.device, masks)
