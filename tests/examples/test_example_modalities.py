"""The programs of examples/modalities: the trained encoder is better than the untrained one, by what the page says."""

import re
import sys
from pathlib import Path

import pytest

from programs import run

FOLDER = Path(__file__).parents[2] / "examples" / "modalities"
LEAST = {"spectrograms": 0.15, "tables": 0.06, "graphs": 0.03, "two_encoders": 0.4}  # gain; half of what was measured
pytestmark = pytest.mark.slow


def test_each_program_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(LEAST)


@pytest.mark.parametrize("name", LEAST)
def test_training_helps(name: str, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {name}; print('found', *{name}.main())"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.status == 0, done.errors
    before, after = map(float, re.findall(r"[\d.]+", done.output.rpartition("found")[2]))
    assert after - before > LEAST[name]
