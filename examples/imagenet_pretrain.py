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
import yaml

from barlow_loss import collapse_report
from barlow_recipes import checkpoint, distributed, folders, reporting
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.command_line import plain, precision_notes
from barlow_recipes.data import PretrainingData
from barlow_recipes.digits import load_digits
from barlow_recipes.distributed import is_rank_zero, on_rank_zero
from barlow_recipes.encoders import freeze
from barlow_recipes.errors import Aborted, Interrupted, Stopped, first_line, require
from barlow_recipes.fashion_mnist import is_fashion_mnist, load_fashion_mnist
from barlow_recipes.images import load_images
from barlow_recipes.metrics import BAR, TensorBoard, WeightsAndBiases, accuracy_table, aligned, epoch_line
from barlow_recipes.models import BarlowTwins, build_model
from barlow_recipes.official import initialize, read_official, resume_official
from barlow_recipes.optimization import build_optimizer, build_schedule
from barlow_recipes.outputs import BACKBONE
from barlow_recipes.program import StopRequests, arrived, exit_status, start
from barlow_recipes.reporting import versions
from barlow_recipes.settings import BEFORE_MORE_VIEWS, Settings, read_settings
from barlow_recipes.steps import Run, Step, Stopwatch, apply, check_health, gradients


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: launch(read_settings(argv, __doc__ or "")))


def launch(settings: Settings) -> None:
    """Prepare, measure the baselines, pretrain, evaluate, draw."""
    if settings.show_settings:
        print(yaml.safe_dump(plain(settings, without=folders.FOR_THIS_START), sort_keys=False), end="")
        return
    started = time.perf_counter()
    require("matplotlib", "the curves")  # now, not hours later
    model = prepare_model(settings)
    data = load_data(settings)
    steps_per_epoch = len(data.pairs) // settings.accumulate
    state = first_state(settings, model, steps_per_epoch)
    name = data.name if settings.data is None else f"{data.name}-{settings.arch}"
    default = Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    wanted = folders.find(settings, default)
    theirs = read_official(wanted) if wanted else None
    saved = None if theirs else folders.load(wanted)
    if saved:
        saved.content["settings"] = BEFORE_MORE_VIEWS | saved.content["settings"]
    begun = None  # in words, where the weights come from if they are not random
    if theirs:
        begun = resume_official(theirs, state, settings.learning_rate_biases, steps_per_epoch)
    elif settings.init and not saved:
        begun = initialize(state.model, settings.init, settings.init_strict)
    device = settings.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    mirrors = {TensorBoard: settings.tensorboard, WeightsAndBiases: settings.wandb}
    opened = folders.opened(
        settings,
        default,
        settings.must_match() | {"images": data.images},
        saved,
        finished=BACKBONE,
        agreed={"the images of --data": data.fingerprint, "the weights that it begins with": begun},
        described={"device": chip, "data": data.name} | versions(),
        mirrors=[mirror for mirror, asked in mirrors.items() if asked],
    )
    with opened as (out, metrics), StopRequests() as requests:
        watch = Stopwatch(device, settings.batch_size, settings.profile)
        run = Run(settings, data, state, out, metrics, watch, network=model, begun=begun)
        introduce(run)
        measure_before(run)
        if saved:
            state.load_state_dict(saved.content)
        del saved
        pretrain(run, requests)
        if run.collapse is None:  # of a run that is resumed at its end
            reporting.draw(run)
        on_rank_zero(lambda: evaluate(run))
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
    rows, recipes = distributed.shard(size), settings.recipes()
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


def introduce(run: Run) -> None:
    """Print what is about to be done, and what is worth a note."""
    settings, data = run.settings, run.data
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters()) / 1e6
    processes = distributed.world_size()
    devices = f"{settings.device.type} in {processes} processes" if processes > 1 else f"{settings.device}"
    steps = f"{settings.epochs} epochs of {run.steps_per_epoch} steps of {settings.batch_size} images"
    how = f"{parameters:.2f} M parameters, {settings.optimizer}, {settings.precision} on {devices}"
    print(f"{data.name}: {data.images:,} images, {steps}")
    print(f"{settings.arch}, projector {settings.projector}: {how}; results go to {run.out}")
    notes = *data.notes, *precision_notes(run.state.device, settings.precision)
    for note in filter(None, [run.begun, *notes]):
        print(f"note: {note}")


def measure_before(run: Run) -> None:
    """What the images are worth without pretraining; then ready the model for training."""
    run.monitor_baselines = on_rank_zero(lambda: reporting.baselines(run, "monitor"))
    same = run.data.final is run.data.monitor
    run.final_baselines = run.monitor_baselines if same else on_rank_zero(lambda: reporting.baselines(run, "final"))
    run.network = distributed.data_parallel(run.state.model)  # from now on all processes have to call train()
    reporting.draw(run)
    if run.settings.compile:
        run.network = torch.compile(run.network)


def pretrain(run: Run, requests: StopRequests) -> None:
    """Train; where that ends early, say why, and where the last checkpoint is."""
    try:
        train(run, requests)
    except (Exception, KeyboardInterrupt) as stop:
        there = run.checkpoint.exists()
        advice = f"the last checkpoint is {run.checkpoint}" if there else "no checkpoint had been written"
        why = first_line(stop) if isinstance(stop, Exception) else f"interrupted after step {run.state.step}"
        with contextlib.suppress(Aborted):  # a full disk, say
            reporting.write_report(run, why)
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted(f"{why}; {advice}") from None
        if isinstance(stop, Aborted):
            raise Aborted(f"{why}; {advice}") from None
        raise


def train(run: Run, requests: StopRequests) -> None:
    """Pretrain from the state's step to the last one; all processes take every step, or leave it out, together."""
    settings, state, watch = run.settings, run.state, run.watch
    how = {
        "total": run.last_step,
        "initial": state.step,
        "disable": None if is_rank_zero() else True,
    }  # None: no terminal
    skipped = 0
    with require("tqdm", "the progress bar").tqdm(**how, dynamic_ncols=True, bar_format=BAR) as bar:
        while state.step < run.last_step:
            epoch, first = divmod(state.step, run.steps_per_epoch)
            unreadable = 0
            run.network.train()
            watch.begin_epoch()
            batches = run.data.pairs.batches(epoch, first * settings.accumulate)
            for _ in range(min(run.steps_per_epoch - first, run.last_step - state.step)):
                done = gradients(run, batches)
                bad, broken, *signals = distributed.all_reduce([not done.finite, done.unreadable, *requests.counts()])
                apply(run, good=not bad)
                watch.end_step()
                skipped, unreadable = skipped + 1 if bad else 0, unreadable + broken
                check_health(run, epoch, unreadable, skipped)
                log(run, done, bar)
                number = arrived(signals)
                due = settings.save_every and state.step % settings.save_every == 0
                if number or (due and state.step % run.steps_per_epoch):
                    on_rank_zero(run.save)
                if number:
                    saved = f"after step {state.step}, saved in {run.checkpoint}: continue with --resume"
                    raise Stopped(f"stopped by {number.name} {saved}", number)
            finish_epoch(run, epoch, unreadable, bar)


def log(run: Run, done: Step, bar: Any) -> None:
    """Every tenth step as a row, and the progress bar."""
    settings, step = run.settings, run.state.step
    if (step - 1) % settings.log_every == 0 or step == run.last_step:
        z1, z2 = done.z1[: reporting.LOGGED_PAIRS], done.z2[: reporting.LOGGED_PAIRS]
        report = collapse_report(z1, z2, lambd=settings.lambd)
        row = {"step": step} | {name: value.item() for name, value in done.terms._asdict().items()}
        row |= {"effective_rank": min(report.effective_rank_1, report.effective_rank_2)}
        row |= {"dead_features": report.dead_features, "gradient_norm": done.gradient_norm.item()}
        row |= {"learning_rate": done.learning_rate, "images_per_second": run.watch.images_per_second}
        run.metrics.add("step", row)
        shown = {"loss": "loss", "on_diagonal": "on-diag", "off_diagonal": "off-diag", "effective_rank": "rank"}
        bar.set_postfix({label: row[name] for name, label in shown.items()}, refresh=False)
    bar.update()


def finish_epoch(run: Run, epoch: int, unreadable: int, bar: Any) -> None:
    """Save; where it is due, look at the held-out images and draw."""
    settings, state, watch = run.settings, run.state, run.watch
    row = {"step": state.step, "epoch": epoch + 1, "unreadable": unreadable}
    row |= {"images_per_second": watch.images_per_second, "waiting": watch.parts["data"] / watch.seconds}
    row |= {"seconds": watch.seconds}
    on_rank_zero(run.save)  # first: a look takes a while
    due = (epoch + 1) % settings.probe_every == 0 or state.step == run.last_step
    if due:
        accuracies = on_rank_zero(lambda: reporting.accuracies(run, run.data.monitor))
        run.accuracies = run.monitor_baselines | {"pretrained encoder": accuracies} if accuracies else {}
        row |= accuracies
    run.metrics.add("epoch", row)
    if due:
        reporting.draw(run)
        reporting.write_report(run, "running")
    if due or unreadable or (bar.disable and watch.seconds > 60):  # no bar shows that the run goes on
        bar.write(epoch_line(row, settings.epochs))
    if settings.profile:
        run.metrics.add("profile", {"step": state.step, "parts": watch.rows()})
        cells = [[part["part"], f"{part['milliseconds']:,.2f}", f"{part['share']:.1%}"] for part in watch.rows()]
        bar.write("\n" + aligned([["part", "mean ms", "share"], *cells]) + "\n")


def evaluate(run: Run) -> None:
    """What the encoder has become, beside pixels and initial weights; the encoder as a file of its own."""
    step, report = run.state.step, run.collapse
    checkpoint.save(run.out / BACKBONE, run.state.model.backbone.state_dict())
    run.metrics.add("report", {"step": step, **report.as_dict()})
    print(f"\nThe embeddings of {report.n} training pairs: {report.verdict}\n")
    if run.data.final:
        run.accuracies = run.final_baselines | {"pretrained encoder": reporting.accuracies(run, run.data.final)}
        for name, accuracies in run.accuracies.items():
            run.metrics.add("evaluation", {"step": step, "representation": name, **accuracies})
        print(accuracy_table(run.accuracies), end="\n\n")
    reporting.write_report(run, "done")


if __name__ == "__main__":
    start(main)
