"""Pretrain an encoder with Barlow Twins and see what it has learned.

    python examples/imagenet_pretrain.py                # scikit-learn's digits, on the CPU, a minute or two
    python examples/imagenet_pretrain.py --data DIR     # a folder of class folders of images; ImageNet is one
    torchrun --nproc-per-node 2 examples/imagenet_pretrain.py    # either, in two processes, on the CPU or two GPUs

The data decide about encoder and defaults. The program's parts lie beside it in ``pretraining/``. Several processes
share every batch and take the steps that one would take; a run of two may be resumed by one.

The recipe is the published one: two random views of every image, a ResNet-50 with an 8192-8192-8192 projector, LARS,
warm-up and cosine, λ = 0.0051. The batch is 256 instead of 2048, with the author's learning rate for it (0.4; 70.7 %
linear top-1 on ImageNet after 300 epochs).

The output folder gets ``metrics.jsonl``, ``curves.png``, ``cross_correlation.png``, ``checkpoint.pt`` for ``--resume``
and ``backbone.pt``, the encoder's state_dict: ``torchvision.models.resnet50().load_state_dict(..., strict=False)``.

Source: Zbontar et al. (2021), arXiv 2103.03230.
"""

import copy
import sys
import time
from collections.abc import Callable
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, collapse_report, cross_correlation
from barlow_loss.diagnostics import noise_floor
from pretraining import checkpoint, distributed, pictures, probes, reporting
from pretraining.checkpoint import TrainingState
from pretraining.data import PretrainingData, Probe
from pretraining.digits import load_digits
from pretraining.distributed import from_main, is_main
from pretraining.errors import Aborted, Interrupted, UsageError, require
from pretraining.folder import load_folder
from pretraining.models import BarlowTwins, build_model
from pretraining.optimization import build_optimizer, build_schedule
from pretraining.settings import Settings, read_settings

LOG_EVERY = 10  # steps
MOST_NONFINITE = 5  # steps in a row
PICTURED_PAIRS, PICTURED_FEATURES = 1024, 128
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size or --projector"
KNOWN_FAILURES = {  # by a part of a RuntimeError's message
    "out of memory": OUT_OF_MEMORY,
    "allocate memory": OUT_OF_MEMORY,
    "by peer": "another process of this run has ended",
}


def main(argv: list[str] | None = None) -> int:
    """Run the program. 0: done; 2: a mistake in its use; 1: it could not go on; 130: Ctrl-C."""
    try:
        with distributed.joined():
            run(read_settings(argv, __doc__ or ""))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        known = [failure for text, failure in KNOWN_FAILURES.items() if text in str(error)]
        if not known:
            raise
        print(f"error: {known[0]}", file=sys.stderr)
        return Aborted.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return Aborted.exit_code
    return 0


def run(settings: Settings) -> None:
    """Prepare, measure the baselines, pretrain, evaluate, draw."""
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = build_model(settings.arch, settings.projector).to(settings.device)
    data = load_data(settings)
    state = first_state(settings, model, steps_per_epoch=len(data.pairs))
    default = Path("runs") / (data.name if settings.data is None else f"{data.name}-{settings.arch}")
    resumed = from_main(lambda: reporting.find_checkpoint(settings.resume, settings.out, default))
    saved = checkpoint.load(resumed) if resumed else None
    shaping = settings.shaping() | {"images": data.images}
    if resumed and saved:
        checkpoint.check_settings(resumed, saved["settings"], shaping)
    # A run that ended before its first checkpoint has nothing to resume, and nothing to lose.
    overwrite = settings.overwrite or (settings.resume == "auto" and resumed is None)
    out = from_main(lambda: reporting.make_output_folder(settings.out, default, overwrite=overwrite, resumed=resumed))
    metrics = reporting.Metrics(out if is_main() else None, resumed, saved["step"] if saved else 0)
    metrics.add("settings", shaping)
    print(introduction(settings, data, model, out))

    # With the initial weights, also in a run that is resumed.
    watched = from_main(lambda: baselines(model, data.monitor, settings.device))
    compared = watched
    if data.final is not data.monitor:
        compared = from_main(lambda: baselines(model, data.final, settings.device))
    network = distributed.synchronized(model)  # after the baselines, in which one process alone calls train()
    before = pictured_correlation(*embeddings(settings, data, model))
    if saved:
        state.load_state_dict(saved)
        print(f"continuing from {resumed}, after step {state.step}")

    def look() -> dict[str, float]:
        return probes.evaluate(model.backbone.eval(), data.monitor, settings.device) if data.monitor else {}

    def save() -> None:
        checkpoint.save(out / reporting.CHECKPOINT, state.state_dict() | {"settings": shaping})

    try:
        train(settings, data, state, network, metrics, look, save)
    except (Aborted, KeyboardInterrupt) as stop:
        path = out / reporting.CHECKPOINT
        advice = f"the last checkpoint is {path}" if path.exists() else "no checkpoint had been written"
        if isinstance(stop, Aborted):
            raise Aborted(f"{stop}; {advice}") from None
        raise Interrupted(f"interrupted after step {state.step}; {advice}") from None
    z1, z2 = embeddings(settings, data, model)
    after, report = pictured_correlation(z1, z2), collapse_report(z1, z2, lambd=settings.lambd)
    if not is_main():
        return

    checkpoint.save(out / reporting.BACKBONE, model.backbone.state_dict())
    pictures.draw_cross_correlation(out / reporting.CROSS_CORRELATION, before, after)
    pictures.draw_curves(
        out / reporting.CURVES,
        metrics.of_kind("step"),
        metrics.of_kind("epoch"),
        lambd=settings.lambd,
        noise_floor=noise_floor(settings.batch_size, z1.shape[1]),
        attainable_rank=min(settings.batch_size - 1, z1.shape[1]),
        baselines=watched,
    )
    metrics.add("report", {"step": state.step, **report.as_dict()})
    print(f"\nThe embeddings of {report.n} training pairs: {report.verdict}\n")
    if data.final:
        pretrained = probes.evaluate(model.backbone.eval(), data.final, settings.device)
        compared = compared | {"pretrained encoder": pretrained}
        for name, accuracies in compared.items():
            metrics.add("evaluation", {"step": state.step, "representation": name, **accuracies})
        print(reporting.accuracy_table(compared), end="\n\n")
    print(f"{time.perf_counter() - started:.0f} seconds. Results: {out}")


def load_data(settings: Settings) -> PretrainingData:
    """The images, split before anything is learned from them."""
    rows = distributed.own_rows(settings.batch_size)
    if settings.data is None:
        return load_digits(settings.batch_size, settings.seed, monitor=settings.knn, rows=rows)
    return load_folder(
        settings.data,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.workers,
        monitor=settings.knn,
        pin_memory=settings.device.type == "cuda",
        rows=rows,
    )


def first_state(settings: Settings, model: BarlowTwins, steps_per_epoch: int) -> TrainingState:
    """The model, its optimiser and the schedule of the whole run, before the first step."""
    optimizer = build_optimizer(
        settings.optimizer,
        model,
        batch_size=settings.batch_size,
        lr_weights=settings.learning_rate_weights,
        lr_biases=settings.learning_rate_biases,
        weight_decay=settings.weight_decay,
    )
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    schedule = build_schedule(optimizer, settings.epochs * steps_per_epoch, warmup_steps)
    return TrainingState(model, optimizer, schedule, settings.device)


def introduction(settings: Settings, data: PretrainingData, model: nn.Module, out: Path) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    processes = distributed.world_size()
    devices = f"{settings.device.type} in {processes} processes" if processes > 1 else f"{settings.device}"
    lines = [
        f"{data.name}: {data.images:,} images, {settings.epochs} epochs of {len(data.pairs)} steps of "
        f"{settings.batch_size} pairs",
        f"{settings.arch}, projector {settings.projector}: {parameters:.2f} M parameters, {settings.optimizer}, "
        f"{settings.precision} on {devices}; results go to {out}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in data.notes])


def train(
    settings: Settings,
    data: PretrainingData,
    state: TrainingState,
    network: nn.Module,
    metrics: reporting.Metrics,
    look: Callable[[], dict[str, float]],
    save: Callable[[], None],
) -> None:
    """Pretrain from ``state.step`` to the last step; as each epoch ends, look at held-out images and save.

    Several processes take every step together; one of them looks and saves while the others wait.
    """
    loss_fn = BarlowTwinsLoss(settings.lambd)
    autocast = torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    steps_per_epoch = len(data.pairs)
    last_step = min(settings.epochs * steps_per_epoch, settings.limit_steps or sys.maxsize)
    nonfinite = 0
    tqdm = require("tqdm", "the progress bar").tqdm
    hidden = None if is_main() else True  # None: where there is no terminal
    with tqdm(total=last_step, initial=state.step, unit="step", disable=hidden, dynamic_ncols=True) as bar:
        while state.step < last_step:
            epoch, first_step = divmod(state.step, steps_per_epoch)
            unreadable, first, started = 0, state.step, time.perf_counter()
            network.train()
            for batch in islice(data.pairs.batches(epoch, first_step), last_step - state.step):
                # The views pass through the network one after the other: each has its own batch statistics.
                with autocast:
                    z1, z2 = (network(view.to(settings.device, non_blocking=True)) for view in batch.views)
                    terms = loss_fn(z1, z2, return_terms=True)
                nonfinite = 0 if terms.loss.isfinite() else nonfinite + 1
                if nonfinite == 0:
                    state.optimizer.zero_grad()
                    terms.loss.backward()
                    state.optimizer.step()
                state.schedule.step()
                state.step += 1
                unreadable += distributed.total(batch.unreadable)
                check_health(settings, data, epoch, unreadable, nonfinite)
                if (state.step - 1) % LOG_EVERY == 0 or state.step == last_step:
                    report = collapse_report(z1.detach(), z2.detach(), lambd=settings.lambd)
                    row = {name: value.item() for name, value in terms._asdict().items()}
                    row |= {"effective_rank": min(report.effective_rank_1, report.effective_rank_2)}
                    row |= {"dead_features": report.dead_features, "learning_rate": state.schedule.get_last_lr()[0]}
                    metrics.add("step", {"step": state.step} | row)
                    bar.set_postfix_str(reporting.progress(row))
                bar.update()

            seconds = time.perf_counter() - started
            row = {"step": state.step, "epoch": epoch + 1, "unreadable": unreadable}
            row["images_per_second"] = (state.step - first) * settings.batch_size / seconds
            due = (epoch + 1) % settings.knn_every == 0 or state.step == last_step
            if due:
                row |= from_main(look)
            metrics.add("epoch", row)
            from_main(save)
            if due or unreadable:
                bar.write(reporting.epoch_line(row, settings.epochs))


def check_health(settings: Settings, data: PretrainingData, epoch: int, unreadable: int, nonfinite: int) -> None:
    """End a run that cannot become anything.

    Raises:
        Aborted: too many unreadable images in this epoch, or too many losses in a row that were not finite.
    """
    if unreadable > data.tolerated_unreadable:
        raise Aborted(
            f"{unreadable} images of epoch {epoch + 1} could not be read, {data.tolerated_unreadable} are tolerated: "
            f"is {settings.data} damaged?"
        )
    if nonfinite == MOST_NONFINITE:
        raise Aborted(
            f"the loss was not finite in {nonfinite} steps in a row (they were not applied): try a lower learning rate"
        )


def baselines(model: BarlowTwins, probe: Probe | None, device: torch.device) -> dict[str, dict[str, float]]:
    """What the images are worth without pretraining: as pixels, and behind the initial weights."""
    if probe is None:
        return {}
    untrained = probes.untrained(model.backbone, probe.bank, device)
    return {
        "raw pixels": probes.evaluate(probes.raw_pixels, probe, device),
        "untrained encoder": probes.evaluate(untrained, probe, device),
    }


@torch.no_grad()
def embeddings(settings: Settings, data: PretrainingData, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Both views of the first pairs, (N, D) each, as the loss sees them: with batch statistics."""
    model = copy.deepcopy(model).train()
    z1: list[Tensor] = []
    z2: list[Tensor] = []
    for batch in islice(data.pairs.batches(epoch=0), -(-PICTURED_PAIRS // settings.batch_size)):
        for z, view in zip((z1, z2), batch.views, strict=True):
            z.append(model(view.to(settings.device)))
    return torch.cat(z1), torch.cat(z2)


def pictured_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """C of the first features: of thousands a picture shows none."""
    return cross_correlation(z1[:, :PICTURED_FEATURES], z2[:, :PICTURED_FEATURES])


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe, too
    sys.exit(main())
