"""The planted bugs fit the code, and the planter tells the tests that notice a bug from those that do not."""

import ast
import json
import sys
from pathlib import Path

import pytest
from planted import MUTANTS, Mutant

from programs import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_replaces_one_text_and_is_a_program(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    planted = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))


def test_the_tests_beside_the_bugs_exist() -> None:
    paths = {path.partition("::")[0] for mutant in MUTANTS for path in mutant.near}
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) >= 66
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not (ROOT / ".git").exists(), reason="needs Linux and the repository")
def test_the_planter_tells_what_is_caught_from_what_survives(tmp_path: Path) -> None:
    """Both bugs meet one test, of the choice of the algorithm, which passes without them."""
    caught, missed = "primal-at-half-the-features", "noise-floor-over-n"
    planter, seen, out = ROOT / "tests/mutants/plant.py", "tests/test_plan.py", tmp_path / "rows.json"
    done = run([sys.executable, planter, "--only", caught, missed, "--near", seen, "--out", out], tmp_path)
    assert done.status == 1, done.errors
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert rows[caught]["tier"] == "fast"
    assert rows[caught]["failure"].startswith("tests/test_plan.py::test_auto_takes_the_dual")
    assert (rows[missed]["tier"], rows[missed]["failure"]) == (None, "SURVIVED")
