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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from barlow_recipes import checkpoint, distributed, folders, outputs
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.command_line import find_device
from barlow_recipes.detection import training
from barlow_recipes.detection.data import DetectionData, Images, load_data
from barlow_recipes.detection.models import build_detector
from barlow_recipes.detection.settings import Settings, read_settings
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import Encoder
from barlow_recipes.errors import Stopped, require
from barlow_recipes.metrics import Metrics
from barlow_recipes.program import exit_status, start
from barlow_recipes.signals import StopRequests, arrived, stop_requests
from barlow_recipes.tables import BAR
from barlow_recipes.weights import digest, find_encoder

OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --short-side or --rois-per-image, or more processes"
LOG_EVERY = 20  # iterations from one row of metrics.jsonl to the next


@dataclass
class Run:
    """A run and where it stands."""

    settings: Settings
    data: DetectionData
    encoder: Encoder
    network: nn.Module  # the model, or what several processes train in its place
    state: TrainingState
    images: Images
    shaping: dict[str, Any]  # what a continued run must share with its checkpoint
    out: Path
    metrics: Metrics
    unreadable: int = 0  # training images that were replaced, of all processes, since the program began

    def save(self) -> None:
        content = self.state.state_dict() | {"settings": self.shaping}
        checkpoint.save(self.out / outputs.CHECKPOINT, content, keep_previous=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read_settings(argv, __doc__ or "")), OUT_OF_MEMORY)


def run(settings: Settings) -> None:
    """Read the annotations, build the detector, train, test."""
    started = time.perf_counter()
    for module, reason in (("tqdm", "the progress bar"), ("pycocotools", "masks"), ("torchmetrics", "the scores")):
        require(module, reason)  # now, not hours later
    device, data = find_device(settings.device), load_data(settings.data)
    images = Images(data, settings, pin_memory=device.type == "cuda")
    torch.manual_seed(settings.seed)
    encoder = find_encoder(settings.weights, settings.arch)
    shaping = settings.shaping() | {"--weights": digest(encoder.module), "--data": str(data)}
    model = build_detector(encoder, settings, classes=len(data.classes), masks=data.masks).to(device)
    optimizer = training.build_optimizer(model, settings)
    schedule = LambdaLR(optimizer, lambda step: training.learning_rate_factor(step, settings))
    state = TrainingState(model, optimizer, schedule, torch.amp.GradScaler(device.type, enabled=False), device)
    default = Path("runs") / f"{data.name.lower()}-{encoder.arch.replace('/', '-')}-c4"
    saved, agreed = folders.load(folders.find(settings, default)), {"the device": device.type}
    opened = folders.opened(settings, default, shaping, saved, unit="iteration", agreed=agreed)
    with opened as (out, metrics), stop_requests() as requests:
        network = distributed.synchronized(model)
        now = Run(settings, data, encoder, network, state, images, shaping, out, metrics)
        if saved:
            state.load_state_dict(saved.content)
        print(f"{data}\n{encoder.arch}-C4, {encoder.source}, {settings.precision}; results go to {out}")
        print(f"{device.type} in {distributed.world_size()} processes, learning rate {settings.learning_rate:g}")
        train_detector(now, requests)
        finish(now)
        print(f"\n{time.perf_counter() - started:.0f} seconds. Results: {out}")


def train_detector(now: Run, requests: StopRequests) -> None:
    """Train to the last iteration, and save on the way."""
    settings, state, last = now.settings, now.state, now.settings.iterations
    hidden = None if is_main() else True  # None: where there is no terminal
    how = {"total": last, "initial": state.step, "disable": hidden, "dynamic_ncols": True, "bar_format": BAR}
    now.network.train()
    with require("tqdm", "the progress bar").tqdm(**how) as bar:
        for batch in islice(now.images.from_step(state.step), last - state.step):
            losses = training.take_step(now.network, state, batch, settings)
            unreadable, *signals = distributed.totals([batch.unreadable, *requests.counts()])
            now.unreadable += unreadable
            bar.update()
            if state.step % LOG_EVERY == 0 or state.step == last:
                now.metrics.add("step", {"step": state.step, **losses, "unreadable": now.unreadable})
                bar.set_postfix_str(f"loss {losses['loss']:.3f}")
            number = arrived(signals)
            if number or state.step % settings.save_every == 0 or state.step == last:
                from_main(now.save)
            if number:
                saved = f"after iteration {state.step}, saved in {now.out / outputs.CHECKPOINT}"
                raise Stopped(f"stopped by {number.name} {saved}: continue with --resume", number)


def finish(now: Run) -> None:
    """Test, write the results and the model, and print the table."""
    training.prepare_test(now.state.model, now.images, now.settings, now.state.device)
    scores, unreadable = training.evaluate(now.state.model, now.images, now.state.device)
    if not is_main():
        return
    data, built = now.data, {"arch": now.encoder.arch, "stem": now.encoder.stem, "classes": now.data.classes}
    results = {
        "scores": scores,
        "unit": f"percent, at {data.recall_points} points of recall; AP is the mean over IoU 0.5, 0.55, ..., 0.95",
        "iteration": now.state.step,
        "data": data.name,
        "train": data.train.counts() | {"unreadable": now.unreadable},
        "test": data.test.counts() | {"unreadable": unreadable},
        "weights": now.encoder.source,
        **built,
        "settings": now.shaping,
    }
    with outputs.replacing(now.out / outputs.RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    model = {"model": now.state.model.state_dict(), **built, "masks": data.masks, "settings": now.settings.shaping()}
    checkpoint.save(now.out / "model.pt", model)
    if now.unreadable or unreadable:
        print(f"note: unreadable images: {now.unreadable} replaced in training, {unreadable} left out of the test")
    print(f"{data.name}, average precision in percent, at IoU 0.5 to 0.95, 0.5 and 0.75\n")
    print(training.table(f"{now.encoder.arch}-C4, {now.settings.iterations:,} iterations", scores))


if __name__ == "__main__":
    start(main)
