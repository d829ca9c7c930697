"""Average precision on the images of the test, by torchmetrics and pycocotools."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from barlow_recipes import distributed
from barlow_recipes.errors import require
from barlow_recipes.images import Loader

KINDS = {"box": "bbox", "mask": "segm"}
FIGURES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # AP: the mean over IoU 0.5, 0.55, ..., 0.95
Scores = dict[str, dict[str, float | None]]
MASK_THRESHOLD = 0.5


def build_metric(masks: bool, recall_points: int) -> Any:
    """torchmetrics' average precision at ``recall_points`` points of recall: 101 as COCO, 11 as Pascal VOC 2007.

    Its own synchronisation is off: it expects as many images of every process.
    """
    require("pycocotools", "average precision")
    detection = require("torchmetrics.detection", "average precision")
    return detection.MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox",
        rec_thresholds=[number / (recall_points - 1) for number in range(recall_points)],
        backend="pycocotools",
        sync_on_compute=False,
    )


@torch.no_grad()
def evaluate(
    model: GeneralizedRCNN, loader: Loader, device: torch.device, *, masks: bool, recall_points: int, short_side: int
) -> tuple[Scores, int]:
    """Detect on this process's share of the images, and score the detections of all processes.

    Returns:
        The scores in percent, None where nothing is to be found, on rank 0 alone; and the images that were left out
        because they cannot be read.
    """
    metric, unreadable = build_metric(masks, recall_points), 0
    model.eval()
    with resized_to(model, short_side):
        for batch in loader:
            unreadable += batch.unreadable
            if not batch.images:
                continue
            found = model([floats(image, device) for image in batch.images])
            metric.update([_found(detections, masks) for detections in found], [*map(_truth, batch.targets)])
    (unreadable,) = distributed.totals([unreadable])
    collect(metric)
    return (scores_of(metric.compute(), masks) if distributed.is_main() else {}), unreadable


def floats(image: Tensor, device: torch.device) -> Tensor:
    """An image as torchvision's detectors take it: from 0 to 1, on the device."""
    return image.to(device, non_blocking=True).float().div_(255)


def _found(detections: Mapping[str, Tensor], masks: bool) -> dict[str, Tensor]:
    found = {name: detections[name].cpu() for name in ("boxes", "scores", "labels")}
    if masks:
        found["masks"] = (detections["masks"].squeeze(1) >= MASK_THRESHOLD).cpu()
    return found


def _truth(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(target) | ({"masks": target["masks"].bool()} if "masks" in target else {})


def collect(metric: Any) -> None:
    """Bring what the processes have found to rank 0; their numbers of images may differ."""
    if distributed.world_size() == 1:
        return
    everyones: list[Any] | None = [None] * distributed.world_size() if distributed.is_main() else None
    dist.gather_object(dict(metric.metric_state), everyones)
    for state in (everyones or [])[1:]:
        for name, values in state.items():
            getattr(metric, name).extend(values)


def scores_of(computed: Mapping[str, Tensor], masks: bool) -> Scores:
    """torchmetrics' results, in percent; it says −1 where there is nothing to find."""
    scores: Scores = {}
    for kind, prefix in KINDS.items() if masks else [("box", "")]:
        prefixed = {figure: computed[f"{prefix}_{name}" if prefix else name] for figure, name in FIGURES.items()}
        scores[kind] = {figure: 100 * float(value) if value >= 0 else None for figure, value in prefixed.items()}
    return scores


@contextlib.contextmanager
def resized_to(model: GeneralizedRCNN, short_side: int) -> Iterator[None]:
    """Within, images get this short side, and not one of the training's."""
    before, model.transform.min_size = model.transform.min_size, (short_side,)
    try:
        yield
    finally:
        model.transform.min_size = before


class Precise:
    """Measures batch norms again: the statistics of eval() are the mean over the batches that pass within.

    As in fvcore's ``PreciseBatchNorm``, which the published runs used; frozen batch norms stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        model.train()
        self.norms = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
        ]

    def __enter__(self) -> "Precise":
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative mean
        return self

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum


def table(rows: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Scores of several runs in Markdown.

    Args:
        rows: by the name of the run, what :func:`evaluate` returned.
    """
    kinds = list(dict.fromkeys(kind for scores in rows.values() for kind in scores))
    columns = [(kind, figure) for kind in kinds for figure in FIGURES]
    names = [f"{kind} {figure}" if len(kinds) > 1 else figure for kind, figure in columns]
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    lines += [
        [name, *(_percent(scores.get(kind, {}).get(figure)) for kind, figure in columns)]
        for name, scores in rows.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"
