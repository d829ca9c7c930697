"""CUDA graphs, the host, memory and launches: what a training loop on a GPU needs besides the right numbers."""

import re

import pytest
import torch
from precision import Setting, autocast, draw, evaluate, on, terms
from torch.profiler import ProfilerActivity, profile

from barlow_loss import BarlowTwinsLoss, barlow_twins_loss

AUTOCAST = Setting("bfloat16 under bfloat16 autocast", torch.bfloat16, torch.bfloat16)
FLOAT32 = Setting("float32", torch.float32, None)

# Of cuBLAS, cuBLASLt, rocBLAS and hipBLASLt; a product may take several, where it splits its inner dimension.
PRODUCTS = re.compile(r"gemm|cutlass|xmma|nvjet|splitk|Cijk", re.IGNORECASE)
NO_KERNELS = re.compile(r"^(memset|memcpy)", re.IGNORECASE)


def _captured(step, warm_ups=3):
    """A graph of ``step``, warmed up on a side stream as CUDA graphs want it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        answer = step()
    return graph, answer


@pytest.mark.parametrize("setting", [AUTOCAST, FLOAT32], ids=lambda setting: setting.name)
@pytest.mark.parametrize(("n", "d"), [(64, 512), (33, 129)])
def test_graph_replays_on_new_data_and_a_new_lambda(setting, backend, algorithm, device, n, d):
    """Captured once; then other views are copied in, λ, a 0-d tensor, is changed, and the replay equals eager mode."""
    views = [view.requires_grad_() for view in on(device, setting, *draw(n, d))]
    lambd = torch.tensor(0.0051, device=device)
    settings = {"backend": backend, "algorithm": algorithm}

    def step():
        loss = terms(setting, *views, lambd=lambd, **settings).loss
        return loss.detach(), *torch.autograd.grad(loss, views)

    graph, answer = _captured(step)
    for seed, weight in ((1, 0.0051), (2, 0.05), (3, 0.0)):
        fresh = on(device, setting, *draw(n, d, seed=seed))
        with torch.no_grad():
            lambd.fill_(weight)
            for view, data in zip(views, fresh, strict=True):
                view.copy_(data)
        graph.replay()
        expected = evaluate(setting, *fresh, lambd=torch.tensor(weight, device=device), **settings)
        assert torch.equal(answer[0], expected.loss)
        for got, right in zip(answer[1:], expected.gradients, strict=True):
            assert torch.equal(got.double(), right)


def test_graph_of_a_training_step(backend, device):
    """Encoder, loss, backward and update in one graph: the weights after five replays are those of five eager steps."""
    torch.manual_seed(0)
    data = [torch.randn(2, 48, 32, device=device) for _ in range(5)]
    loss_fn = BarlowTwinsLoss(backend=backend)

    def trainer():
        torch.manual_seed(1)
        model = torch.nn.Linear(32, 128, device=device)
        return model, torch.optim.SGD(model.parameters(), lr=1e-4)

    def update(model, optimizer, inputs):
        optimizer.zero_grad(set_to_none=False)
        loss_fn(model(inputs[0]), model(inputs[1])).backward()
        optimizer.step()

    eager, eager_optimizer = trainer()
    for inputs in data:
        update(eager, eager_optimizer, inputs)

    model, optimizer = trainer()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    static = data[0].clone()
    graph, _ = _captured(lambda: update(model, optimizer, static))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    for inputs in data:
        static.copy_(inputs)
        graph.replay()
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [64, 33])
def test_a_graphed_callable_is_the_loss(backend, algorithm, device, n):
    """torch.cuda.make_graphed_callables, as in the README: forward and backward are a replay each, on new views."""
    loss_fn = BarlowTwinsLoss(backend=backend, algorithm=algorithm)
    sample = tuple(view.requires_grad_() for view in on(device, FLOAT32, *draw(n, 129)))
    step = torch.cuda.make_graphed_callables(loss_fn, sample)
    for seed in (1, 2):
        views = [view.requires_grad_() for view in on(device, FLOAT32, *draw(n, 129, seed=seed))]
        loss = step(*views)
        gradients = torch.autograd.grad(3 * loss, views)
        right = barlow_twins_loss(*views, backend=backend, algorithm=algorithm)
        assert torch.equal(loss, right)
        for got, expected in zip(gradients, torch.autograd.grad(3 * right, views), strict=True):
            assert torch.equal(got, expected)


def test_reduce_overhead_is_the_loss(backend, algorithm, device):
    """torch.compile(mode="reduce-overhead"), which captures after two warm-up calls."""
    loss_fn = torch.compile(BarlowTwinsLoss(backend=backend, algorithm=algorithm), mode="reduce-overhead")
    for seed in range(5):
        views = [view.requires_grad_() for view in on(device, FLOAT32, *draw(48, 130, seed=seed))]
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(loss_fn(*views), views)
        right = torch.autograd.grad(barlow_twins_loss(*views, backend=backend, algorithm=algorithm), views)
        for one, other in zip(got, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", [AUTOCAST, FLOAT32], ids=lambda setting: setting.name)
@pytest.mark.parametrize("tensor", [False, True], ids=["λ a float", "λ a tensor"])
def test_the_host_never_waits(setting, backend, algorithm, device, tensor):
    """Forward and backward in the mode in which torch raises wherever the host waits for the device."""
    views = [view.requires_grad_() for view in on(device, setting, *draw(33, 129))]
    lambd = torch.tensor(0.0051, device=device, requires_grad=True) if tensor else 0.0051
    wanted = [*views, lambd] if tensor else views

    def step():
        with autocast(setting):
            loss = barlow_twins_loss(*views, lambd=lambd, backend=backend, algorithm=algorithm)
        return torch.autograd.grad(loss, wanted)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_steady(backend, algorithm, device):
    """What 100 steps leave allocated, and what they reserve, is what ten do."""
    views = [view.requires_grad_() for view in on(device, AUTOCAST, *draw(65, 1001))]
    levels = []
    for count in range(1, 101):
        loss = terms(AUTOCAST, *views, backend=backend, algorithm=algorithm).loss
        torch.autograd.grad(loss, views)
        del loss
        if count in (10, 100):
            torch.cuda.synchronize()
            levels.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert levels[0] == levels[1]


@pytest.mark.parametrize("setting", [AUTOCAST, FLOAT32], ids=lambda setting: setting.name)
def test_working_memory_of_the_dual(setting, device):
    """With Triton u, K1, K2 and P, and the gradients; the allocator rounds, and vectors come on top: 5 %."""
    pytest.importorskip("triton")
    n, d = 512, 4096
    views = [view.requires_grad_() for view in on(device, setting, *draw(n, d))]
    product = 2 if setting == AUTOCAST else 4
    torch.cuda.empty_cache()  # a block left over from another test may be larger than what it is taken for
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(terms(setting, *views, backend="triton", algorithm="dual").loss, views)
        torch.cuda.synchronize()
        rise = torch.cuda.max_memory_allocated() - before
        del gradients
    model = 2 * n * d * (2 * product + setting.views.itemsize) + 2 * n * n * product
    assert rise <= 1.05 * model, f"{rise:,} bytes, {rise / model:.2f} of the model"


@pytest.mark.parametrize("setting", [AUTOCAST, FLOAT32], ids=lambda setting: setting.name)
def test_eight_launches(setting, device):
    """The dual with Triton: four products and four kernels. The gradient that backward starts from is given here.

    Counted: one for each product asked for, whatever the library makes of it, and every kernel that is not a product's.
    """
    pytest.importorskip("triton")
    views = [view.requires_grad_() for view in on(device, setting, *draw(128, 1024))]
    start = torch.ones((), device=device)

    def step():
        loss = terms(setting, *views, backend="triton", algorithm="dual").loss
        torch.autograd.grad(loss, views, grad_outputs=start)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        step()
        torch.cuda.synchronize()
    events = trace.events()
    kernels = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        pytest.skip("the profiler sees no kernels on this machine")
    products = sum(event.name == "aten::mm" for event in events)
    others = [name for name in kernels if not (PRODUCTS.search(name) or NO_KERNELS.match(name))]
    assert products + len(others) <= 8, f"{products} products and {others}"
