"""The example's folder on the path, and the data that its tests share."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from outcomes import EXAMPLES, IMPORTED

from programs import Nursery

# Without the example's packages (pip install --group examples) there is nothing to test here.
NEEDED = (
    "PIL",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "numpy",
    "safetensors",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "tqdm",
)
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Call the program with flags, in an empty folder; get its exit status, its output and its errors."""
    from imagenet_pretrain import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(*flags: object) -> tuple[int, str, str]:
        status = main([str(flag) for flag in flags])
        output, errors = capsys.readouterr()
        return status, output, errors

    return call


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes take a moment, and their accuracy is a matter of luck; no pictures are drawn."""
    from barlow_recipes import probes, reporting

    monkeypatch.setattr(probes, "DRAWS", 2)
    monkeypatch.setattr(reporting, "PICTURED_PAIRS", 64)
    for draw in ("draw_curves", "draw_cross_correlation"):
        monkeypatch.setattr(reporting, draw, lambda *_, **__: None)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts programs as forks of one process, which has imported what pretraining needs."""
    with Nursery(*IMPORTED, path=[EXAMPLES]) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty JPEG files each, reddish and bluish, under train/; one of them is cut off in the middle."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data") / "flowers"
    generator = torch.Generator().manual_seed(0)
    for name, color in {"poppy": (180, 40, 40), "bluebell": (40, 40, 180)}.items():
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(20):
            noise = torch.randint(-40, 40, (3, 40, 48), generator=generator)
            image = (torch.tensor(color).view(3, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.jpg", quality=90)
    broken = root / "train" / "poppy" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    return root
