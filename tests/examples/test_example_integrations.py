"""The programs of examples/integrations train, each in its framework: the loss falls."""

import csv
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from programs import run

FOLDER = Path(__file__).parents[2] / "examples" / "integrations"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NEEDS = {"plain_pytorch": "torchvision", "ddp": "sklearn", "with_accelerate": "accelerate", "with_lightly": "lightly"}
NEEDS |= {"with_lightning": "lightning", "with_timm": "timm"}
SHORT = "import sys; sys.path.insert(0, {folder!r}); import {name}; print('losses', {name}.main({settings}))"
pytestmark = pytest.mark.slow


def losses_of(name: str, settings: str, folder: Path) -> list[float]:
    """Of every step, from the program's own main."""
    done = run([sys.executable, "-c", SHORT.format(folder=str(FOLDER), name=name, settings=settings)], folder)
    assert done.status == 0, done.errors
    return [float(loss) for loss in re.findall(r"[\d.]+", done.output.rpartition("losses [")[2])]


def test_each_program_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [("plain_pytorch", "epochs=1", 14), ("with_accelerate", "", 28), ("with_lightly", "", 30), ("with_timm", "15", 15)],
)
def test_the_loss_falls(name: str, settings: str, steps: int, tmp_path: Path) -> None:
    if not find_spec(NEEDS[name]):
        pytest.skip(f"{NEEDS[name]} is not installed")
    losses = losses_of(name, settings, tmp_path)
    assert len(losses) == steps
    assert losses[-1] < 0.7 * losses[0]


def test_two_processes_have_the_loss_of_all_rows(tmp_path: Path) -> None:
    done = run([*TORCHRUN, FOLDER / "ddp.py"], tmp_path)
    assert done.status == 0, done.errors
    first, second = map(float, re.findall(r"epoch \d: loss ([\d.]+)", done.output))
    assert second < first


def test_accelerate_starts_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"
    done = run([sys.executable, "-m", *launch, FOLDER / "with_accelerate.py"], tmp_path, ACCELERATE_USE_CPU="1")
    assert done.status == 0, done.errors
    first, second = map(float, re.findall(r"epoch \d: loss ([\d.]+)", done.output))
    assert second < first


def test_lightning_logs_the_report_of_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import with_lightning; "
        "from lightning.pytorch.loggers import CSVLogger; settings = {'enable_checkpointing': False}; "
        "with_lightning.main(logger=CSVLogger('.', name='logs', version='1'), **settings)"
    )
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.status == 0, done.errors
    rows = list(csv.DictReader((tmp_path / "logs" / "1" / "metrics.csv").open()))
    losses = [float(row["loss"]) for row in rows if row.get("loss")]
    assert losses[-1] < 0.7 * losses[0]
    ranks = [float(row[name]) for row in rows for name in row if name.endswith("effective_rank_1") and row[name]]
    assert len(ranks) == 3  # of steps 0, 10 and 20
    assert all(1 < rank <= 127 for rank in ranks)
