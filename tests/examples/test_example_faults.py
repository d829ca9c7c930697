"""The short form of the fault injection passes, and it fails where the program has a bug."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from programs import start

INJECT = Path(__file__).parents[1] / "faults" / "inject.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1000),  # a minute and a half on a quiet machine
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]


def inject(out: Path, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
    """Get the exit status, what is written of each kind, and all that was printed."""
    with start([sys.executable, INJECT, "--short", "--out", out, *flags], out.parent) as done:
        status = done.wait(900)
    return status, json.loads((out / "results.json").read_text()), done.output + done.errors


def test_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    status, results, printed = inject(tmp_path / "out")
    assert status == 0, printed
    assert len(results) >= 6
    assert sum(row["injected"] for row in results) >= 12
    for row in results:
        assert row["passed"]
        assert row["survived"] == row["injected"] > 0
        assert row["fault"] in (tmp_path / "out" / "table.md").read_text()


# What the suite must say of a program with the bug, by the kind of fault that finds it.
BUGS = {
    "saves-in-place": ("killed-save", "saves were acknowledged, and none is left"),
    "reads-without-checksum": ("damaged-checkpoint", "it was accepted"),
    "forgets-the-optimizer": ("other-workers", "are not those of the uninterrupted run"),
    "judges-alone": ("non-finite-loss", "the ranks' weights differ"),
    "replaces-at-random": ("corrupt-images", "are not those of the uninterrupted run"),
}


@pytest.mark.parametrize("bugs", [[*BUGS][:1], [*BUGS][1:]], ids=["a writer", "others"])
def test_a_bug_is_found(bugs: list[str], tmp_path: Path) -> None:
    """And the kind of fault that it does not touch is survived."""
    kinds = [BUGS[bug][0] for bug in bugs]
    status, results, printed = inject(tmp_path / "out", "--only", *kinds, "untrusted-checkpoint", "--bug", *bugs)
    assert status == 1, printed
    failures = {row["kind"]: row["failures"] for row in results if row["survived"] < row["injected"]}
    assert failures.keys() == {*kinds}
    for kind, noticed in (BUGS[bug] for bug in bugs):
        assert any(noticed in failure for failure in failures[kind])
