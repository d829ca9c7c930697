"""A detector's training, step by step, and its test; several processes share every batch of both."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torchvision.models.detection import FasterRCNN

from barlow_recipes import distributed
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import seed_of
from barlow_recipes.detection.data import Batch, Images
from barlow_recipes.detection.settings import Settings
from barlow_recipes.errors import Aborted, require
from barlow_recipes.tables import aligned

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm)
FIGURES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # AP: the mean over IoU 0.5, 0.55, ..., 0.95
Scores = dict[str, dict[str, float | None]]  # of "box" and "mask", in percent; None where nothing is to be found


def build_optimizer(model: nn.Module, settings: Settings) -> optim.SGD:
    """SGD on what is not frozen; without weight decay for norms, as detectron2's WEIGHT_DECAY_NORM."""
    norms = {parameter for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learning if parameter not in norms]},
        {"params": [parameter for parameter in learning if parameter in norms], "weight_decay": 0.0},
    ]
    return optim.SGD(groups, settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay)


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear to 1 in the warm-up, times 0.1 for each milestone passed."""
    done = min(step / settings.warmup, 1.0) if settings.warmup else 1.0
    decay = 0.1 ** sum(step >= milestone for milestone in settings.milestones)
    return decay * (settings.warmup_factor * (1 - done) + done)


def take_step(network: nn.Module, state: TrainingState, batch: Batch, settings: Settings) -> dict[str, float]:
    """One step of the optimiser; the losses, as this process sees them. Aborted, and no step: one is not finite.

    Which sides and regions are drawn is a pure function of (seed, step, rank). As in detectron2, each process takes the
    mean over its own regions, so two processes' gradient is not that of one; uneven shares weigh as they have images.
    """
    torch.manual_seed(seed_of(settings.seed, state.step, distributed.rank()))
    losses: dict[str, Tensor] = network(*batch.on(state.device))
    total = torch.stack([*losses.values()]).sum()
    state.optimizer.zero_grad()
    (total * len(batch.images) * distributed.world_size() / settings.batch_size).backward()
    numbers = {"loss": total.item()} | {name: loss.item() for name, loss in losses.items()}
    (bad,) = distributed.totals([not total.isfinite().item()])
    if bad:
        raise Aborted(f"step {state.step + 1}: the loss is not finite ({numbers}): try a smaller --learning-rate")
    state.optimizer.step()
    state.schedule.step()
    state.step += 1
    return numbers


@torch.no_grad()
def prepare_test(model: FasterRCNN, images: Images, settings: Settings, device: torch.device) -> None:
    """Give the trained model the test's side, and its batch norms the mean statistics of the next training batches.

    As in fvcore's ``PreciseBatchNorm``, which the published runs used; frozen batch norms stay as they are.
    """
    model.train()
    if settings.precise_batches:
        for norm in model.modules():
            if isinstance(norm, BATCH_NORM) and norm.training:
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative mean
        torch.manual_seed(seed_of(settings.seed, settings.iterations, distributed.rank()))
        for batch in islice(images.from_step(settings.iterations), settings.precise_batches):
            model(*batch.on(device))
    model.transform.min_size = (settings.test_short_side or settings.short_side[-1],)
    model.eval()


def build_metric(masks: bool, recall_points: int) -> Any:
    """torchmetrics' average precision at ``recall_points`` points of recall: 101 as COCO, 11 as Pascal VOC 2007."""
    return require("torchmetrics.detection", "average precision").MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox",
        rec_thresholds=[number / (recall_points - 1) for number in range(recall_points)],
        backend="pycocotools",
        sync_on_compute=False,  # it expects as many images of every process
    )


@torch.no_grad()
def evaluate(model: FasterRCNN, images: Images, device: torch.device) -> tuple[Scores, int]:
    """The scores of all processes' images, on rank 0 alone; and how many were left out because they cannot be read."""
    metric, unreadable = build_metric(images.data.masks, images.data.recall_points), 0
    for batch in images.of_test():
        unreadable += batch.unreadable
        if batch.images:
            found = model(batch.on(device)[0])
            metric.update([*map(_with_booleans, found)], [*map(_with_booleans, batch.targets)])
    if distributed.world_size() > 1:
        everyones: Any = [None] * distributed.world_size() if distributed.is_main() else None
        dist.gather_object(dict(metric.metric_state), everyones)
        for state in (everyones or [])[1:]:
            for name, values in state.items():
                getattr(metric, name).extend(values)
    scores = scores_of(metric.compute()) if distributed.is_main() else {}
    return scores, distributed.totals([unreadable])[0]


def _with_booleans(objects: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, with masks of (N, H, W), as torchmetrics takes them; a detector's are (N, 1, H, W)."""
    on_cpu = {name: value.cpu() for name, value in objects.items()}
    return on_cpu | {name: value.flatten(0, -3) >= 0.5 for name, value in on_cpu.items() if name == "masks"}


def scores_of(computed: Mapping[str, Tensor]) -> Scores:
    """torchmetrics' results, in percent; it says −1 where there is nothing to find."""
    prefixes = {"box": "bbox_", "mask": "segm_"} if "bbox_map" in computed else {"box": ""}
    percent = {name: 100 * value.item() if value >= 0 else None for name, value in computed.items() if "map" in name}
    return {kind: {name: percent[prefix + key] for name, key in FIGURES.items()} for kind, prefix in prefixes.items()}


def table(name: str, scores: Scores) -> str:
    cells = {f"{kind} {figure}": value for kind, figures in scores.items() for figure, value in figures.items()}
    return aligned([["", *cells], [name, *("–" if value is None else f"{value:.1f}" for value in cells.values())]])
