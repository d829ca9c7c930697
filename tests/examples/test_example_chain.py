"""From images to a published encoder by the programs themselves, for encoders that no part of them knows by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import rows
from test_example_models import FAMILIES

Run = Callable[..., tuple[int, str, str]]
ONE_STEP = ("--image-size", 64, "--batch-size", 8, "--projector", "32-32", "--limit-steps", 1, "--epochs", 1)
QUICK = ("--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in train/ and val/, eight images of each."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("chain") / "photographs", torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for number, name in enumerate(("poppy", "bluebell")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for image in range(8):
                pixels = torch.randint(100 * number, 100 * number + 150, (80, 72, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{image}.png")
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
def test_an_encoder_of_timm_from_images_to_its_files(
    arch: str, run: Run, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import export_backbone
    import imagenet_evaluate

    flags = ("--data", photographs, "--arch", f"timm/{arch}", *ONE_STEP, *QUICK, "--no-probe", "--out", "run")
    status, output, errors = run(*flags)
    assert status == 0, errors
    assert f"timm/{arch}" in output
    assert rows(Path("run"), "step")[0]["gradient_norm"] > 0

    evaluated = ("--data", photographs, "--weights", "run", "--protocols", "knn", "--image-size", 64, *QUICK)
    assert imagenet_evaluate.main([*map(str, evaluated), "--neighbours", "3", "--out", "evaluation"]) == 0
    assert json.loads(Path("evaluation/results.json").read_text())["protocols"]["knn"]["top1"] >= 50

    assert export_backbone.main(["--weights", "run", "--out", "export"]) == 0
    assert {path.name for path in Path("export").iterdir()} == {"README.md", "backbone.safetensors", f"{arch}.pth"}
    capsys.readouterr()
