"""What a step costs the host, counted and not timed: at small sizes it costs what its operations cost to start."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import barlow_loss
from barlow_loss import BarlowTwinsLoss

PACKAGE = str(Path(barlow_loss.__file__).parent)
# One block of the cache; the dual and the primal.
SHAPES = [(4, 16), (64, 256), (64, 2048), (64, 32), (256, 256)]


class Operations(TorchDispatchMode):
    """The names of all operations that torch dispatches, views and the autograd engine's own included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _views(n, d, dtype=torch.float32):
    return [torch.randn(n, d, dtype=dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_a_step_is_few_operations(n, d):
    """Forward and backward; 150 before this was counted, the textbook's 72."""
    loss_fn, views = BarlowTwinsLoss(), _views(n, d)
    with Operations() as operations:
        loss_fn(*views).backward()
    most = 55 if 2 * n <= d else 60  # two of the primal's add up the gradients of the test's leaves
    assert len(operations.names) <= most, operations.names


def test_sixteen_bits_cost_only_their_conversions():
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        views = _views(32, 128, dtype)
        with Operations() as operations:
            BarlowTwinsLoss()(*views).backward()
        counts.append(len(operations.names))
    assert counts[1] <= counts[0] + 6, counts


def test_a_forward_is_few_python_calls():
    """Of functions of the package; a call costs 0.1 to 0.5 µs, and 40 of them were 1 % of a step at 64×2048."""
    loss_fn, views, calls = BarlowTwinsLoss(), _views(64, 256), []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_name)

    loss_fn(*views)
    sys.setprofile(note)
    loss_fn(*views)
    sys.setprofile(None)
    assert len(calls) <= 40, calls


def test_nothing_of_a_step_looks_at_signatures(monkeypatch):
    """torch.autograd.Function binds the signature of a forward without ctx in every call, which takes 30 µs."""
    monkeypatch.setattr("inspect.signature", None)
    BarlowTwinsLoss()(*_views(8, 32)).backward()


def test_the_plan_is_made_once():
    """And again where anything that it depends on changes."""
    remembered = barlow_loss._plan._remembered
    remembered.cache_clear()
    for n, d, dtype, settings in [
        (8, 32, torch.float32, {}),
        (9, 32, torch.float32, {}),
        (8, 33, torch.float32, {}),
        (8, 32, torch.float64, {}),
        (8, 32, torch.float32, {"algorithm": "primal"}),
    ]:
        for lambd in (0.1, 0.2):
            BarlowTwinsLoss(lambd, **settings)(*_views(n, d, dtype)).backward()
    with torch.autocast("cpu", torch.bfloat16):
        BarlowTwinsLoss()(*_views(8, 32))
    assert remembered.cache_info().misses == 6
