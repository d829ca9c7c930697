"""Looking at a run: what its representations are worth, and what its embeddings correlate."""

import copy
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from barlow_loss import CollapseReport, collapse_report, cross_correlation
from barlow_loss.diagnostics import noise_floor
from barlow_recipes import pictures, probes
from barlow_recipes.data import Probe
from barlow_recipes.distributed import is_main, world_size
from barlow_recipes.encoders import build_encoder
from barlow_recipes.outputs import CROSS_CORRELATION, CURVES
from barlow_recipes.report import write_report
from barlow_recipes.run import Accuracies, Run
from barlow_recipes.views import finished

PICTURED_PAIRS, PICTURED_FEATURES = 1024, 128
LOGGED_PAIRS = 256  # of a process: with thousands the effective rank, in float64, takes as long as a step


def baselines(now: Run, name: Literal["monitor", "final"]) -> Accuracies:
    """What the images of a probe are worth without pretraining: as pixels, and behind the initial weights.

    A resumed run finds them in its metrics: for ImageNet they take minutes.
    """
    probe, device = now.data.final if name == "final" else now.data.monitor, now.settings.device
    rows = [row for row in now.metrics.of_kind("baseline") if row["probe"] == name]
    if probe and not rows:
        untrained = probes.untrained(random_backbone(now), probe.bank, device)
        for label, represent in {"raw pixels": probes.raw_pixels, "untrained encoder": untrained}.items():
            rows.append({"step": 0, "probe": name, "representation": label})
            rows[-1]["accuracies"] = probes.evaluate(represent, probe, device)
            now.metrics.add("baseline", rows[-1])
    return {row["representation"]: row["accuracies"] for row in rows}


def random_backbone(now: Run) -> nn.Module:
    """The encoder as it begins, or of a run that begins with other weights one with random weights."""
    settings = now.settings
    if now.begun is None:
        return now.state.model.backbone
    with torch.random.fork_rng(devices=[]):
        backbone = build_encoder(settings.arch, settings.stem, settings.channels, settings.image_size).module
    return backbone.to(settings.device)


def accuracies(now: Run, probe: Probe | None) -> dict[str, float]:
    """What the encoder is worth now."""
    return probes.evaluate(now.state.model.backbone.eval(), probe, now.settings.device) if probe else {}


@torch.no_grad()
def embeddings(now: Run) -> tuple[Tensor, Tensor]:
    """Both views of the first pairs, (N, D) each, as the loss sees them: with batch statistics."""
    model = copy.deepcopy(now.state.model).train()
    batches = islice(now.data.pairs.batches(epoch=0), -(-PICTURED_PAIRS // now.settings.micro_batch_size))
    device, pixels = now.settings.device, now.data.pixels
    pairs = [[model(finished(view, device, pixels)) for view in batch.views] for batch in batches]
    z1, z2 = map(torch.cat, zip(*pairs, strict=True))
    return z1, z2


def pictured_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """C of the first features: of thousands a picture shows none."""
    return cross_correlation(z1[:, :PICTURED_FEATURES], z2[:, :PICTURED_FEATURES])


def draw(now: Run) -> CollapseReport:
    """The curves and the correlation matrix as they are now; all processes take part."""
    z1, z2 = embeddings(now)
    now.collapse = collapse_report(z1, z2, lambd=now.settings.lambd)
    after = pictured_correlation(z1, z2)
    if is_main() and now.before is not None:
        n, d = now.settings.micro_batch_size, z1.shape[1]
        pictures.draw_cross_correlation(now.out / CROSS_CORRELATION, now.before, after, now.state.step)
        limits = {"noise_floor": noise_floor(n, d), "rank": min(n - 1, LOGGED_PAIRS * world_size() - 1, d)}
        pictures.draw_curves(now.out / CURVES, now.metrics, now.watched, lambd=now.settings.lambd, **limits)
    return now.collapse


def tell(now: Run, status: str) -> None:
    """The page that shows the run, with "running", "done" or what has stopped it."""
    if is_main():
        write_report(now, status)
