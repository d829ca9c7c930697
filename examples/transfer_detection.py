"""Transfer a pretrained encoder to object detection (Pascal VOC) or to detection and instance segmentation (COCO).

    python examples/transfer_detection.py --data VOCdevkit --weights runs/imagenet-resnet50/backbone.pt
    python examples/transfer_detection.py --data coco --weights resnet50.pth --precision bf16
    torchrun --nproc-per-node 8 examples/transfer_detection.py --data coco --weights resnet50.pth

The folder decides: with VOC2007/ and VOC2012/ in it, Faster R-CNN is trained on the trainval parts and tested on 2007's
test part; with annotations/, train2017/ and val2017/, Mask R-CNN is trained on the one and tested on the other. Every
number is as published for Barlow Twins, and nearly every one a flag. What published runs reached: box AP, AP50, AP75 of
56.8, 82.6, 63.4 on VOC07+12 and of 39.2, 59.0, 42.5 on COCO, masks of 34.3, 56.0, 36.5.

Boxes, masks and images that cannot be used are left out, and counted in the output and in the results. SIGTERM, SIGUSR1
and Ctrl-C end a run after its step, saved; with --resume the same command continues it. The output folder gets
results.json, model.pt, metrics.jsonl and checkpoint.pt with the one before it.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import FasterRCNN

from barlow_recipes import checkpoint, distributed, folders, outputs
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.command_line import find_device, precision_notes
from barlow_recipes.data import seed_of
from barlow_recipes.detection.data import Batch, DetectionData, Images, load_data
from barlow_recipes.detection.models import build_detector
from barlow_recipes.detection.settings import Settings, read_settings
from barlow_recipes.distributed import is_rank_zero, on_rank_zero
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import Aborted, Stopped, require
from barlow_recipes.metrics import BAR, Metrics, aligned
from barlow_recipes.optimization import require_all
from barlow_recipes.program import StopRequests, arrived, exit_status, start
from barlow_recipes.weights import digest, find_encoder

OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --short-side or --rois-per-image, or more processes"
LOG_EVERY = 20  # iterations from one row of metrics.jsonl to the next
BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm)
FIGURES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # AP: the mean over IoU 0.5, 0.55, ..., 0.95
Scores = dict[str, dict[str, float | None]]  # of "box" and "mask", in percent; None where nothing is to be found


@dataclass
class Run:
    """A run and where it stands."""

    settings: Settings
    data: DetectionData
    encoder: Encoder
    network: nn.Module  # the model, or what several processes train in its place
    state: TrainingState
    images: Images
    must_match: dict[str, Any]  # what a continued run must share with its checkpoint
    out: Path
    metrics: Metrics
    unreadable: int = 0  # training images that were replaced, of all processes, since the program began

    def save(self) -> None:
        content = self.state.state_dict() | {"settings": self.must_match}
        checkpoint.save(self.out / outputs.CHECKPOINT, content, keep_previous=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: launch(read_settings(argv, __doc__ or "")), OUT_OF_MEMORY)


def launch(settings: Settings) -> None:
    """Read the annotations, build the detector, train, test."""
    started = time.perf_counter()
    for module, reason in (("tqdm", "the progress bar"), ("pycocotools", "masks"), ("torchmetrics", "the scores")):
        require(module, reason)  # now, not hours later
    device, data = find_device(settings.device), load_data(settings.data)
    images = Images(data, settings, pin_memory=device.type == "cuda")
    torch.manual_seed(settings.seed)
    encoder = find_encoder(settings.weights, settings.arch)
    must_match = settings.must_match() | {"--weights": digest(encoder.module), "--data": str(data)}
    model = build_detector(encoder, settings, classes=len(data.classes), masks=data.masks).to(device)
    optimizer = build_optimizer(model, settings)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    state = TrainingState(model, optimizer, schedule, torch.amp.GradScaler(device.type, enabled=False), device)
    default = Path("runs") / f"{data.name.lower()}-{encoder.arch.replace('/', '-')}-c4"
    saved, agreed = folders.load(folders.find(settings, default)), {"the device": device.type}
    opened = folders.opened(settings, default, must_match, saved, unit="iteration", agreed=agreed)
    with opened as (out, metrics), StopRequests() as requests:
        network = distributed.data_parallel(model)
        run = Run(settings, data, encoder, network, state, images, must_match, out, metrics)
        if saved:
            state.load_state_dict(saved.content)
        print(f"{data}\n{encoder.arch}-C4, {encoder.source}, {settings.precision}; results go to {out}")
        for note in precision_notes(device, settings.precision):
            print(f"note: {note}")
        print(f"{device.type} in {distributed.world_size()} processes, learning rate {settings.learning_rate:g}")
        train_detector(run, requests)
        finish(run)
        print(f"\n{time.perf_counter() - started:.0f} seconds. Results: {out}")


def train_detector(run: Run, requests: StopRequests) -> None:
    """Train to the last iteration, and save on the way."""
    settings, state, last = run.settings, run.state, run.settings.iterations
    hidden = None if is_rank_zero() else True  # None: where there is no terminal
    how = {"total": last, "initial": state.step, "disable": hidden, "dynamic_ncols": True, "bar_format": BAR}
    run.network.train()
    with require("tqdm", "the progress bar").tqdm(**how) as bar:
        for batch in islice(run.images.from_step(state.step), last - state.step):
            losses = take_step(run.network, state, batch, settings)
            unreadable, *signals = distributed.all_reduce([batch.unreadable, *requests.counts()])
            run.unreadable += unreadable
            bar.update()
            if state.step % LOG_EVERY == 0 or state.step == last:
                run.metrics.add("step", {"step": state.step, **losses, "unreadable": run.unreadable})
                bar.set_postfix_str(f"loss {losses['loss']:.3f}")
            number = arrived(signals)
            if number or state.step % settings.save_every == 0 or state.step == last:
                on_rank_zero(run.save)
            if number:
                saved = f"after iteration {state.step}, saved in {run.out / outputs.CHECKPOINT}"
                raise Stopped(f"stopped by {number.name} {saved}: continue with --resume", number)


def finish(run: Run) -> None:
    """Test, write the results and the model, and print the table."""
    prepare_test(run.state.model, run.images, run.settings, run.state.device)
    scores, unreadable = evaluate(run.state.model, run.images, run.state.device)
    if unreadable == len(run.data.test.examples):
        raise Aborted("no image of the test can be read: is --data damaged? After a repair, continue with --resume")
    if not is_rank_zero():
        return
    data, built = run.data, {"arch": run.encoder.arch, "stem": run.encoder.stem, "classes": run.data.classes}
    results = {
        "scores": scores,
        "unit": f"percent, at {data.recall_points} points of recall; AP is the mean over IoU 0.5, 0.55, ..., 0.95",
        "iteration": run.state.step,
        "data": data.name,
        "train": data.train.counts() | {"unreadable": run.unreadable},
        "test": data.test.counts() | {"unreadable": unreadable},
        "weights": run.encoder.source,
        **built,
        "settings": run.must_match,
    }
    with outputs.replacing(run.out / outputs.RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    model = {
        "model": run.state.model.state_dict(),
        **built,
        "masks": data.masks,
        "settings": run.settings.must_match(),
    }
    checkpoint.save(run.out / "model.pt", model)
    if run.unreadable or unreadable:
        print(f"note: unreadable images: {run.unreadable} replaced in training, {unreadable} left out of the test")
    print(f"{data.name}, average precision in percent, at IoU 0.5 to 0.95, 0.5 and 0.75\n")
    print(table(f"{run.encoder.arch}-C4, {run.settings.iterations:,} iterations", scores))


def build_optimizer(model: nn.Module, settings: Settings) -> optim.SGD:
    """SGD on what is not frozen; without weight decay for norms, as detectron2's WEIGHT_DECAY_NORM."""
    norms = {parameter for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learning if parameter not in norms]},
        {"params": [parameter for parameter in learning if parameter in norms], "weight_decay": 0.0},
    ]
    require_all(model, groups)
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
    (bad,) = distributed.all_reduce([not total.isfinite().item()])
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
    """torchmetrics' average precision at ``recall_points`` points of recall: 101 as COCO, 11 as Pascal VOC 2007.

    Both thresholds are numpy's, as in pycocotools. Those of torchmetrics 1.9.0 are float32 numbers, whose 0.6 is more
    than 0.6: where three of five objects are found it says 59.4 in place of 60.4.
    """
    return require("torchmetrics.detection", "average precision").MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, recall_points).tolist(),
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
        everyones: Any = [None] * distributed.world_size() if distributed.is_rank_zero() else None
        dist.gather_object(dict(metric.metric_state), everyones)
        for state in (everyones or [])[1:]:
            for name, values in state.items():
                getattr(metric, name).extend(values)
    scores = scores_of(metric.compute()) if distributed.is_rank_zero() else {}
    return scores, distributed.all_reduce([unreadable])[0]


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


if __name__ == "__main__":
    start(main)
