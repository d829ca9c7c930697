"""What is said in several files is said alike: the Pythons, the floor of torch, the version of ruff."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def found(pattern: str, path: str) -> list[str]:
    """Every match in a file of the repository; none is an error, or the comparison would be of nothing."""
    file = ROOT / path
    if not file.exists():
        pytest.skip(f"{path} is not part of a source distribution")
    matches = re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    assert matches, (pattern, path)
    return matches


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def declared() -> list[str]:
    return found(r'"Programming Language :: Python :: (3\.\d+)"', "pyproject.toml")


def test_the_pythons_that_are_declared_are_those_that_are_run():
    (runs,) = found(r"^PYTHONS +\?= (.+)$", "Makefile")
    assert re.findall(r"python(3\.\d+):", runs) == declared()
    assert found(r'^requires-python = ">=(.+)"$', "pyproject.toml") == declared()[:1]


def test_the_oldest_torch_that_is_declared_is_run():
    (floor,) = found(r'^dependencies = \["torch>=(.+)"\]$', "pyproject.toml")
    (runs,) = found(r"^PYTHONS +\?= (.+)$", "Makefile")
    releases = re.findall(r":(2[.\d]+)", runs)
    assert numbers(min(releases, key=numbers))[:2] == numbers(floor)


def test_the_workflow_runs_the_oldest_and_the_newest():
    cells = dict(found(r'python: "(3\.\d+)", torch: "([\d.]+)"', ".github/workflows/ci.yml"))
    assert [*cells] == [declared()[0], declared()[-1]]
    (runs,) = found(r"^PYTHONS +\?= (.+)$", "Makefile")
    assert cells.items() <= dict(re.findall(r"python(\S+):(\S+)", runs)).items()


def test_one_ruff():
    (pinned,) = found(r'"ruff==([\d.]+)"', "pyproject.toml")
    assert found(r"ruff-pre-commit\n +rev: v([\d.]+)", ".pre-commit-config.yaml") == [pinned]


def test_every_target_of_make_says_how_long_it_takes():
    """A target that is for people has a description, and it ends with a time."""
    phony = found(r"^\.PHONY: (.+)$", "Makefile")[0].split()
    described = dict(found(r"^([a-z-]+):.*?## (.+)$", "Makefile"))
    assert set(phony) == set(described)
    timeless = [name for name, text in described.items() if not re.search(r"second|minute|hour|time", text)]
    assert timeless == []


def test_the_targets_that_are_named_exist():
    targets = set(found(r"^\.PHONY: (.+)$", "Makefile")[0].split())
    for path in ("README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml", ".ci/run"):
        named = set(found(r"(?:^|`|run: )make ([a-z][a-z-]*)", path))
        assert named <= targets, path
