"""One step: what it computes in parts, in low precision and twice, and that a step left out leaves no trace."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from outcomes import differences, rows, states
from torch import Tensor, nn

from barlow_loss import barlow_twins_loss
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.data import Batch
from barlow_recipes.digits import load_digits
from barlow_recipes.metrics import Metrics
from barlow_recipes.models import build_model
from barlow_recipes.optimization import build_optimizer, build_schedule
from barlow_recipes.settings import read_settings
from barlow_recipes.steps import Run, Stopwatch, apply, gradients

TWO_AND_TWO = [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
Program = Callable[..., tuple[int, str, str]]


def begin(line: str, tmp_path: Path) -> Run:
    settings = read_settings(f"--batch-size 32 --projector 32-16 --no-probe --device cpu {line}".split(), "")
    torch.manual_seed(0)
    model = build_model(settings.arch, settings.projector)
    rates = {"lr_weights": 0.1, "lr_biases": 0.1, "weight_decay": 0.0}
    optimizer = build_optimizer("sgd", model, batch_size=256, **rates)
    # The usual 2¹⁶ overflows in the first steps, and is halved until it does not.
    scaler = torch.amp.GradScaler("cpu", 2.0**8, enabled=settings.precision == "fp16")  # type: ignore[attr-defined]
    state = TrainingState(model, optimizer, build_schedule(optimizer, 1000, 0), scaler, settings.device)
    sides = [recipe.size for recipe in settings.recipes()]
    data = load_digits(settings.micro_batch_size, settings.seed, monitor=False, sides=sides)
    return Run(settings, data, state, tmp_path, Metrics(None), Stopwatch(settings.device, 32), model.train())


def gradient(now: Run) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in now.state.model.named_parameters() if p.grad is not None}


def test_what_an_encoder_draws_is_a_function_of_seed_step_and_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a resumed run draws as one that did not stop, on each process, and no two processes draw alike."""

    def drawn(rank: int = 0, step: int = 0, before: int = 0, flags: str = "") -> Tensor:
        now = begin(flags, tmp_path)
        now.network = nn.Sequential(now.state.model, nn.Dropout())
        monkeypatch.setattr("barlow_recipes.distributed.rank", lambda: rank)
        now.state.step = step
        torch.manual_seed(before)
        return gradients(now, now.data.pairs.batches(0)).z1 == 0

    assert torch.equal(drawn(), drawn(before=7))
    others = [drawn(rank=1), drawn(step=1), drawn(flags="--seed 1")]
    assert not any(torch.equal(drawn(), other) for other in others)


@pytest.mark.parametrize("views", ["", "--views 3", "--local-crops 2"])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_gradient_is_that_of_the_mean_of_the_parts_losses(parts: int, views: str, tmp_path: Path) -> None:
    now = begin(f"--accumulate {parts} --scale-loss 0.5 {views}", tmp_path)
    model = copy.deepcopy(now.state.model)
    done = gradients(now, now.data.pairs.batches(0))
    batches = islice(now.data.pairs.batches(0), parts)
    weights = {"": None, "--views 3": None, "--local-crops 2": TWO_AND_TWO}[views]
    losses = [barlow_twins_loss(*map(model, batch.views), pair_weights=weights) for batch in batches]
    mean = torch.stack(losses).mean()
    (0.5 * mean).backward()
    torch.testing.assert_close(done.terms.loss, mean.detach())
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, found in gradient(now).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
    norm = nn.utils.get_total_norm(list(gradient(now).values()))
    assert done.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert done.finite


def test_parts_are_not_the_large_batch(tmp_path: Path) -> None:
    """As the flag's help says: each part has a cross-correlation of its own."""
    whole, parts = (
        gradients(now, now.data.pairs.batches(0)) for now in (begin("", tmp_path), begin("--accumulate 4", tmp_path))
    )
    assert parts.terms.off_diagonal > 1.1 * whole.terms.off_diagonal


def broken(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        view1, view2 = batch.views
        yield Batch((view1 * float("nan"), view2), batch.unreadable)  # type: ignore[operator]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_left_out_leaves_no_trace(precision: str, tmp_path: Path) -> None:
    """Neither in the weights, nor in the momentum, nor in the running statistics, which the forward had moved."""
    now = begin(f"--precision {precision}", tmp_path)
    for batches in (now.data.pairs.batches(0), now.data.pairs.batches(1)):
        apply(now, good=gradients(now, batches).finite)
    before = copy.deepcopy(now.state.state_dict())
    done = gradients(now, broken(now.data.pairs.batches(2)))
    assert not done.finite
    assert not now.state.model.state_dict()["backbone.1.running_mean"].isfinite().all()
    apply(now, good=done.finite)
    after = now.state.state_dict()
    moved = {".".join(place.split(".")[:2]) for place in differences(before, after)}
    assert {place for place in moved if not place.startswith(("schedule.", "scaler."))} == {
        "step.", "optimizer.param_groups"  # the learning rate
    }  # fmt: skip
    assert now.state.scaler.get_scale() == (2.0**7 if precision == "fp16" else 1.0)
    (event,) = now.metrics.of_kind("event")
    assert (event["step"], event["text"]) == (3, "the loss or its gradient was not finite: the step was not applied")


def test_a_gradient_that_is_not_finite_counts_too(tmp_path: Path) -> None:
    """The loss is finite; one weight's gradient is made infinite on its way."""
    now = begin("", tmp_path)
    weight = now.state.model.backbone[0].weight  # type: ignore[index]
    weight.register_hook(lambda grad: grad * float("inf"))
    done = gradients(now, now.data.pairs.batches(0))
    assert done.terms.loss.isfinite()
    assert not done.finite


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_autocast_gives_nearly_the_gradient_of_float32(precision: str, tolerance: float, tmp_path: Path) -> None:
    """The tolerances are a few units of the formats' precision, 2⁻⁸ and 2⁻¹¹, for four layers of batch norms."""
    full, low = begin("", tmp_path), begin(f"--precision {precision}", tmp_path)
    first, second = (gradients(now, now.data.pairs.batches(0)) for now in (full, low))
    assert second.z1.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert second.terms.loss.item() == pytest.approx(first.terms.loss.item(), rel=tolerance)
    assert second.gradient_norm.item() == pytest.approx(first.gradient_norm.item(), rel=tolerance)
    assert second.gradient_norm != first.gradient_norm


@pytest.fixture
def quick(few_looks: None) -> tuple[object, ...]:
    """Five steps, and next to no looking at them."""
    return ("--epochs", 1, "--batch-size", 256, "--projector", "64-64", "--no-probe", "--log-every", 1)


LINES: dict[str, tuple[str, ...]] = {
    "bf16": ("--precision", "bf16"),
    "parts": ("--accumulate", "4", "--deterministic"),
    "more views": ("--views", "3", "--local-crops", "2"),
    "sgd": ("--optimizer", "sgd", "--learning-rate-weights", "0.01", "--learning-rate-biases", "0.01"),
    "lars": ("--optimizer", "lars", "--learning-rate-weights", "2", "--channels-last"),
}


@pytest.mark.parametrize("flags", LINES.values(), ids=LINES)
def test_every_way_of_training_learns_and_resumes_to_the_bit(
    flags: tuple[str, ...], quick: tuple[object, ...], run: Program
) -> None:
    assert run(*quick, *flags, "--out", "whole")[0] == 0
    steps = rows(Path("whole"), "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert run(*quick, *flags, "--out", "parts", "--limit-steps", 3)[0] == 0
    assert run(*quick, *flags, "--out", "parts", "--resume")[0] == 0
    assert differences(*states("whole", "parts")) == []


def test_the_scale_of_fp16_is_part_of_a_checkpoint(quick: tuple[object, ...], run: Program) -> None:
    """It is halved in every step that overflows; the run goes on with what it had become."""
    flags = (*quick, "--precision", "fp16", "--batch-size", 64, "--projector", "16-16", "--out", "out")
    assert run(*flags, "--limit-steps", 2)[0] == 0
    scale = states("out")[0]["scaler"]["scale"]  # type: ignore[index]
    left_out = len(rows(Path("out"), "event"))
    assert scale == 2.0**16 / 2**left_out
    assert run(*flags, "--limit-steps", 3, "--resume")[0] == 0
    assert states("out")[0]["scaler"]["scale"] == 2.0**16 / 2 ** len(rows(Path("out"), "event"))  # type: ignore[index]


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps(quick: tuple[object, ...], run: Program) -> None:
    """Up to rounding; and its checkpoint is that of the plain network."""
    assert run(*quick, "--out", "plain")[0] == 0
    assert run(*quick, "--out", "compiled", "--compile")[0] == 0
    plain, compiled = (rows(Path(folder), "step") for folder in ("plain", "compiled"))
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert compiled[-1]["loss"] == pytest.approx(
        plain[-1]["loss"], rel=0.02
    )  # AdamW divides tiny gradients by their size
    one, other = states("plain", "compiled")
    assert one["model"].keys() == other["model"].keys()  # type: ignore[attr-defined]


def test_a_profile_names_the_parts_of_a_step(quick: tuple[object, ...], run: Program) -> None:
    status, output, _ = run(*quick, "--batch-size", 128, "--profile", "--out", "out")
    assert status == 0
    assert "mean ms" in output
    (profile,) = rows(Path("out"), "profile")
    assert {part["part"] for part in profile["parts"]} == {  # type: ignore[attr-defined]
        "data", "forward", "loss", "backward", "optimizer", "other"
    }  # fmt: skip
