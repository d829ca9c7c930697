"""Pretrain an encoder with Barlow Twins and see what it has learned.

    python examples/imagenet_pretrain.py                          # scikit-learn's digits, on the CPU, about a minute
    python examples/imagenet_pretrain.py --data fashion-mnist     # 60,000 coloured images, on the CPU, five minutes
    python examples/imagenet_pretrain.py --data DIR               # any images, with or without class folders
    torchrun --nproc-per-node 8 examples/imagenet_pretrain.py --data DIR --preset paper    # any, on eight GPUs

The data decide about encoder and defaults; --preset takes the numbers of a published run. Several processes, on one
machine or many, share every batch and take the steps that one would take; a run of eight may be resumed by one.

SIGTERM, SIGUSR1 and Ctrl-C end a run after its step, saved; with --resume the same command begins or continues it.

The output folder gets ``report.html``, ``curves.png`` and ``cross_correlation.png``, drawn again at every look,
``metrics.jsonl``, ``checkpoint.pt`` with the one before it, and at the end ``backbone.pt``, the encoder's state_dict:
``torchvision.models.resnet50().load_state_dict(..., strict=False)``.

Source: Zbontar et al. (2021), arXiv 2103.03230.
"""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from barlow_loss import CollapseReport, collapse_report
from barlow_recipes import checkpoint, distributed, folders, looking
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import PretrainingData
from barlow_recipes.digits import load_digits
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import freeze
from barlow_recipes.errors import Aborted, Interrupted, Stopped, UsageError, first_line, require
from barlow_recipes.fashion_mnist import is_fashion_mnist, load_fashion_mnist
from barlow_recipes.images import ImagePairs, load_images
from barlow_recipes.metrics import Mirror, TensorBoard, WeightsAndBiases
from barlow_recipes.models import BarlowTwins, build_model, checkpoint_activations, has_batch_norms
from barlow_recipes.official import find_official, go_on, initialize
from barlow_recipes.optimization import build_optimizer, build_schedule
from barlow_recipes.outputs import BACKBONE
from barlow_recipes.program import exit_status, start
from barlow_recipes.report import versions
from barlow_recipes.run import Accuracies, Run
from barlow_recipes.settings import Settings, read_settings
from barlow_recipes.signals import StopRequests, arrived, stop_requests
from barlow_recipes.steps import Step, apply, check_health, gradients
from barlow_recipes.tables import BAR, accuracy_cells, aligned, epoch_line, progress
from barlow_recipes.timing import WARM_UP, Stopwatch, loader_bound
from barlow_recipes.weights import Weights

QUIET = 60  # seconds; a longer epoch is told also where no progress bar shows that the run goes on


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read_settings(argv, __doc__ or "")))


def run(settings: Settings) -> None:
    """Prepare, measure the baselines, pretrain, evaluate, draw."""
    started = time.perf_counter()
    for module, reason in (("tqdm", "the progress bar"), ("matplotlib", "the curves"), ("jinja2", "report.html")):
        require(module, reason)  # now, not hours later
    prepare_torch(settings)
    model = prepare_model(settings)
    data = load_data(settings)
    data = data if settings.evaluation else replace(data, final=None)
    steps_per_epoch = len(data.pairs) // settings.accumulate
    state = first_state(settings, model, steps_per_epoch)
    name = data.name if settings.data is None else f"{data.name}-{settings.arch}"
    default = Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    wanted = folders.find(settings, default)
    theirs = find_official(wanted) if wanted else None
    saved = None if theirs else folders.load(wanted)
    begun = None if saved else begin(settings, state, theirs, steps_per_epoch)
    shaping = settings.shaping() | {"images": data.images}
    agreed = {"the images of --data": data.fingerprint, "the weights that it begins with": begun}
    told = environment(settings) | {"data": data.name}
    with (
        folders.opened(
            settings, default, shaping, saved, finished=BACKBONE, agreed=agreed, told=told, mirrors=mirrors(settings)
        ) as (out, metrics),
        stop_requests() as requests,
    ):
        watch = Stopwatch(settings.device, settings.batch_size, settings.profile)
        now = Run(settings, data, state, out, metrics, watch, network=model, begun=begun)
        print(introduction(now))
        compared = measure_before(now)
        if saved:
            state.load_state_dict(saved.content)
        del saved
        pretrain(now, requests)
        report = now.collapse or looking.draw(now)  # a run that is resumed at its end has none
        from_main(lambda: evaluate(now, compared, report))
    print(f"{time.perf_counter() - started:.0f} seconds. Results: {out}")


def prepare_torch(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = not settings.deterministic
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    # A first step that is not applied is told in a line of its own.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)


def prepare_model(settings: Settings) -> BarlowTwins:
    shape = settings.stem, settings.channels, settings.image_size
    model = build_model(settings.arch, settings.projector, *shape).to(settings.device)
    if settings.freeze:
        freeze(model.backbone, settings.freeze)
    model = model.to(memory_format=torch.channels_last) if settings.channels_last else model
    if settings.checkpoint_activations:
        checkpoint_activations(model.backbone)
    if settings.chunk_size:  # as many parts on every process, though their rows differ: they may exchange statistics
        model.chunks = -(-settings.micro_batch_size // (distributed.world_size() * settings.chunk_size))
    return model


def load_data(settings: Settings) -> PretrainingData:
    """The images, split before anything is learned from them."""
    size, seed, monitor = settings.micro_batch_size, settings.seed, settings.probe
    rows = distributed.own_rows(size)
    if settings.data is None:
        return load_digits(size, seed, monitor=monitor, rows=rows)
    if is_fashion_mnist(settings.data):
        return load_fashion_mnist(
            settings.data, recipes=settings.recipes(), batch_size=size, seed=seed, monitor=monitor, rows=rows
        )
    return load_images(
        settings.data,
        recipes=settings.recipes(),
        pixels=settings,
        image_size=settings.image_size,
        batch_size=size,
        seed=seed,
        workers=settings.workers,
        timeout=settings.loader_timeout,
        monitor=monitor,
        pin_memory=settings.device.type == "cuda",
        augment_on=settings.augment_on,
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
        trust_coefficient=settings.trust_coefficient,
        clip_trust=settings.clip_trust,
    )
    if not steps_per_epoch:
        raise UsageError(f"--batch-size {settings.batch_size}: expected at most the number of images")
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    schedule = build_schedule(optimizer, settings.epochs * steps_per_epoch, warmup_steps)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.precision == "fp16")
    return TrainingState(model, optimizer, schedule, scaler, settings.device)


def begin(settings: Settings, state: TrainingState, theirs: Weights | None, steps_per_epoch: int) -> str | None:
    """Where a new run does not begin with random weights: give it the others, and say in words which."""
    if theirs:
        return go_on(theirs, state, settings.learning_rate_biases, steps_per_epoch)
    return initialize(state.model, settings.init, settings.init_strict) if settings.init else None


def introduction(now: Run) -> str:
    settings, data = now.settings, now.data
    parameters = sum(parameter.numel() for parameter in now.state.model.parameters()) / 1e6
    processes = distributed.world_size()
    devices = f"{settings.device.type} in {processes} processes" if processes > 1 else f"{settings.device}"
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    lines = [
        f"{data.name}: {data.images:,} images, {settings.epochs} epochs of {now.steps_per_epoch} steps of "
        f"{settings.batch_size} pairs{parts}",
        f"{settings.arch}, projector {settings.projector}: {parameters:.2f} M parameters, {settings.optimizer}, "
        f"{settings.precision} on {devices}; results go to {now.out}",
    ]
    notes = [*filter(None, [now.begun]), *data.notes]
    if now.state.model.chunks > 1 and has_batch_norms(now.state.model.train().backbone):
        notes.append(
            f"--chunk-size {settings.chunk_size}: batch norms of the encoder normalise by a chunk of each process, "
            "as on so many small devices, so another number of processes takes other steps; with layer or group norms "
            "the step would be that of the whole batch"
        )
    if settings.profile and settings.profile + WARM_UP > now.last_step:
        notes.append(
            f"--profile {settings.profile} needs {settings.profile + WARM_UP} steps, the run has {now.last_step}"
        )
    return "\n".join(lines + [f"note: {note}" for note in notes])


def mirrors(settings: Settings) -> Callable[[Path, int | None], list[Mirror]]:
    wanted = {TensorBoard: settings.tensorboard, WeightsAndBiases: settings.wandb}
    return lambda out, step: [mirror(out, step) for mirror, asked in wanted.items() if asked]


def environment(settings: Settings) -> dict[str, Any]:
    """Where the run takes place: nothing that shapes it."""
    device = settings.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name} | versions()


def measure_before(now: Run) -> Accuracies:
    """What the images are worth without pretraining; then ready the model for training.

    Returns:
        The accuracies on the images of the final evaluation.
    """
    now.watched = from_main(lambda: looking.baselines(now, "monitor"))
    same = now.data.final is now.data.monitor
    compared = now.watched if same else from_main(lambda: looking.baselines(now, "final"))
    # After the baselines, in which one process alone calls train().
    now.network = distributed.synchronized(now.state.model)
    now.before = looking.pictured_correlation(*looking.embeddings(now))
    if now.settings.compile:
        now.network = torch.compile(now.network)
    return compared


def pretrain(now: Run, requests: StopRequests) -> None:
    """Train; where that ends early, say why, and where the last checkpoint is."""
    try:
        train(now, requests)
    except (Exception, KeyboardInterrupt) as stop:
        found = now.checkpoint.exists()
        advice = f"the last checkpoint is {now.checkpoint}" if found else "no checkpoint had been written"
        why = first_line(stop) if isinstance(stop, Exception) else f"interrupted after step {now.state.step}"
        with contextlib.suppress(Aborted):  # a full disk, say
            looking.tell(now, why)
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted(f"{why}; {advice}") from None
        if isinstance(stop, Aborted):
            raise Aborted(f"{why}; {advice}") from None
        raise


def train(now: Run, requests: StopRequests) -> None:
    """Pretrain from the state's step to the last one; as each epoch ends, save, and look at held-out images.

    Several processes take every step together, or leave it out together; one of them looks and saves while the others
    wait.
    """
    settings, state, watch = now.settings, now.state, now.watch
    tqdm = require("tqdm", "the progress bar").tqdm
    hidden = None if is_main() else True  # None: where there is no terminal
    skipped = 0
    bounds = {"total": now.last_step, "initial": state.step}
    with tqdm(**bounds, unit="step", disable=hidden, dynamic_ncols=True, bar_format=BAR) as bar:
        while state.step < now.last_step:
            epoch, first = divmod(state.step, now.steps_per_epoch)
            unreadable = 0
            now.network.train()
            watch.begin_epoch()
            batches = now.data.pairs.batches(epoch, first * settings.accumulate)
            for _ in range(min(now.steps_per_epoch - first, now.last_step - state.step)):
                done = gradients(now, batches)
                bad, broken, *signals = distributed.totals([not done.finite, done.unreadable, *requests.counts()])
                apply(now, good=not bad)
                profile = watch.end_step()
                skipped, unreadable = skipped + 1 if bad else 0, unreadable + broken
                check_health(now, epoch, unreadable, skipped)
                log(now, done, bar)
                if profile:
                    now.metrics.add("profile", {"step": state.step, "parts": profile.rows})
                    bar.write(f"\n{profile}\n")
                number = arrived(signals)
                due = settings.save_every and state.step % settings.save_every == 0
                if number or (due and state.step % now.steps_per_epoch):
                    from_main(now.save)
                if number:
                    saved = f"after step {state.step}, saved in {now.checkpoint}: continue with --resume"
                    raise Stopped(f"stopped by {number.name} {saved}", number)
            finish_epoch(now, epoch, unreadable, bar)


def log(now: Run, done: Step, bar: Any) -> None:
    """Every tenth step as a row, now and then the collapse report; the progress bar."""
    settings, state, watch = now.settings, now.state, now.watch
    last = state.step == now.last_step
    logged = (state.step - 1) % settings.log_every == 0 or last
    reported = state.step % settings.report_every == 0 or last
    if logged or reported:
        some = slice(None) if reported else slice(looking.LOGGED_PAIRS)
        report = collapse_report(done.z1[some], done.z2[some], lambd=settings.lambd)
    if logged:
        row = {"step": state.step} | {name: value.item() for name, value in done.terms._asdict().items()}
        row |= {"effective_rank": min(report.effective_rank_1, report.effective_rank_2)}
        row |= {"dead_features": report.dead_features, "gradient_norm": done.gradient_norm.item()}
        row |= {"learning_rate": done.learning_rate, "images_per_second": watch.images_per_second}
        now.metrics.add("step", row)
        bar.set_postfix_str(progress(row))
    if reported:
        now.metrics.add("collapse", {"step": state.step, **report.as_dict()})
    bar.update()


def finish_epoch(now: Run, epoch: int, unreadable: int, bar: Any) -> None:
    """Save; where it is due, look at the held-out images and draw."""
    settings, state = now.settings, now.state
    row = {"step": state.step, "epoch": epoch + 1, "unreadable": unreadable}
    row |= {"images_per_second": now.watch.epoch_images_per_second}
    from_main(now.save)  # first: a look takes a while
    due = (epoch + 1) % settings.probe_every == 0 or state.step == now.last_step
    bound = loader_bound(now.watch.waited, now.watch.seconds) if isinstance(now.data.pairs, ImagePairs) else None
    if due:
        accuracies = from_main(lambda: looking.accuracies(now, now.data.monitor))
        now.accuracies = now.watched | {"pretrained encoder": accuracies} if accuracies else {}
        row |= accuracies
    now.metrics.add("epoch", row)
    if due:
        looking.draw(now)
        looking.tell(now, "running")
    if due or unreadable or (bar.disable and now.watch.seconds > QUIET):
        bar.write(epoch_line(row, settings.epochs))
    if due and bound:
        now.tell(bound)
        bar.write(f"note: {bound}")


def evaluate(now: Run, compared: Accuracies, report: CollapseReport) -> None:
    """What the encoder has become, beside pixels and initial weights; the encoder as a file of its own."""
    checkpoint.save(now.out / BACKBONE, now.state.model.backbone.state_dict())
    now.metrics.add("report", {"step": now.state.step, **report.as_dict()})
    print(f"\nThe embeddings of {report.n} training pairs: {report.verdict}\n")
    if now.data.final:
        now.accuracies = compared | {"pretrained encoder": looking.accuracies(now, now.data.final)}
        for name, accuracies in now.accuracies.items():
            now.metrics.add("evaluation", {"step": now.state.step, "representation": name, **accuracies})
        print(aligned(accuracy_cells(now.accuracies)), end="\n\n")
    looking.tell(now, "done")


if __name__ == "__main__":
    start(main)
