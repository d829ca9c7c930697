"""Transfer a pretrained encoder to object detection (Pascal VOC) or to detection and instance segmentation (COCO).

    python examples/transfer_detection.py --data VOCdevkit --weights runs/imagenet-resnet50/backbone.pt
    python examples/transfer_detection.py --data coco --weights resnet50.pth --neck fpn
    torchrun --nproc-per-node 8 examples/transfer_detection.py --data coco --weights resnet50.pth

The folder decides: with VOC2007/ and VOC2012/ in it, Faster R-CNN is trained on the trainval parts and tested on 2007's
test part; with annotations/, train2017/ and val2017/, Mask R-CNN is trained on the one and tested on the other. Every
number is as published for Barlow Twins, and is a flag; a batch of another size scales the learning rate with it.

Boxes, masks and images that cannot be used are left out, and counted in the output and in the results. SIGTERM, SIGUSR1
and Ctrl-C end a run after its step, saved; with --resume the same command continues it.

The output folder gets ``results.json``, ``model.pt``, ``metrics.jsonl`` and ``checkpoint.pt`` with the one before it.
The scores of the last iteration are the result: the best of several would be chosen on the test set.

Sources: Zbontar et al. (2021), arXiv 2103.03230; He et al. (2019), arXiv 1911.05722; see
``recipes/detection/recipes.py``.
"""

import contextlib
import json
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from barlow_recipes import checkpoint, distributed, folders, reporting
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.detection import scores
from barlow_recipes.detection.annotations import DetectionData, told
from barlow_recipes.detection.data import load_data
from barlow_recipes.detection.images import TrainingBatches, test_batches
from barlow_recipes.detection.models import DetectorOptions, build_detector
from barlow_recipes.detection.settings import Settings, read_settings
from barlow_recipes.detection.training import (
    buffers_kept,
    build_optimizer,
    build_schedule,
    endless,
    measure_norms,
    take_step,
)
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.errors import Stopped, require
from barlow_recipes.lock import locked
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
    model: GeneralizedRCNN
    network: nn.Module  # the model, or what several processes train in its place
    state: TrainingState
    train: TrainingBatches
    norms: TrainingBatches  # the same images once more, for batch norms to be measured amid the training
    test: Any
    out: Path
    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)
    unreadable: int = 0  # training images that were replaced, of all processes, since the program began


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read_settings(argv, __doc__ or "")), OUT_OF_MEMORY)


def run(settings: Settings) -> None:
    """Read the annotations, build the detector, train, test."""
    for module, reason in (("tqdm", "the progress bar"), ("numpy", "boxes"), ("pycocotools.mask", "the scores")):
        require(module, reason)  # now, not hours later
    require("torchmetrics.detection", "the scores")
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    data = load_data(settings.data, settings.layout)
    torch.manual_seed(settings.seed)
    encoder = find_encoder(settings)
    weights = digest(encoder.module)
    model = build_detector(encoder, detector_options(settings, data)).to(settings.device)
    optimizer = build_optimizer(model, settings)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=False)
    state = TrainingState(model, optimizer, build_schedule(optimizer, settings), scaler, settings.device)
    default = Path("runs") / f"{data.name.lower()}-{encoder.arch.replace('/', '-')}-{settings.neck}"
    wanted = from_main(lambda: reporting.find_checkpoint(settings.resume, settings.out, default))
    saved, resumed = checkpoint.load(wanted) if wanted else (None, None)
    shaping = settings.shaping() | {"data": data.fingerprint(), "device": settings.device.type}
    facts = {name: str(value) for name, value in shaping.items()} | {"the encoder": encoder.source}
    distributed.require_agreement(facts | {"the checkpoint": str(saved and saved["step"])})
    if resumed and saved:
        del shaping["device"]
        checkpoint.check_settings(resumed, saved["settings"], shaping)
    out = from_main(lambda: folders.output_folder(settings, default, resumed))
    loading: dict[str, Any] = {
        "masks": data.masks,
        "workers": settings.workers,
        "timeout": settings.loader_timeout,
        "pin_memory": settings.device.type == "cuda",
    }
    train, norms = (
        TrainingBatches(data.train.examples, batch_size=settings.batch_size, seed=settings.seed, **loading)
        for _ in range(2)
    )
    rows = max(1, settings.batch_size // distributed.world_size())
    test = test_batches(data.test.examples, batch_size=rows, **loading)
    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(locked(out))
            if not (resumed and resumed.parent.resolve() == out.resolve()):
                reporting.clear(out)
                (out / MODEL).unlink(missing_ok=True)
        requests = stack.enter_context(stop_requests())
        step = saved["step"] if saved else 0
        metrics = Metrics(out if is_main() else None, resumed if is_main() else None, step)
        metrics.add("settings", settings.shaping() | {"command": sys.argv[1:], "torch": torch.__version__})
        network = distributed.synchronized(model)
        now = Run(settings, data, encoder, weights, model, network, state, train, norms, test, out, metrics)
        print(introduction(now))
        if saved:
            state.load_state_dict(saved)
            print(f"continuing from {resumed}, after iteration {state.step}")
        train_detector(now, requests)
        finish(now)


def find_encoder(settings: Settings) -> Encoder:
    if settings.weights == "random":
        return build_encoder(settings.arch or "resnet50", settings.stem or "imagenet")
    return load_encoder(Path(settings.weights), settings.arch, settings.stem)


def detector_options(settings: Settings, data: DetectionData) -> DetectorOptions:
    return DetectorOptions(
        classes=len(data.classes),
        masks=data.masks,
        neck=settings.neck,
        frozen=settings.freeze_backbone,
        short_side=settings.short_side,
        max_side=settings.max_side,
        anchor_sizes=settings.anchor_sizes,
        anchors_per_image=settings.anchors_per_image,
        rois_per_image=settings.rois_per_image,
        candidates=settings.candidates,
        proposals=settings.proposals,
        roi_size=settings.roi_size,
        fpn_channels=settings.fpn_channels,
        precision=settings.precision,
    )


def introduction(now: Run) -> str:
    settings, data = now.settings, now.data
    kind = "Mask R-CNN" if data.masks else "Faster R-CNN"
    parameters = sum(parameter.numel() for parameter in now.model.parameters()) / 1e6
    learning = sum(parameter.numel() for parameter in now.model.parameters() if parameter.requires_grad) / 1e6
    processes = distributed.world_size()
    devices = f"{settings.device.type} in {processes} processes" if processes > 1 else f"{settings.device}"
    lines = [
        f"{data.name}: {len(data.train.examples):,} images with {data.train.boxes:,} boxes to train on, "
        f"{len(data.test.examples):,} with {data.test.boxes:,} in the test, {len(data.classes)} classes",
        f"{kind} {encoder_name(now)}, {now.encoder.source}: {parameters:.2f} M parameters, {learning:.2f} M of them "
        f"learn; {settings.iterations:,} iterations of {settings.batch_size} images, {settings.precision} on "
        f"{devices}; results go to {now.out}",
    ]
    parts = {"training": data.train, "test": data.test}
    notes = [f"left out of the {part}: {told(split.left_out)}" for part, split in parts.items() if split.left_out]
    return "\n".join(lines + [f"note: {note}" for note in [*data.notes, *notes, *settings.notes()]])


def encoder_name(now: Run) -> str:
    frozen = ", frozen" if now.settings.freeze_backbone else ""
    return f"{now.encoder.arch}-{now.settings.neck.upper()}{frozen}"


def train_detector(now: Run, requests: StopRequests) -> None:
    """Train to the last iteration; save, and if asked for test, on the way."""
    settings, state = now.settings, now.state
    tqdm = require("tqdm", "the progress bar").tqdm
    hidden = None if is_main() else True  # None: where there is no terminal
    batches = endless(now.train, state.step)
    with tqdm(total=settings.iterations, initial=state.step, disable=hidden, dynamic_ncols=True, bar_format=BAR) as bar:
        while state.step < settings.iterations:
            now.network.train()
            batch = next(batches)
            losses = take_step(now.network, state, batch, settings, now.data.masks)
            unreadable, *signals = distributed.totals([batch.unreadable, *requests.counts()])
            now.unreadable += unreadable
            bar.update()
            if state.step % LOG_EVERY == 0 or state.step == settings.iterations:
                now.metrics.add("step", {"step": state.step, **losses, "unreadable": now.unreadable})
                bar.set_postfix_str(f"loss {losses['loss']:.3f}")
            number = arrived(signals)
            if number or state.step % settings.save_every == 0 or state.step == settings.iterations:
                from_main(lambda: save(now))
            if number:
                saved = f"after iteration {state.step}, saved in {now.out / reporting.CHECKPOINT}"
                raise Stopped(f"stopped by {number.name} {saved}: continue with --resume", number)
            if settings.evaluate_every and state.step % settings.evaluate_every == 0 < settings.iterations - state.step:
                with buffers_kept(now.model):
                    measured = measure(now)
                bar.write(f"iteration {state.step:,}\n{scores.table({'': measured})}" if is_main() else "")


def save(now: Run) -> None:
    shaping = now.settings.shaping() | {"data": now.data.fingerprint()}
    checkpoint.save(now.out / reporting.CHECKPOINT, now.state.state_dict() | {"settings": shaping}, keep_previous=True)


def measure(now: Run) -> scores.Scores:
    """Test the model as it is, and keep the scores in the run's history."""
    settings, data = now.settings, now.data
    measure_norms(now.network, now.model, now.norms, settings, data.masks)
    measured, unreadable = scores.evaluate(
        now.model,
        now.test,
        settings.device,
        masks=data.masks,
        recall_points=data.recall_points,
        short_side=settings.test_short_side,
    )
    now.metrics.add("test", {"step": now.state.step, "scores": measured, "unreadable": unreadable})
    return measured


def finish(now: Run) -> None:
    """Test, write the results and the model, and print the table."""
    measured = measure(now)
    if is_main():
        reached = results(now, measured)
        with reporting.replacing(now.out / reporting.RESULTS) as temporary:
            temporary.write_text(json.dumps(reached, indent=2) + "\n", encoding="utf-8")
        checkpoint.save(now.out / MODEL, contents(now))
        test = reached["test"]
        if test["unreadable"] or now.unreadable:
            print(
                f"note: {now.unreadable} training images could not be read and were replaced, {test['unreadable']} of "
                "the test were left out"
            )
        rows: dict[str, Any] = {f"{encoder_name(now)}, {now.settings.iterations:,} iterations": measured}
        if now.data.published:
            rows["Barlow Twins, ResNet-50-C4, as published"] = now.data.published
        print(f"{now.data.name}, average precision in percent, at IoU 0.5 to 0.95, 0.5 and 0.75\n")
        print(scores.table(rows))
        if best := reached.get("best_iteration"):
            print(f"\nnote: the best iteration was {best['step']:,}; that choice is made on the test set")
    print(f"\n{time.perf_counter() - now.started:.0f} seconds. Results: {now.out}")


def results(now: Run, measured: scores.Scores) -> dict[str, Any]:
    """What goes into results.json."""
    settings, data = now.settings, now.data
    row = now.metrics.of_kind("test")[-1]
    history = [*{row["step"]: {"step": row["step"], **row["scores"]} for row in now.metrics.of_kind("test")}.values()]
    reached: dict[str, Any] = {
        "scores": measured,
        "iteration": now.state.step,
        "unit": "percent; AP is the mean over IoU 0.5, 0.55, ..., 0.95",
        "recall_points": data.recall_points,
        "encoder": now.encoder._asdict() | {"module": None},
        "classes": list(data.classes),
        "train": {"images": len(data.train.examples), "boxes": data.train.boxes, "left_out": dict(data.train.left_out)},
        "test": {"images": len(data.test.examples), "boxes": data.test.boxes, "left_out": dict(data.test.left_out)},
        "data": data.name,
        "settings": settings.shaping() | {"--weights": now.weights},
        "evaluations": history,
    }
    reached["encoder"] = {name: str(value) for name, value in reached["encoder"].items() if value is not None}
    reached["train"]["unreadable"], reached["test"]["unreadable"] = now.unreadable, row["unreadable"]
    if len(history) > 1:
        best = max(history, key=lambda evaluation: evaluation["box"]["AP"] or 0.0)
        reached["best_iteration"] = best | {"chosen_on": "the test set, by the boxes' AP: no fair result"}
    return reached


def contents(now: Run) -> dict[str, Any]:
    """What goes into model.pt: the weights, and what it takes to build the model again."""
    options = detector_options(now.settings, now.data)
    built = {"arch": now.encoder.arch, "stem": now.encoder.stem, "options": vars(options)}
    return {"model": now.model.state_dict(), "classes": list(now.data.classes), **built}


if __name__ == "__main__":
    start(main)
