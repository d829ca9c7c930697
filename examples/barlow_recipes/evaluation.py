"""One run of a program: its encoder, its folder, what it has found out, and how it goes on after an end."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from barlow_recipes import checkpoint, distributed, reporting
from barlow_recipes.distributed import from_main, is_main
from barlow_recipes.encoders import Encoder, build_encoder
from barlow_recipes.errors import UsageError, first_line
from barlow_recipes.labelled import Tree
from barlow_recipes.lock import locked
from barlow_recipes.metrics import Metrics
from barlow_recipes.options import RANDOM, Options
from barlow_recipes.weights import digest, load_encoder

OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, or --precision bf16"
PARTS = {"settings", "results", "step"}  # of a checkpoint; of one amid a protocol there are more
OF_PRETRAINING = (reporting.REPORT, reporting.BACKBONE, *reporting.PICTURES)
Result = dict[str, Any]


@dataclass
class Run:
    """What the protocols have in common, and what there is already."""

    options: Options
    encoder: Encoder
    tree: Tree
    out: Path
    metrics: Metrics
    settings: dict[str, Any]  # all that a checkpoint must share with the run that it continues
    results: dict[str, Result] = field(default_factory=dict)  # of the protocols that are done
    step: int = 0  # epochs so far, of all protocols
    begun: dict[str, Any] | None = None  # the checkpoint of a protocol that is not done

    def save(self, **state: Any) -> None:
        state |= {"settings": self.settings, "results": self.results, "step": self.step}
        checkpoint.save(self.out / reporting.CHECKPOINT, state, keep_previous=True)

    def finish(self, name: str, result: Result) -> None:
        """Keep the result of a protocol that is done."""
        self.results[name] = result
        from_main(self.save)


def find_encoder(options: Options) -> Encoder:
    """The encoder of --weights, on the device and in eval().

    Raises:
        UsageError: it cannot be loaded, or does not take photographs of --image-size.
    """
    torch.manual_seed(options.seed)
    if options.weights == RANDOM:
        encoder = build_encoder(options.arch or "resnet50", options.stem or "imagenet")
    else:
        encoder = load_encoder(Path(options.weights), options.arch, options.stem)
    if encoder.arch == "digits-cnn":
        raise UsageError(f"--weights {options.weights}: expected an encoder of photographs, got digits-cnn")
    encoder = encoder._replace(module=encoder.module.to(options.device).eval())
    _try(encoder, options)
    return encoder


@torch.no_grad()
def _try(encoder: Encoder, options: Options) -> None:
    """Some, such as transformers, take images of one size alone."""
    side, expected = options.image_size, (2, encoder.features)
    try:
        found = encoder.module(torch.zeros(2, 3, side, side, device=options.device))
    except (AssertionError, RuntimeError, ValueError) as error:  # each architecture has its own way to say no
        raise UsageError(f"--image-size {side}: {encoder.arch} cannot take such images ({first_line(error)})") from None
    if (shape := tuple(getattr(found, "shape", ()))) != expected:
        raise UsageError(f"--arch {encoder.arch}: expected features of shape {expected} for two images, got {shape}")


def settings_of(options: Options, tree: Tree, encoder: Encoder) -> dict[str, Any]:
    """What decides about the results of every protocol, in plain values."""
    return options.shaping() | {"images of --data": tree.fingerprint(), "--weights": digest(encoder.module)}


@contextlib.contextmanager
def opened(options: Options, encoder: Encoder, tree: Tree, settings: dict[str, Any], default: Path) -> Iterator[Run]:
    """A new run in its output folder, or the one that --resume continues.

    Args:
        options: of the command line.
        encoder: to be evaluated; it stays as it is.
        tree: the images.
        settings: all that shapes the results.
        default: the output folder without --out.

    Raises:
        UsageError: the processes or the checkpoint do not agree with them, or the folder is taken or cannot be written.
    """
    wanted = from_main(lambda: reporting.find_checkpoint(options.resume, options.out, default))
    saved, resumed = checkpoint.load(wanted, PARTS) if wanted else (None, None)
    source = f"step {saved['step']} of {resumed}" if saved else "none"
    distributed.require_agreement({"the checkpoint": source} | {name: str(value) for name, value in settings.items()})
    if saved and resumed:
        checkpoint.check_settings(resumed, saved["settings"], settings)
    asked = {"overwrite": options.overwrite, "resume": options.resume, "resumed": resumed}
    out = from_main(lambda: output_folder(options.out, default, **asked))
    with contextlib.ExitStack() as stack:
        continues = resumed is not None and resumed.parent.resolve() == out.resolve()
        if is_main():
            stack.enter_context(locked(out))
            if not continues:
                _clear(out)
        step = saved["step"] if saved else 0
        metrics = Metrics(out if is_main() else None, resumed if is_main() else None, step)
        run = Run(options, encoder, tree, out, metrics, settings)
        environment = {"device": str(options.device), "processes": distributed.world_size(), "torch": torch.__version__}
        metrics.add("settings", settings | environment | {"command": sys.argv[1:]})
        if saved and wanted and resumed:
            _resume(run, saved, wanted, resumed)
        yield run


def output_folder(
    out: Path | None, default: Path, *, overwrite: bool, resume: str | None, resumed: Path | None
) -> Path:
    """Make the folder of --out, as :func:`.reporting.make_output_folder`, but never of a pretraining run.

    A run that ended before its first checkpoint has nothing to resume, and nothing to lose.

    Raises:
        UsageError: the folder holds other files, or cannot be made or written.
    """
    asked = out or default
    overwrite = overwrite or (resume == "auto" and resumed is None and not (asked / reporting.RESULTS).exists())
    if overwrite and (taken := _of_pretraining(asked)):
        raise UsageError(f"--out {asked}: holds a pretraining run ({taken[0]}). Choose another folder")
    return reporting.make_output_folder(out, default, overwrite=overwrite, resumed=resumed)


def _of_pretraining(folder: Path) -> list[str]:
    """The files there that a pretraining run wrote; of one that was stopped the checkpoints are all there is."""
    taken = [name for name in OF_PRETRAINING if (folder / name).exists()]
    for name in reporting.CHECKPOINTS:
        with contextlib.suppress(OSError, ValueError):
            content = checkpoint.read(folder / name)
            settings = content.get("settings") if isinstance(content, dict) else None
            taken += [name] if isinstance(settings, dict) and "projector" in settings else []
    return taken


def _clear(out: Path) -> None:
    for name in (reporting.METRICS, reporting.RESULTS, *reporting.CHECKPOINTS, reporting.DAMAGED):
        (out / name).unlink(missing_ok=True)


def _resume(run: Run, saved: dict[str, Any], wanted: Path, found: Path) -> None:
    run.results, run.step = saved["results"], saved["step"]
    run.begun = saved if "model" in saved else None
    print(f"continuing from {found}, after epoch {run.step} of all")
    if found != wanted and is_main():
        print(f"warning: {wanted} is damaged or missing: going on from {found}, the one before it", file=sys.stderr)
        if wanted.parent.resolve() == run.out.resolve():
            checkpoint.set_aside(wanted)


def introduction(run: Run) -> str:
    """What is about to be evaluated, where, on what."""
    tree, options, processes = run.tree, run.options, distributed.world_size()
    devices = f"{options.device.type} in {processes} processes" if processes > 1 else f"{options.device}"
    return (
        f"{tree.name}: {len(tree.classes):,} classes, {len(tree.train):,} images to train on and "
        f"{len(tree.validation):,} to validate on\n"
        f"{run.encoder.arch}, {run.encoder.source}: {options.precision} on {devices}; results go to {run.out}"
    )


def write_results(run: Run) -> None:
    """results.json, and a row of metrics for each protocol."""
    for name, result in run.results.items():
        run.metrics.add("evaluation", {"step": run.step, "protocol": name, **result})
    encoder = {"weights": run.encoder.source, "arch": run.encoder.arch, "stem": run.encoder.stem}
    facts = {**encoder, "data": str(run.options.data), "settings": run.settings, "protocols": run.results}
    with reporting.replacing(run.out / reporting.RESULTS) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
