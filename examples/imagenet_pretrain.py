"""Pretrain an encoder with Barlow Twins and see what it has learned.

    python examples/imagenet_pretrain.py                          # scikit-learn's digits, on the CPU, about a minute
    python examples/imagenet_pretrain.py --data fashion-mnist     # 60,000 coloured images, on the CPU, five minutes
    python examples/imagenet_pretrain.py --data DIR               # any images, with or without class folders
    torchrun --nproc-per-node 8 examples/imagenet_pretrain.py --data DIR --preset paper    # any, on eight GPUs

The data decide about encoder and defaults; --preset takes the numbers of a published run. Several processes share every
batch and take the steps that one would take. SIGTERM, SIGUSR1 and Ctrl-C end a run after its step, saved; with --resume
the same command begins or continues it, with any number of processes.

The output folder gets ``report.html``, ``curves.png`` and ``cross_correlation.png``, drawn again at every look,
``metrics.jsonl``, ``checkpoint.pt`` with the one before it, and at the end ``backbone.pt``, the encoder's state_dict:
``torchvision.models.resnet50().load_state_dict(..., strict=False)``. Source: Zbontar et al. (2021), arXiv 2103.03230.
"""

import contextlib
import os
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from barlow_loss import collapse_report
from barlow_recipes import checkpoint, distributed, folders, looking
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import PretrainingData
from barlow_recipes.digits import load_digits
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import freeze
from barlow_recipes.errors import Aborted, Interrupted, Stopped, first_line, require
from barlow_recipes.fashion_mnist import is_fashion_mnist, load_fashion_mnist
from barlow_recipes.images import load_images
from barlow_recipes.looking import versions
from barlow_recipes.metrics import BAR, TensorBoard, WeightsAndBiases, accuracy_cells, aligned, epoch_line
from barlow_recipes.models import BarlowTwins, build_model
from barlow_recipes.official import find_official, go_on, initialize
from barlow_recipes.optimization import build_optimizer, build_schedule
from barlow_recipes.outputs import BACKBONE
from barlow_recipes.program import StopRequests, arrived, exit_status, start
from barlow_recipes.settings import BEFORE_MORE_VIEWS, Settings, read_settings
from barlow_recipes.steps import Run, Step, Stopwatch, apply, check_health, gradients


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(read_settings(argv, __doc__ or "")))


def run(settings: Settings) -> None:
    """Prepare, measure the baselines, pretrain, evaluate, draw."""
    started = time.perf_counter()
    require("matplotlib", "the curves")  # now, not hours later
    model = prepare_model(settings)
    data = load_data(settings)
    steps_per_epoch = len(data.pairs) // settings.accumulate
    state = first_state(settings, model, steps_per_epoch)
    name = data.name if settings.data is None else f"{data.name}-{settings.arch}"
    default = Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    wanted = folders.find(settings, default)
    theirs = find_official(wanted) if wanted else None
    saved = None if theirs else folders.load(wanted)
    if saved:
        saved.content["settings"] = BEFORE_MORE_VIEWS | saved.content["settings"]
    begun = None  # in words, where the weights come from if they are not random
    if theirs:
        begun = go_on(theirs, state, settings.learning_rate_biases, steps_per_epoch)
    elif settings.init and not saved:
        begun = initialize(state.model, settings.init, settings.init_strict)
    device = settings.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    mirrors = {TensorBoard: settings.tensorboard, WeightsAndBiases: settings.wandb}
    opened = folders.opened(
        settings,
        default,
        settings.shaping() | {"images": data.images},
        saved,
        finished=BACKBONE,
        agreed={"the images of --data": data.fingerprint, "the weights that it begins with": begun},
        told={"device": chip, "data": data.name} | versions(),
        mirrors=[mirror for mirror, asked in mirrors.items() if asked],
    )
    with opened as (out, metrics), StopRequests() as requests:
        watch = Stopwatch(device, settings.batch_size, settings.profile)
        now = Run(settings, data, state, out, metrics, watch, network=model, begun=begun)
        introduce(now)
        measure_before(now)
        if saved:
            state.load_state_dict(saved.content)
        del saved
        pretrain(now, requests)
        if now.collapse is None:  # of a run that is resumed at its end
            looking.draw(now)
        from_main(lambda: evaluate(now))
    print(f"{time.perf_counter() - started:.0f} seconds. Results: {out}")


def prepare_model(settings: Settings) -> BarlowTwins:
    """Torch as it is to compute, and the model with its first weights."""
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = not settings.deterministic
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    # A first step that is not applied is told in a line of its own.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    shape = settings.stem, settings.channels, settings.image_size
    local_size = settings.local_size if settings.local_crops else None
    model = build_model(settings.arch, settings.projector, *shape, local_size).to(settings.device)
    if settings.freeze:
        freeze(model.backbone, settings.freeze)
    model = model.to(memory_format=torch.channels_last) if settings.channels_last else model
    if settings.chunk_size:  # as many parts on every process, though their rows differ: they may exchange statistics
        model.chunks = -(-settings.micro_batch_size // (distributed.world_size() * settings.chunk_size))
    return model


def load_data(settings: Settings) -> PretrainingData:
    """The images, split before anything is learned from them."""
    size, seed, monitor = settings.micro_batch_size, settings.seed, settings.probe
    rows, recipes = distributed.own_rows(size), settings.recipes()
    how: dict[str, Any] = {"batch_size": size, "seed": seed, "monitor": monitor, "rows": rows}
    if settings.data is None:
        data = load_digits(**how, sides=[recipe.size for recipe in recipes])
    elif is_fashion_mnist(settings.data):
        data = load_fashion_mnist(settings.data, recipes=recipes, **how)
    else:
        data = load_images(settings, rows)
    return data if settings.evaluation else replace(data, final=None)


def first_state(settings: Settings, model: BarlowTwins, steps_per_epoch: int) -> TrainingState:
    """The model, its optimiser and the schedule of the whole run, before the first step."""
    rates = {"lr_weights": settings.learning_rate_weights, "lr_biases": settings.learning_rate_biases}
    lars = {"trust_coefficient": settings.trust_coefficient, "clip": settings.clip_trust}
    size, decay = settings.batch_size, settings.weight_decay
    optimizer = build_optimizer(settings.optimizer, model, batch_size=size, weight_decay=decay, **rates, **lars)
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    schedule = build_schedule(optimizer, settings.epochs * steps_per_epoch, warmup_steps)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.precision == "fp16")
    return TrainingState(model, optimizer, schedule, scaler, settings.device)


def introduce(now: Run) -> None:
    """Print what is about to be done, and what is worth a note."""
    settings, data = now.settings, now.data
    parameters = sum(parameter.numel() for parameter in now.state.model.parameters()) / 1e6
    processes = distributed.world_size()
    devices = f"{settings.device.type} in {processes} processes" if processes > 1 else f"{settings.device}"
    steps = f"{settings.epochs} epochs of {now.steps_per_epoch} steps of {settings.batch_size} images"
    how = f"{parameters:.2f} M parameters, {settings.optimizer}, {settings.precision} on {devices}"
    print(f"{data.name}: {data.images:,} images, {steps}")
    print(f"{settings.arch}, projector {settings.projector}: {how}; results go to {now.out}")
    for note in filter(None, [now.begun, *data.notes]):
        print(f"note: {note}")


def measure_before(now: Run) -> None:
    """What the images are worth without pretraining; then ready the model for training."""
    now.watched = from_main(lambda: looking.baselines(now, "monitor"))
    same = now.data.final is now.data.monitor
    now.compared = now.watched if same else from_main(lambda: looking.baselines(now, "final"))
    now.network = distributed.synchronized(now.state.model)  # from now on all processes have to call train()
    looking.draw(now)
    if now.settings.compile:
        now.network = torch.compile(now.network)


def pretrain(now: Run, requests: StopRequests) -> None:
    """Train; where that ends early, say why, and where the last checkpoint is."""
    try:
        train(now, requests)
    except (Exception, KeyboardInterrupt) as stop:
        there = now.checkpoint.exists()
        advice = f"the last checkpoint is {now.checkpoint}" if there else "no checkpoint had been written"
        why = first_line(stop) if isinstance(stop, Exception) else f"interrupted after step {now.state.step}"
        with contextlib.suppress(Aborted):  # a full disk, say
            looking.write_report(now, why)
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted(f"{why}; {advice}") from None
        if isinstance(stop, Aborted):
            raise Aborted(f"{why}; {advice}") from None
        raise


def train(now: Run, requests: StopRequests) -> None:
    """Pretrain from the state's step to the last one; all processes take every step, or leave it out, together."""
    settings, state, watch = now.settings, now.state, now.watch
    how = {"total": now.last_step, "initial": state.step, "disable": None if is_main() else True}  # None: no terminal
    skipped = 0
    with require("tqdm", "the progress bar").tqdm(**how, dynamic_ncols=True, bar_format=BAR) as bar:
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
                watch.end_step()
                skipped, unreadable = skipped + 1 if bad else 0, unreadable + broken
                check_health(now, epoch, unreadable, skipped)
                log(now, done, bar)
                number = arrived(signals)
                due = settings.save_every and state.step % settings.save_every == 0
                if number or (due and state.step % now.steps_per_epoch):
                    from_main(now.save)
                if number:
                    saved = f"after step {state.step}, saved in {now.checkpoint}: continue with --resume"
                    raise Stopped(f"stopped by {number.name} {saved}", number)
            finish_epoch(now, epoch, unreadable, bar)


def log(now: Run, done: Step, bar: Any) -> None:
    """Every tenth step as a row, and the progress bar."""
    settings, step = now.settings, now.state.step
    if (step - 1) % settings.log_every == 0 or step == now.last_step:
        z1, z2 = done.z1[: looking.LOGGED_PAIRS], done.z2[: looking.LOGGED_PAIRS]
        report = collapse_report(z1, z2, lambd=settings.lambd)
        row = {"step": step} | {name: value.item() for name, value in done.terms._asdict().items()}
        row |= {"effective_rank": min(report.effective_rank_1, report.effective_rank_2)}
        row |= {"dead_features": report.dead_features, "gradient_norm": done.gradient_norm.item()}
        row |= {"learning_rate": done.learning_rate, "images_per_second": now.watch.images_per_second}
        now.metrics.add("step", row)
        shown = {"loss": "loss", "on_diagonal": "on-diag", "off_diagonal": "off-diag", "effective_rank": "rank"}
        bar.set_postfix({label: row[name] for name, label in shown.items()}, refresh=False)
    bar.update()


def finish_epoch(now: Run, epoch: int, unreadable: int, bar: Any) -> None:
    """Save; where it is due, look at the held-out images and draw."""
    settings, state, watch = now.settings, now.state, now.watch
    row = {"step": state.step, "epoch": epoch + 1, "unreadable": unreadable}
    row |= {"images_per_second": watch.images_per_second, "waiting": watch.parts["data"] / watch.seconds}
    row |= {"seconds": watch.seconds}
    from_main(now.save)  # first: a look takes a while
    due = (epoch + 1) % settings.probe_every == 0 or state.step == now.last_step
    if due:
        accuracies = from_main(lambda: looking.accuracies(now, now.data.monitor))
        now.accuracies = now.watched | {"pretrained encoder": accuracies} if accuracies else {}
        row |= accuracies
    now.metrics.add("epoch", row)
    if due:
        looking.draw(now)
        looking.write_report(now, "running")
    if due or unreadable or (bar.disable and watch.seconds > 60):  # no bar shows that the run goes on
        bar.write(epoch_line(row, settings.epochs))
    if settings.profile:
        now.metrics.add("profile", {"step": state.step, "parts": watch.rows()})
        cells = [[part["part"], f"{part['milliseconds']:,.2f}", f"{part['share']:.1%}"] for part in watch.rows()]
        bar.write("\n" + aligned([["part", "mean ms", "share"], *cells]) + "\n")


def evaluate(now: Run) -> None:
    """What the encoder has become, beside pixels and initial weights; the encoder as a file of its own."""
    step, report = now.state.step, now.collapse
    checkpoint.save(now.out / BACKBONE, now.state.model.backbone.state_dict())
    now.metrics.add("report", {"step": step, **report.as_dict()})
    print(f"\nThe embeddings of {report.n} training pairs: {report.verdict}\n")
    if now.data.final:
        now.accuracies = now.compared | {"pretrained encoder": looking.accuracies(now, now.data.final)}
        for name, accuracies in now.accuracies.items():
            now.metrics.add("evaluation", {"step": step, "representation": name, **accuracies})
        print(aligned(accuracy_cells(now.accuracies)), end="\n\n")
    looking.write_report(now, "done")


if __name__ == "__main__":
    start(main)
