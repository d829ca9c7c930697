"""Training on a GPU: mixed precision with and without a GradScaler, torch.compile, activation checkpointing."""

import pytest
import torch
from precision import UNIT
from torch import nn
from torch.utils.checkpoint import checkpoint

from barlow_loss import BarlowTwinsLoss

STEPS, N, D = 20, 96, 256


def _projector(device):
    torch.manual_seed(0)
    layers = nn.Linear(32, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, D, bias=False)
    return nn.Sequential(*layers).to(device)


def _batch(device):
    """Two noisy views of the same samples."""
    sample, noise1, noise2 = torch.randn(3, N, 32, generator=torch.Generator().manual_seed(1))
    return (sample + noise1).to(device), (sample + noise2).to(device)


def _train(device, loss_fn, dtype=None, scale=None):
    """The losses of twenty steps of SGD on one batch; ``dtype`` is autocast's, ``scale`` a GradScaler's first."""
    model = _projector(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=scale is not None)
    losses = []
    x1, x2 = _batch(device)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            z1, z2 = model(x1), model(x2)
            assert z1.dtype == (dtype or torch.float32)
            loss = loss_fn(z1, z2)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    if scale is not None:
        assert scaler.get_scale() == scale, "a step was skipped: a gradient was not finite"
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return torch.stack(losses).double().cpu()


def test_float16_with_a_grad_scaler(backend, algorithm, device):
    """Twenty steps under float16 autocast: all finite, none skipped, within 0.2 % of float32 (on the CPU: 0.02 %)."""
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    _assert_near(_train(device, loss_fn, torch.float16, scale=2.0**8), _train(device, loss_fn), 0.002)


def test_bfloat16_autocast(backend, algorithm, device):
    """The same under bfloat16, which needs no scaler, within 0.5 % (on the CPU: 0.07 %)."""
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    _assert_near(_train(device, loss_fn, torch.bfloat16), _train(device, loss_fn), 0.005)


def _assert_near(losses, right, tolerance):
    assert losses.isfinite().all()
    assert right[-1] < right[0] / 2, f"the case does not train: {right}"
    assert ((losses - right).abs() <= tolerance * right).all(), f"{losses / right - 1}"


def test_backends_train_alike(algorithm, device):
    """Float32, twenty steps: Triton and eager differ by rounding alone."""
    pytest.importorskip("triton")
    triton, eager = (_train(device, BarlowTwinsLoss(backend=name, algorithm=algorithm)) for name in ("triton", "eager"))
    _assert_near(triton, eager, 1e-4)


def _views(device, dtype):
    z = [_projector(device)(x).detach().to(dtype) for x in _batch(device)]
    return [view.requires_grad_() for view in z]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph(backend, algorithm, device, dtype):
    """torch.compile(fullgraph=True) gives the loss and gradients of eager mode, but for rounding."""
    pytest.importorskip("triton")  # inductor needs it
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    views = _views(device, dtype)
    loss, compiled = loss_fn(*views), torch.compile(loss_fn, fullgraph=True)(*views)
    few = 1e-5 if dtype == torch.float32 else UNIT
    torch.testing.assert_close(compiled, loss, rtol=few, atol=0)
    for one, other in zip(torch.autograd.grad(compiled, views), torch.autograd.grad(loss, views), strict=True):
        difference = (one.double() - other.double()).norm() / other.double().norm()
        assert difference <= (few if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(backend, algorithm, device, use_reentrant):
    """The forward runs again in backward: the same bits."""
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    views = _views(device, torch.bfloat16)
    plain = torch.autograd.grad(loss_fn(*views), views)
    checkpoint(loss_fn, *views, use_reentrant=use_reentrant).backward()
    for view, gradient in zip(views, plain, strict=True):
        assert torch.equal(view.grad, gradient)


def test_on_a_side_stream(backend, algorithm, device):
    """The work goes to the caller's stream."""
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    views = _views(device, torch.bfloat16)
    plain = torch.autograd.grad(loss_fn(*views), views)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [(view * 1).detach().requires_grad_() for view in views]
        got = torch.autograd.grad(loss_fn(*late), late)
    torch.cuda.current_stream(device).wait_stream(stream)
    for one, other in zip(got, plain, strict=True):
        assert torch.equal(one, other)
