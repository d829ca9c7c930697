"""Transfer a pretrained encoder to object detection (Pascal VOC) or to detection and instance segmentation (COCO).

    python examples/transfer_detection.py --data VOCdevkit --weights runs/imagenet-resnet50/backbone.pt
    python examples/transfer_detection.py --data coco --weights resnet50.pth --neck fpn
    torchrun --nproc-per-node 8 examples/transfer_detection.py --data coco --weights resnet50.pth

The folder decides: with VOC2007/ and VOC2012/ in it, Faster R-CNN is trained on the trainval parts and tested on 2007's
test part; with annotations/, train2017/ and val2017/, Mask R-CNN is trained on the one and tested on the other. Every
number is as published for Barlow Twins, and is a flag. What published runs reached: box AP, AP50, AP75 of 56.8, 82.6,
63.4 on VOC07+12 and of 39.2, 59.0, 42.5 on COCO, masks of 34.3, 56.0, 36.5.

Boxes, masks and images that cannot be used are left out, and counted in the output and in the results. SIGTERM, SIGUSR1
and Ctrl-C end a run after its step, saved; with --resume the same command continues it. The scores of the last
iteration are the result: the best of several would be chosen on the test set.

The output folder gets results.json, model.pt, metrics.jsonl and checkpoint.pt with the one before it.
"""

import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import FasterRCNN

from barlow_recipes import checkpoint, distributed, folders, outputs
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.command_line import find_device
from barlow_recipes.detection import training
from barlow_recipes.detection.data import DetectionData, Split, load_data
from barlow_recipes.detection.images import Images
from barlow_recipes.detection.models import build_detector
from barlow_recipes.detection.settings import Settings, read_settings
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.errors import Stopped, require
from barlow_recipes.metrics import Metrics
from barlow_recipes.program import exit_status, start
from barlow_recipes.signals import StopRequests, arrived, stop_requests
from barlow_recipes.tables import BAR
from barlow_recipes.weights import digest, load_encoder

MODEL = "model.pt"
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --short-side or --rois-per-image, or more processes"
LOG_EVERY = 20  # iterations from one row of metrics.jsonl to the next


@dataclass
class Run:
    """A run and where it stands."""

    settings: Settings
    data: DetectionData
    encoder: Encoder
    weights: str  # the digest of those that the encoder began with
    model: FasterRCNN
    network: nn.Module  # the model, or what several processes train in its place
    state: TrainingState
    images: Images
    shaping: dict[str, Any]  # what a continued run must share with its checkpoint
    out: Path
    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)
    unreadable: int = 0  # training images that were replaced, of all processes, since the program began

    @property
    def name(self) -> str:
        frozen = ", frozen" if self.settings.freeze_backbone else ""
        return f"{self.encoder.arch}-{self.settings.neck.upper()}{frozen}"

    def save(self) -> None:
        content = self.state.state_dict() | {"settings": self.shaping}
        checkpoint.save(self.out / outputs.CHECKPOINT, content, keep_previous=True)

    def measure(self) -> tuple[training.Scores, FasterRCNN]:
        """Test the model as it is, and keep the scores in the run's history."""
        tested = training.tested(self.model, self.images, self.settings, self.state.device)
        measured, unreadable = training.evaluate(tested, self.images, self.state.device)
        self.metrics.add("test", {"step": self.state.step, "scores": measured, "unreadable": unreadable})
        return measured, tested


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read_settings(argv, __doc__ or "")), OUT_OF_MEMORY)


def run(settings: Settings) -> None:
    """Read the annotations, build the detector, train, test."""
    for module, reason in (("tqdm", "the progress bar"), ("pycocotools", "masks"), ("torchmetrics", "the scores")):
        require(module, reason)  # now, not hours later
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    device, data = find_device(settings.device), load_data(settings.data)
    images = Images(data, settings, pin_memory=device.type == "cuda")
    torch.manual_seed(settings.seed)
    if settings.weights == "random":
        encoder = build_encoder(settings.arch or "resnet50", settings.stem or "imagenet")
    else:
        encoder = load_encoder(Path(settings.weights), settings.arch, settings.stem)
    weights = digest(encoder.module)
    model = build_detector(encoder, settings, classes=len(data.classes), masks=data.masks).to(device)
    optimizer = training.build_optimizer(model, settings)
    schedule = LambdaLR(optimizer, lambda step: training.learning_rate_factor(step, settings))
    state = TrainingState(model, optimizer, schedule, torch.amp.GradScaler(device.type, enabled=False), device)
    shaping = settings.shaping() | {"data": data.fingerprint()}
    agreed = {"the device": device.type, "the encoder": encoder.source}
    default = Path("runs") / f"{data.name.lower()}-{encoder.arch.replace('/', '-')}-{settings.neck}"
    saved = folders.load(folders.find(settings, default))
    opened = folders.opened(settings, default, shaping, saved, unit="iteration", agreed=agreed)
    with opened as (out, metrics), stop_requests() as requests:
        network = distributed.synchronized(model)
        now = Run(settings, data, encoder, weights, model, network, state, images, shaping, out, metrics)
        if saved:
            state.load_state_dict(saved.content)
        print(introduction(now))
        train_detector(now, requests)
        finish(now)


def introduction(now: Run) -> str:
    settings, data, device, processes = now.settings, now.data, now.state.device, distributed.world_size()
    parameters = [*now.model.parameters()]
    everything = sum(parameter.numel() for parameter in parameters) / 1e6
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
    lines = [
        f"{data.name}: {len(data.train.examples):,} images with {data.train.boxes:,} boxes to train on, "
        f"{len(data.test.examples):,} with {data.test.boxes:,} in the test, {len(data.classes)} classes",
        f"{'Mask' if data.masks else 'Faster'} R-CNN {now.name}, {now.encoder.source}: {everything:.2f} M parameters, "
        f"{learning:.2f} M of them learn, {settings.precision} on "
        f"{f'{device.type} in {processes} processes' if processes > 1 else device}; results go to {now.out}",
        f"{settings.iterations:,} iterations of {settings.batch_size} images, learning rate {settings.learning_rate:g} "
        f"after {settings.warmup:,} of warm-up, a tenth of it from each of {[*settings.milestones]} on",
    ]
    parts = {"training": data.train, "test": data.test}
    lines += [f"note: left out of the {part}: {split.told()}" for part, split in parts.items() if split.left_out]
    return "\n".join(lines)


def train_detector(now: Run, requests: StopRequests) -> None:
    """Train to the last iteration; save, and if asked for test, on the way."""
    settings, state, last = now.settings, now.state, now.settings.iterations
    tqdm = require("tqdm", "the progress bar").tqdm
    hidden = None if is_main() else True  # None: where there is no terminal
    batches = now.images.from_step(state.step)
    now.network.train()
    with tqdm(total=last, initial=state.step, disable=hidden, dynamic_ncols=True, bar_format=BAR) as bar:
        while state.step < last:
            batch = next(batches)
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
            if settings.evaluate_every and state.step % settings.evaluate_every == 0 and state.step < last:
                measured, _ = now.measure()
                bar.write(f"iteration {state.step:,}\n{training.table({'': measured})}" if is_main() else "")


def finish(now: Run) -> None:
    """Test, write the results and the model, and print the table."""
    measured, tested = now.measure()
    if is_main():
        reached = results(now, measured)
        with outputs.replacing(now.out / outputs.RESULTS) as temporary:
            temporary.write_text(json.dumps(reached, indent=2) + "\n", encoding="utf-8")
        built = {"arch": now.encoder.arch, "stem": now.encoder.stem, "settings": now.settings.shaping()}
        of_data = {"classes": list(now.data.classes), "masks": now.data.masks}
        checkpoint.save(now.out / MODEL, {"model": tested.state_dict(), **of_data, **built})
        in_training, in_test = (reached[part]["unreadable"] for part in ("train", "test"))
        if in_training or in_test:
            print(f"note: unreadable images: {in_training} replaced in training, {in_test} left out of the test")
        print(f"{now.data.name}, average precision in percent, at IoU 0.5 to 0.95, 0.5 and 0.75\n")
        print(training.table({f"{now.name}, {now.settings.iterations:,} iterations": measured}))
        if best := reached.get("best_iteration"):
            print(f"\nnote: the best iteration was {best['step']:,}; that choice is made on the test set")
    print(f"\n{time.perf_counter() - now.started:.0f} seconds. Results: {now.out}")


def results(now: Run, measured: training.Scores) -> dict[str, Any]:
    """What goes into results.json."""
    data, tests = now.data, {row["step"]: row for row in now.metrics.of_kind("test")}
    history = [{"step": step, **row["scores"]} for step, row in tests.items()]

    def about(split: Split, unreadable: int) -> dict[str, Any]:
        counts = {"images": len(split.examples), "boxes": split.boxes}
        return {**counts, "left_out": split.left_out, "unreadable": unreadable}

    reached = {
        "scores": measured,
        "iteration": now.state.step,
        "unit": "percent; AP is the mean over IoU 0.5, 0.55, ..., 0.95",
        "recall_points": data.recall_points,
        "encoder": {name: str(value) for name, value in now.encoder._asdict().items() if name != "module"},
        "classes": list(data.classes),
        "train": about(data.train, now.unreadable),
        "test": about(data.test, tests[now.state.step]["unreadable"]),
        "data": data.name,
        "settings": now.settings.shaping() | {"--weights": now.weights},
        "evaluations": history,
    }
    if len(history) > 1:
        best = max(history, key=lambda evaluation: evaluation["box"]["AP"] or 0.0)
        reached["best_iteration"] = best | {"chosen_on": "the test set, by the boxes' AP: no fair result"}
    return reached


if __name__ == "__main__":
    start(main)
