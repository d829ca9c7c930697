"""The command line: presets, what overrides them, and what is refused."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from barlow_recipes.command_line import INSTRUCTIONS, best_precision, plain, precision_notes
from barlow_recipes.errors import UsageError
from barlow_recipes.settings import PRESETS, WORLD_SIZE_OF_THE_OFFICIAL_RUN, Settings, read_settings


def settings(line: str = "") -> Settings:
    return read_settings(line.split(), "")


def test_the_data_choose_the_preset() -> None:
    assert settings().preset == "digits"
    assert settings("--data fashion-mnist").preset == "fashion-mnist"
    assert settings("--data images").preset == "one-gpu"
    assert settings("--data images --preset cifar").preset == "cifar"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_gives_every_number_and_a_flag_overrides_one(name: str) -> None:
    data = "" if name == "digits" else "--data images"
    chosen = settings(f"{data} --preset {name}")
    for key, value in PRESETS[name].items():
        assert getattr(chosen, key) == value
    assert chosen.warmup_epochs == min(PRESETS[name].get("warmup_epochs", 10), chosen.epochs / 10)
    changed = settings(f"{data} --preset {name} --lambd 0.01 --epochs 7 --projector 32-16 --batch-size 64")
    assert (changed.lambd, changed.epochs, changed.projector, changed.batch_size) == (0.01, 7, "32-16", 64)


def test_the_views_are_the_published_ones_unless_told_otherwise() -> None:
    first, second = settings("--data images --preset paper").recipes()
    assert (first.blur, second.blur) == (1.0, 0.1)
    assert (first.solarize, second.solarize) == (0.0, 0.2)
    assert first.crop_scale == second.crop_scale == (0.08, 1.0)
    assert settings("--data images --crop-scale 0.2").recipes()[1].crop_scale == (0.2, 1.0)


def test_more_views_and_local_crops_take_the_two_recipes_in_turns() -> None:
    chosen = settings("--data images --views 3 --local-crops 2 --local-size 64 --blur 0.5 0.25")
    recipes = chosen.recipes()
    assert [recipe.blur for recipe in recipes] == [0.5, 0.25, 0.5, 0.5, 0.25]
    assert [recipe.size for recipe in recipes] == [None] * 3 + [64] * 2
    assert [recipe.crop_scale for recipe in recipes] == [(0.08, 1.0)] * 3 + [(0.05, 0.4)] * 2
    assert recipes[:2] == settings("--data images --blur 0.5 0.25").recipes()


def test_local_crops_are_compared_with_the_views_alone() -> None:
    assert settings("--local-crops 2").pair_weights() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert settings("--views 3 --local-crops 1").pair_weights() == [[float(i != j) for j in range(4)] for i in range(4)]
    assert settings("--views 4").pair_weights() is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--solarize 0.5 0.5", "on the digits"),
        ("--crop-scale 0.5", "on the digits"),
        ("--color-jitter 0 0 0 0", "on the digits"),
        ("--image-size 32", "on the digits"),
        ("--stem cifar", "on the digits"),
        ("--mean 0.2", "on the digits"),
        ("--value-range 0 3", "on the digits"),
        ("--augment-on device", "on the digits"),
        ("--local-size 4", "without --local-crops"),
        ("--data images --local-crop-scale 0.1 0.2", "without --local-crops"),
        ("--trust-coefficient 5", "with --optimizer adamw"),
        ("--data images --preset cifar-sgd --clip-trust", "with --optimizer sgd"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(line: str, reason: str) -> None:
    flag = [word for word in line.split() if word.startswith("--")][-1]
    with pytest.raises(UsageError, match=f"^{flag}: expected it to be left out, it changes nothing {reason}"):
        settings(line)


def test_such_a_flag_with_its_usual_value_is_taken() -> None:
    """As the settings of a run have it."""
    usual = settings("--image-size 8 --local-size 6 --trust-coefficient 0.001 --no-clip-trust --stem imagenet")
    assert usual.must_match() == settings().must_match()


def test_what_local_crops_are_like_shapes_a_run_that_has_some() -> None:
    assert settings("--local-size 4 --local-crops 1").must_match() != settings("--local-crops 1").must_match()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch-size 256", 0.4),
        ("--batch-size 1024", 0.25),
        ("--batch-size 256 --learning-rate-weights 0.9", 0.9),
        ("--preset paper", 0.2),
    ],
)
def test_a_small_batch_gets_the_authors_learning_rate(line: str, expected: float) -> None:
    assert settings(f"--data images {line}").learning_rate_weights == expected


def test_the_warm_up_is_a_tenth_of_a_short_run() -> None:
    assert settings("--data images").warmup_epochs == 10
    assert settings("--data images --epochs 30").warmup_epochs == 3
    assert settings("--data images --preset paper --epochs 30").warmup_epochs == 3
    assert settings("--data images --preset paper --epochs 30 --warmup-epochs 10").warmup_epochs == 10
    assert settings("--data images --preset paper").warmup_epochs == 10


def test_accumulation_divides_the_batch() -> None:
    assert settings("--batch-size 120 --accumulate 4").micro_batch_size == 30
    with pytest.raises(UsageError, match="--accumulate 7: expected a divisor of --batch-size 128"):
        settings("--accumulate 7")
    with pytest.raises(UsageError, match="--batch-size 4: expected 8 or more"):
        settings("--batch-size 4 --accumulate 4")


def test_where_a_run_takes_place_does_not_shape_it() -> None:
    first = settings("--data a --workers 1 --compile --channels-last --backend eager --out x --profile")
    second = settings(
        "--data b --workers 2 --save-every 3 --tensorboard --log-every 1 --loader-timeout 5 --deterministic"
    )
    assert first.must_match() == second.must_match()
    assert first.must_match() != settings("--data a --seed 1").must_match()
    assert first.must_match() != settings("--data a --accumulate 2").must_match()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset huge", "--preset huge: expected one of digits, fashion-mnist, one-gpu, paper"),
        ("--data images --blur 1 2", "--blur 2.0: expected a number from 0 to 1"),
        ("--data images --solarize 0.5", "Missing value for argument '--solarize'. Expected 2 values."),
        (
            "--data images --stem round",
            "invalid choice 'round' for argument '--stem'. Expected one of ('imagenet', 'cifar').",
        ),
        (
            "--data images --augment-on moon",
            "invalid choice 'moon' for argument '--augment-on'. Expected one of ('workers', 'device').",
        ),
        ("--data images --mean nan 0 0", "--mean nan 0.0 0.0: expected finite numbers"),
        ("--data images --value-range 0 inf", "--value-range 0.0 inf: expected finite numbers"),
        ("--data images --init-strict", "--init-strict: expected --init"),
        ("--views 1", "--views 1: expected a whole number ≥ 2"),
        ("--local-crops 2 --local-size 9", "--local-size 9: expected at most --image-size 8"),
        ("--local-crop-scale 0.4 0.1", "--local-crop-scale 0.4 0.1: expected the lower share first"),
        ("--save-every 0", "--save-every 0: expected a whole number ≥ 1"),
        ("--loader-timeout -1", "--loader-timeout -1: expected a whole number ≥ 1"),
        ("--preset paper", "--arch resnet50: digits-cnn goes with the digits, every other encoder with --data"),
        ("--arch resnet50", "--arch resnet50: digits-cnn goes with the digits"),
        ("--epochs 5 --warmup-epochs 5", "--warmup-epochs 5: expected less than --epochs 5"),
        ("--backend abacus", "for argument '--backend'. Expected one of ('auto', 'eager', 'triton')."),
        ("--data images --compile --chunk-size 8", "--compile: expected it without --chunk-size"),
        ("--epochs many", "Error parsing --epochs: invalid literal for int() with base 10: 'many'"),
    ],
)
def test_a_bad_value_is_named(line: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        settings(line)
    assert message in str(error.value)


def test_a_run_can_be_begun_from_the_settings_of_another(tmp_path: Path) -> None:
    line = "--data images --preset cifar --blur 0.5 0.25 --no-probe --save-every 7 --freeze conv1 --mean 0.5 0.4 0.3"
    first = settings(line)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(plain(first, without=("device", "out", "overwrite", "resume"))))
    assert settings(f"--settings {path}") == first
    assert settings(f"--settings {path} --seed 3") == replace(first, seed=3)
    assert settings(f"--seed 3 --settings {path}") == replace(first, seed=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 7", "Unrecognized options: --epoch, 7"),
        ("epochs: 0", "--epochs 0: expected a whole number ≥ 1"),
        ("- 7", "expected names and values"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used(content: str | None, message: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        settings(f"--settings {tmp_path / 'run.yaml'}")


def test_help_shows_the_numbers_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--data images --preset cifar-sgd --help")
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "learning-rate-weights FLOAT of matrices and kernels, per 256 pairs (default: 0.12)" in told
    assert "passes over the images (default: 200)" in told
    assert "--settings FILE" in told


def test_the_presets_differ_by_the_world_size_alone() -> None:
    paper, for_16 = (asdict(Settings(**PRESETS[name])) for name in ("paper", "official-16"))
    assert WORLD_SIZE_OF_THE_OFFICIAL_RUN == 16
    assert for_16["learning_rate_biases"] == pytest.approx(3.0e-4)
    assert for_16["weight_decay"] == pytest.approx(1.6e-5)
    changed = {name for name in paper if paper[name] != for_16[name]}
    assert changed == {"learning_rate_biases", "weight_decay"}
    published = {"batch_size": 2048, "epochs": 1000, "warmup_epochs": 10.0, "learning_rate_weights": 0.2}
    published |= {"learning_rate_biases": 0.0048, "weight_decay": 1e-6, "lambd": 0.0051, "arch": "resnet50"}
    published |= {"projector": "8192-8192-8192", "trust_coefficient": 0.001, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)}
    published |= {"color_jitter": (0.4, 0.4, 0.2, 0.1), "grayscale": 0.2}
    published |= {"image_size": 224, "crop_scale": 0.08, "optimizer": "lars"}
    assert published.items() <= paper.items()


PROCESSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "old": ({"cpu_name": "An old one", "architecture": "x86_64", "avx2": True, "avx512_bf16": False}, ("bf16", "fp16")),
    "with bf16": ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": False}, ("fp16",)),
    "with both": ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": True}, ()),
    "Arm": ({"architecture": "arm64", "bf16": True, "fp16_arith": True}, ()),
    "unknown": ({}, ("bf16", "fp16")),
}


@pytest.mark.parametrize(("found", "slow"), PROCESSORS.values(), ids=PROCESSORS)
def test_a_precision_without_instructions_is_told(
    found: dict[str, Any], slow: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    cpu = torch.device("cpu")
    for precision in ("fp32", "bf16", "fp16"):
        notes = precision_notes(cpu, precision)
        assert len(notes) == (precision in slow)
        assert not precision_notes(torch.device("cuda"), precision)
        for note in notes:
            assert note.startswith(
                f"--precision {precision} can be several times slower than fp32 here: this processor ("
            )
            assert f"({found.get('cpu_name', found.get('architecture', 'unknown'))}) has no instructions for it" in note
    assert best_precision(cpu) == settings("--data images --device cpu").precision == "fp32"


def test_torch_names_what_a_processor_has() -> None:
    """The names are torch's, or the note would come with every processor."""
    found = torch.cpu.get_capabilities()
    own = {"x86_64": {"avx512_bf16", "amx_bf16", "avx512_fp16"}, "arm64": {"bf16", "fp16_arith"}}
    known = own.get(found["architecture"], set())
    assert known <= found.keys()
    assert known <= {name for names in INSTRUCTIONS.values() for name in names}
