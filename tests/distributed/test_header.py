"""The header: whatever is wrong on one rank raises the same error on every rank, at once and by name."""

import time

import pytest
import torch
import torch.distributed as dist

from barlow_loss import (
    DistributedBatchNorm,
    _collectives,
    _header,
    barlow_twins_loss,
    collapse_report,
    cross_correlation,
    normalization,
    standardize,
)
from barlow_loss._collectives import Group, Shards
from barlow_loss._header import check_on_all_ranks

SECONDS = 20.0  # far below the group's timeout; the exchange itself takes milliseconds


def _views(n=4, d=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(2, n, d, generator=generator).to(dtype).unbind()


def _call(per_rank):
    """What the loss raised on this rank, how fast, and whether the group still works after it."""
    settings = dict(per_rank.get(dist.get_rank(), {}))
    function = settings.pop("function", barlow_twins_loss)
    views = settings.pop("views", None) or _views(*settings.pop("shape", (4, 6)), settings.pop("dtype", torch.float32))
    if settings.pop("grad", False):
        views = [view.clone().requires_grad_() for view in views]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.pop("autocast", False))
    started = time.perf_counter()
    try:
        with autocast:
            function(*views, **settings)
        raised = None
    except Exception as error:
        raised = type(error).__name__, str(error)
    seconds = time.perf_counter() - started
    return raised, seconds, float(barlow_twins_loss(*_views()))


def _three_dimensional():
    return {"views": (torch.randn(2, 3, 6), torch.randn(2, 3, 6))}


ONE_WRONG = {
    # What one of three ranks does differently -> the error's type, and what its text names.
    "D": ({1: {"shape": (4, 7)}}, "ValueError", ["D = 6 on ranks 0, 2", "D = 7 on rank 1"]),
    "dtype": ({2: {"dtype": torch.float64}}, "ValueError", ["torch.float32 on ranks 0, 1", "torch.float64 on rank 2"]),
    "eps": ({0: {"eps": 1e-3}}, "ValueError", ["eps = 0.001 on rank 0", "eps = 1e-05 on ranks 1, 2"]),
    "algorithm": ({1: {"algorithm": "primal"}}, "ValueError", ["algorithm = primal on rank 1", "algorithm = auto on"]),
    "reduction": ({1: {"grad_reduction": "sum"}}, "ValueError", ["grad_reduction = sum on rank 1"]),
    "gradients": ({1: {"grad": True}}, "ValueError", ["[True, True] on rank 1", "[False, False] on ranks 0, 2"]),
    "function": ({1: {"function": cross_correlation}}, "ValueError", ["function = cross_correlation on rank 1"]),
    "dimensions": (
        {1: "three"},
        "ValueError",
        ["(N, D)", "(2, 3, 6)", "From rank 1 of 3", "ranks 0, 2: N = 4, D = 6, dtype"],
    ),
    "shapes": ({0: {"views": (torch.randn(4, 6), torch.randn(5, 6))}}, "ValueError", ["(4, 6)", "(5, 6)", "rank 0 of"]),
    "no floats": ({2: {"views": (torch.ones(4, 6).int(),) * 2}}, "TypeError", ["torch.int32", "From rank 2 of 3"]),
    "no tensor": ({1: {"views": ("z", "z")}}, "TypeError", ["got str", "From rank 1 of 3"]),
    "no views": ({1: {"views": (torch.ones(4, 6),)}}, "ValueError", ["at least two views, got 1", "From rank 1 of 3"]),
    "weight": ({1: {"lambd": 0.01}}, "ValueError", ["lambd = 0.01 on rank 1", "lambd = 0.0051 on ranks 0, 2"]),
    "backend": ({1: {"backend": "triton"}}, "ValueError", ["got cpu tensors", "'auto' or 'eager'", "From rank 1 of 3"]),
    "autocast": ({1: {"autocast": True}}, "ValueError", ["autocast = True on rank 1", "autocast = False on ranks"]),
    "lambd": ({1: {"lambd": -1.0}}, "ValueError", ["lambd", "got -1.0", "From rank 1 of 3"]),
    "two wrong": (
        {0: {"lambd": -1.0}, 2: {"views": (torch.ones(4, 6).int(),) * 2}},
        "ValueError",
        ["got -1.0", "From ranks 0, 2 of 3", "rank 2: barlow_twins_loss: expected z1", "torch.int32"],
    ),
}


@pytest.mark.parametrize(("per_rank", "kind", "named"), ONE_WRONG.values(), ids=ONE_WRONG)
def test_what_is_wrong_on_one_rank_raises_on_all(pool, per_rank, kind, named):
    per_rank = {rank: _three_dimensional() if what == "three" else what for rank, what in per_rank.items()}
    results = pool.run(_call, 3, per_rank)
    expected = results[0][0]
    assert expected is not None
    assert expected[0] == kind
    assert expected[1].startswith("barlow_twins_loss: ") or "function" in expected[1]
    for part in named:
        assert part in expected[1]
    messages = {raised[1].partition(": ")[2] for raised, _, _ in results}
    assert len(messages) == 1
    for raised, seconds, _ in results:
        assert raised[0] == kind
        assert seconds < SECONDS
    assert len({loss for *_, loss in results}) == 1
    assert all(loss == loss for *_, loss in results)


def test_the_same_mistake_everywhere_gives_the_plain_message(pool):
    results = pool.run(_call, 2, {0: _three_dimensional(), 1: _three_dimensional()})
    for (kind, message), _, _ in results:
        assert kind == "ValueError"
        assert "rank" not in message


def test_too_few_samples_in_all_names_each_count(pool):
    results = pool.run(_call, 3, {0: {"shape": (0, 6)}, 1: {"shape": (1, 6)}, 2: {"shape": (0, 6)}})
    for (kind, message), seconds, _ in results:
        assert kind == "ValueError"
        assert "N = 0 on rank 0; N = 1 on rank 1; N = 0 on rank 2" in message
        assert seconds < SECONDS


def _others(name, wrong):
    call = {
        "standardize": standardize,
        "cross_correlation": lambda z: cross_correlation(z, z),
        "collapse_report": lambda z: collapse_report(z, z),
        "DistributedBatchNorm": DistributedBatchNorm(6),
    }[name]
    z = _views()[0]
    try:
        call(wrong if dist.get_rank() == 1 else z)
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    "wrong", [torch.ones(4, 7), torch.ones(4, 6, dtype=torch.float64), torch.ones(6), None], ids=str
)
@pytest.mark.parametrize("name", ["standardize", "cross_correlation", "collapse_report", "DistributedBatchNorm"])
def test_the_other_functions_have_it_too(pool, name, wrong):
    first, second = pool.run(_others, 2, name, wrong)
    assert first == second
    assert first is not None
    assert name in first[1]
    assert "rank 1" in first[1]


def _settings(name, settings, gradient):
    """The function with settings, and a tensor with or without a gradient, that only rank 1 has."""
    own = dist.get_rank() == 1
    z = _views()[0].requires_grad_(gradient and own)
    settings = settings if own else {}
    call = {
        "standardize": lambda: standardize(z, **settings),
        "cross_correlation": lambda: cross_correlation(z, z, **settings),
        "collapse_report": lambda: collapse_report(z, z, **settings),
        "DistributedBatchNorm": lambda: DistributedBatchNorm(6, affine=False)(z),
    }[name]
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("name", "settings", "gradient", "named"),
    [
        ("standardize", {"eps": 1e-3}, False, "eps = 0.001 on rank 1"),
        ("standardize", {}, True, "z needs a gradient = True on rank 1"),
        ("cross_correlation", {"eps": 1e-3}, False, "eps = 0.001 on rank 1"),
        ("collapse_report", {"eps": 1e-3}, False, "eps = 0.001 on rank 1"),
        ("collapse_report", {"lambd": 1.0}, False, "lambd = 1.0 on rank 1"),
        ("DistributedBatchNorm", {}, True, "z needs a gradient = True on rank 1"),
    ],
)
def test_their_settings_are_compared(pool, name, settings, gradient, named):
    first, second = pool.run(_settings, 2, name, settings, gradient)
    assert first == second
    assert first[0] == "ValueError"
    assert named in first[1]


def _integer_for_float(eps):
    return float(barlow_twins_loss(*_views(), eps=eps[dist.get_rank()]))


def test_the_same_number_in_another_type_is_the_same(pool):
    pool.run(_integer_for_float, 2, (0, 0.0))


def test_where_the_header_travels(monkeypatch):
    """Over the CPU if the group can; else on the tensor's device, or the accelerator where there is no tensor."""
    config = {"value": "cpu:gloo,cuda:nccl"}
    monkeypatch.setattr(_collectives.dist, "get_backend_config", lambda group: config["value"])
    meta, group = torch.empty(1, device="meta"), Group(2, None)
    assert _collectives._device_of_small_things(group, meta).type == "cpu"
    config["value"] = "cuda:nccl"
    assert _collectives._device_of_small_things(group, meta).type == "meta"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert _collectives._device_of_small_things(group, None).type == "cuda"


def test_a_captured_graph_does_not_wait(monkeypatch):
    assert _header.may_synchronize(torch.empty(1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _header.may_synchronize(torch.empty(1))


def test_a_layer_on_an_accelerator_exchanges_no_header(monkeypatch):
    """Decided by the layer's own device, whatever comes in."""

    def refuse(*_):
        raise AssertionError("a header")

    monkeypatch.setattr(normalization, "check_on_all_ranks", refuse)
    layer = DistributedBatchNorm(6, device="meta")
    assert layer._values_per_channel(torch.empty(4, 6), Group(2, None)) is None
    with pytest.raises(AssertionError, match="a header"):
        DistributedBatchNorm(6)._values_per_channel(torch.empty(4, 6), Group(2, None))


def test_many_ranks_are_abridged():
    counts = tuple(range(2)) + (0,) * 20
    with pytest.raises(ValueError, match=r"N = 0 on rank 7; … \(22 in all\)"):
        _header.check_samples("standardize", torch.empty(0, 3), Shards(Group(22, None), counts))


def _after_the_end():
    group = dist.new_group([0, 1])
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="living process_group"):
        barlow_twins_loss(torch.randn(4, 6), torch.randn(4, 6), process_group=group)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the pool to destroy


def test_a_group_that_has_ended(pool):
    pool.run(_after_the_end, 2)


def _wrong_group(which):
    group = {"text": "world", "mesh": dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))}[which]
    with pytest.raises(TypeError, match=r"process_group.*(str|DeviceMesh).*mesh\.get_group\(\)"):
        barlow_twins_loss(*_views(), process_group=group)


@pytest.mark.parametrize("which", ["text", "mesh"])
def test_something_else_for_a_group(pool, which):
    pool.run(_wrong_group, 2, which)


def _milliseconds():
    z1, _ = _views()
    group = Group(dist.get_world_size(), None)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        check_on_all_ranks("barlow_twins_loss", group, z1, lambda: (4, {"D": 6, "dtype": z1.dtype, "eps": 1e-5}))
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def test_the_header_costs_a_millisecond_at_most(pool):
    """The best of 200, so that a busy machine does not decide; printed with -s."""
    milliseconds = pool.run(_milliseconds, 2, debug="OFF")
    print(f"\nheader at W = 2: {', '.join(f'{ms:.2f} ms' for ms in milliseconds)}")
    assert max(milliseconds) <= 1.0
