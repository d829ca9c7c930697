"""Cost, counted and not timed: live bytes and floating-point operations are the same on every machine."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from barlow_loss import barlow_twins_loss, reference
from comparison import evaluate
from strategies import Batch


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it created and that are still alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known_before = [
            leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), known_before)
        return result

    def _count(self, storage, known_before):
        # A view of an input has the storage of that input, which is not working memory.
        if storage in self._known or any(storage.data_ptr() == other.data_ptr() for other in known_before):
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size):
        self.live -= size


def _working_elements(loss, n, d, dtype=torch.float32):
    """Peak of forward and backward beyond the views and their gradients, and the largest single buffer, in elements."""
    leaves = [view.requires_grad_() for view in Batch(n, d, 1, "trained").views(dtype)]
    with LiveBytes() as memory:
        gradients = torch.autograd.grad(loss(*leaves), leaves)
    assert memory.live >= sum(gradient.nbytes for gradient in gradients)
    return memory.peak / dtype.itemsize - 2 * n * d, memory.largest / dtype.itemsize


def _dual(z1, z2):
    return barlow_twins_loss(z1, z2, algorithm="dual")


def _primal(z1, z2):
    return barlow_twins_loss(z1, z2, algorithm="primal")


@pytest.mark.parametrize(("n", "d"), [(64, 2048), (256, 2048), (128, 4096), (300, 700)])
def test_dual_working_memory_is_bounded(n, d):
    """At most 5·N·D + 3·N² elements beyond inputs and gradients; no buffer is larger than both views or one K."""
    working, largest = _working_elements(_dual, n, d)
    assert working <= 5 * n * d + 3 * n**2
    assert largest <= max(2 * n * d, n**2) < d**2


def test_the_count_sees_the_textbook_matrices():
    """The same instrument shows what the dual avoids: at least three D×D matrices alive at once."""
    n, d = 64, 1024
    working, largest = _working_elements(lambda *z: reference.barlow_twins_loss(*z).loss, n, d)
    assert working >= 3 * d**2
    assert largest >= d**2
    assert _working_elements(_dual, n, d)[0] < working / 8


def test_dual_working_memory_is_linear_in_d():
    n = 64
    assert _working_elements(_dual, n, 8192)[0] <= 2.05 * _working_elements(_dual, n, 4096)[0]


def test_primal_working_memory_is_bounded():
    """C, its square, u1 and u2, and blocks no larger than those."""
    n, d = 1024, 256
    working, _ = _working_elements(_primal, n, d)
    assert working <= 5 * n * d + 3 * d**2


def test_nothing_stays_alive_after_backward(algorithm):
    """Once the graph is gone, so are the saved matrices."""
    z1, z2 = (view.requires_grad_() for view in Batch(64, 512, 1, "trained").views(torch.float32))
    with LiveBytes() as memory:
        barlow_twins_loss(z1, z2, algorithm=algorithm).backward()
    assert memory.live <= z1.grad.nbytes + z2.grad.nbytes


def _flops(algorithm, n, d, backward=True):
    views = Batch(n, d, 1, "trained").views(torch.float32)
    with FlopCounterMode(display=False) as counter:
        if backward:
            evaluate(*views, algorithm=algorithm)
        else:
            barlow_twins_loss(*views, algorithm=algorithm)
    return counter.get_total_flops()


def test_dual_does_four_products_and_none_of_d_squared():
    """8·N²·D FLOPs at most, less where the symmetry of K is used."""
    n, d = 64, 4096
    assert 4 * n**2 * d <= _flops("dual", n, d) <= 8 * n**2 * d


def test_primal_does_three_products():
    """6·N·D² FLOPs."""
    n, d = 96, 64
    assert _flops("primal", n, d) == 6 * n * d**2


@pytest.mark.parametrize(("algorithm", "share"), [("primal", 3), ("dual", 2)])
def test_the_forward_alone_does_no_work_of_the_backward(algorithm, share):
    """Without gradients: one product of three in the primal, two of four in the dual."""
    n, d = 64, 96
    assert _flops(algorithm, n, d, backward=False) == _flops(algorithm, n, d) / share


def test_a_view_without_gradient_costs_no_back_projection(algorithm):
    """One detached view saves one of the products: 2·N·D·side FLOPs."""
    n, d = 64, 96
    z1, z2 = Batch(n, d, 1, "trained").views(torch.float32)
    z1.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        barlow_twins_loss(z1, z2, algorithm=algorithm).backward()
    side = n if algorithm == "dual" else d
    assert _flops(algorithm, n, d) - counter.get_total_flops() == 2 * n * d * side
