"""Torch's settings of how float32 is multiplied, the old and the new ones: the loss obeys each, and none breaks it."""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from programs import ROOT, Nursery, run

SETTINGS = (
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('medium'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
)
OLD_GETTERS = {"get_float32_matmul_precision", "allow_tf32"}  # raise once a new setting says something else
# Loss and gradients against float64, in units of the error of torch's own product under the setting.
PROGRAM = """
import contextlib, os, sys
import torch
from barlow_loss import _plan, barlow_twins_loss, standardize, vicreg_loss
exec(sys.argv[1])
if interpreted := os.environ.get("TRITON_INTERPRET") == "1":
    from repaired_interpreter import repaired
    _plan.choose_backend = lambda caller, backend, device: "triton"
torch.manual_seed(0)

def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()

def both(function, *views):
    for dtype in (torch.float32, torch.float64):
        leaves = [view.to(dtype, copy=True).requires_grad_() for view in views]
        value = function(*leaves)
        yield value.detach(), *torch.autograd.grad(value.square().sum(), leaves)

a, b = torch.randn(2, 300, 300).unbind()
unit = error(a @ b, a.double() @ b.double())
with repaired() if interpreted else contextlib.nullcontext():
    for n, d in ((24, 64), (64, 24)) if interpreted else ((512, 256), (64, 512)):
        z1 = torch.randn(n, d)
        z2 = z1 + 0.5 * torch.randn(n, d)
        for algorithm in ("primal", "dual"):
            own = lambda *views: barlow_twins_loss(*views, algorithm=algorithm)
            for got, expected in zip(*both(own, z1, z2)):
                assert error(got, expected) < 30 * unit, (n, d, algorithm, error(got, expected), unit)
        for function, views in ((vicreg_loss, (z1, z2)), (lambda z: standardize(z).tanh(), (z1,))):
            for got, expected in zip(*both(function, *views)):
                assert error(got, expected) < 30 * unit, (n, d, function, error(got, expected), unit)
print("right within 30 times", unit)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery("torch") as nursery:
        yield nursery


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_obeys_every_setting(setting: str, nursery: Nursery, tmp_path: Path) -> None:
    with nursery.start(["-c", PROGRAM, setting], tmp_path) as done:
        assert done.wait() == 0, done.errors
    assert done.output.startswith("right within")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("setting", SETTINGS[3:5])
def test_the_triton_backend_obeys_them(setting: str, tmp_path: Path) -> None:
    """In triton's interpreter: its matrix products are torch's."""
    paths = f"{ROOT}:{ROOT / 'tests' / 'kernels' / 'interpreted'}"
    done = run([sys.executable, "-c", PROGRAM, setting], tmp_path, TRITON_INTERPRET="1", PYTHONPATH=paths)
    assert done.status == 0, done.errors


def test_the_library_asks_for_no_setting() -> None:
    """On a GPU neither: a getter raises under some settings, and torch's products obey all by themselves."""
    for path in (ROOT / "barlow_loss").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not names & {*OLD_GETTERS, "fp32_precision"}, path
