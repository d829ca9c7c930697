"""LiDAR and α-ReQ: closed forms, the formula written out, invariances, another package, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss.diagnostics import alpha_req, effective_rank, lidar

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DELTA = 1e-4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(q: int, n: int, d: int, seed: int = 0) -> torch.Tensor:
    """(q, n, d): one signal of decaying spectrum, seen q times."""
    decay = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    return decay * noise(n, d, seed=seed) + 0.3 * noise(q, n, d, seed=seed + 1) + 5.0


def perplexity(weights: torch.Tensor) -> float:
    p = weights / weights.sum()
    return math.exp(-torch.xlogy(p, p).sum())


def written_out(views: torch.Tensor, delta: float = DELTA) -> float:
    """The formula, with its two D×D matrices."""
    q, n, d = views.shape
    means = views.mean(0)
    between = means.T.cov()
    within = (views - means).flatten(0, 1)
    values, vectors = torch.linalg.eigh(within.T @ within / (n * (q - 1)) + delta * torch.eye(d, dtype=torch.float64))
    whitening = vectors / values.sqrt() @ vectors.T
    return perplexity(torch.linalg.eigvalsh(whitening @ between @ whitening).clamp(min=0))


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(noise(d, d, seed=9)).Q


# LiDAR


@pytest.mark.parametrize("shape", [(2, 30, 8), (2, 12, 60), (3, 10, 30), (5, 4, 19), (5, 4, 21), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("delta", [DELTA, 1.0])
def test_lidar_is_its_formula(shape, delta):
    views = seen(*shape)
    assert lidar(*views, delta=delta) == pytest.approx(written_out(views, delta), rel=1e-8)


@given(
    between=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    within=st.lists(st.floats(0, 10), min_size=6, max_size=6),
    wide=st.sampled_from([6, 40]),
)
def test_lidar_of_directions_that_do_not_mix(between, within, wide):
    """Samples at ±a along each axis, the views of each at ±b from it: λ = 2a²/(N − 1) / (4b²/N + δ)."""
    a, b = (torch.tensor(values[: len(between)], dtype=torch.float64) for values in (between, within))
    n = 2 * len(a)
    axes = torch.eye(len(a), wide, dtype=torch.float64)
    means, steps = torch.cat([a.diag() @ axes, -a.diag() @ axes]), (b.diag() @ axes).repeat(2, 1)
    expected = perplexity(2 * a.square() / (n - 1) / (4 * b.square() / n + DELTA))
    assert lidar(means + steps, means - steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [7, 50])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_directions_give_their_number(k, d):
    z = torch.eye(k, d, dtype=torch.float64)
    z = torch.cat([z, -z]) @ rotation(d)
    assert lidar(z, z) == pytest.approx(k, rel=1e-9)


def test_what_the_views_do_not_share_counts_little():
    """The rank sees ten directions, the views agree about three of them."""
    signal = torch.cat([noise(400, 3), torch.zeros(400, 7, dtype=torch.float64)], dim=1)
    z1, z2 = (signal + torch.cat([torch.zeros(400, 3), noise(400, 7, seed=seed)], dim=1) for seed in (1, 2))
    assert effective_rank(z1, center=True) > 9.5
    assert 2.9 < lidar(z1, z2) < 3.1


@pytest.mark.parametrize("shape", [(2, 30, 8), (3, 5, 40)], ids=str)
def test_lidar_is_invariant(shape):
    views = seen(*shape)
    expected = lidar(*views)
    assert lidar(*(views @ rotation(shape[2]))) == pytest.approx(expected, rel=1e-9)
    assert lidar(*(views + 1e4)) == pytest.approx(expected, rel=1e-6)
    assert lidar(*views.flip(0)) == pytest.approx(expected, rel=1e-9)
    assert lidar(*views.flip(1)) == pytest.approx(expected, rel=1e-9)
    assert lidar(*(1e3 * views), delta=1e6 * DELTA) == pytest.approx(expected, rel=1e-9)
    assert lidar(*torch.cat([views, torch.zeros(*shape[:2], 9)], dim=2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_dtype_is_measured_in_float64(dtype):
    views = seen(2, 40, 20).to(dtype).requires_grad_()
    expected = lidar(*views.detach().double()), alpha_req(views[0].detach().double(), first=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (lidar(*views), alpha_req(views[0], first=2)) == expected


def test_no_measure_exceeds_what_is_possible():
    """In float32 the entropy of many equal values comes out above that of all equal."""
    z = torch.linalg.qr(torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))).Q
    assert effective_rank(z) <= 512 * (1 + 1e-9)
    assert lidar(z, z) <= 512 * (1 + 1e-9)


@pytest.mark.slow  # its import alone takes seconds
@pytest.mark.parametrize("shape", [(2, 20, 8), (4, 6, 30)], ids=str)
def test_lidar_is_that_of_stable_pretraining(shape):
    """Of samples in a row, as its queue has them. Its ε, added D times, is the difference."""
    package = pytest.importorskip("stable_pretraining.callbacks.lidar")
    settings = {"name": "lidar", "n_classes": shape[1], "samples_per_class": shape[0], "delta": DELTA}

    def theirs(views, epsilon=1e-8):
        rows = views.transpose(0, 1).flatten(0, 1)
        return package.LiDAR._compute_lidar(SimpleNamespace(**settings, epsilon=epsilon), rows)["lidar"]

    views = seen(*shape)
    assert lidar(*views) == pytest.approx(theirs(views, epsilon=1e-30), rel=1e-9)
    assert lidar(*views) == pytest.approx(theirs(views), rel=1e-4)
    assert theirs(torch.ones(*shape)) == pytest.approx(shape[2])  # where ours is 0


def test_lidar_never_builds_a_features_by_features_matrix():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    views = seen(2, 8, 400)
    with Largest():
        lidar(*views)
    assert 0 < Largest.elements < 400 * 400 // 4


def test_lidar_at_the_edges():
    for value in (0.0, 0.1, 7.0):
        alike = torch.full((6, 5), value, dtype=torch.float64)
        assert lidar(alike, alike) == 0
        assert lidar(alike + 1, alike) == 0  # the views differ, the samples do not
    assert lidar(*(1e150 * seen(2, 6, 5))) > 1
    for poison in (math.nan, math.inf):
        views = seen(2, 6, 5)
        views[1, 2, 3] = poison
        assert math.isnan(lidar(*views))


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((torch.ones(4, 3),), {}, ValueError, "at least two views"),
        ((), {}, ValueError, "at least two views"),
        ((torch.ones(4, 3), torch.ones(4, 2)), {}, ValueError, r"z1 \(4, 3\) and z2 \(4, 2\)"),
        ((torch.ones(1, 3), torch.ones(1, 3)), {}, ValueError, "N ≥ 2"),
        ((torch.ones(4, 0), torch.ones(4, 0)), {}, ValueError, "D ≥ 1"),
        ((torch.ones(4, 3), torch.ones(4, 3).double()), {}, TypeError, "one dtype"),
        ((torch.ones(4, 3), 3.0), {}, TypeError, "z2 to be a tensor"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"delta": 0.0}, ValueError, "delta to be finite and > 0, got 0.0"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"delta": math.inf}, ValueError, "got inf"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"delta": "1"}, TypeError, "delta to be a float, got str"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"delta": True}, TypeError, "got bool"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"synchronize": 1}, TypeError, "synchronize to be True or False"),
    ],
)
def test_lidar_refuses(arguments, settings, error, message):
    with pytest.raises(error, match=f"^lidar: .*{message}"):
        lidar(*arguments, **settings)


# α-ReQ


def of_spectrum(eigenvalues: torch.Tensor, n: int, d: int) -> torch.Tensor:
    """(n, d) of mean 0 whose covariance has these eigenvalues, up to a factor."""
    k = len(eigenvalues)
    left = noise(n, k)
    left = torch.linalg.qr(left - left.mean(0)).Q
    return left * eigenvalues.sqrt() @ rotation(d)[:k] + 3.0


@pytest.mark.parametrize("shape", [(41, 90), (90, 40), (41, 40)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_a_power_law_gives_its_exponent(shape, alpha):
    z = of_spectrum(torch.arange(1, 41, dtype=torch.float64).pow(-alpha), *shape)
    assert alpha_req(z) == pytest.approx(alpha, abs=1e-6)
    assert alpha_req(1e100 * z, first=1, last=10) == pytest.approx(alpha, abs=1e-6)
    assert alpha_req(z, first=39, last=40) == pytest.approx(alpha, abs=1e-6)


def test_alpha_is_a_weighted_least_squares_fit_within_the_range():
    numpy = pytest.importorskip("numpy")
    z = seen(1, 200, 60)[0]
    eigenvalues = torch.linalg.eigvalsh(z.T.cov()).flip(0).numpy()
    for first, last in [(1, 60), (11, 100), (4, 20)]:
        k = numpy.arange(first, min(last, 60) + 1)
        slope, _ = numpy.polyfit(numpy.log(k), numpy.log(eigenvalues[k - 1]), 1, w=k**-0.5)
        assert alpha_req(z, first=first, last=last) == pytest.approx(-slope, rel=1e-8)


def test_alpha_ends_before_what_is_rounding():
    eigenvalues = torch.arange(1, 31, dtype=torch.float64).reciprocal()
    assert alpha_req(of_spectrum(eigenvalues, 90, 60), last=50) == pytest.approx(1, abs=1e-6)


def test_alpha_at_the_edges():
    assert alpha_req(torch.full((30, 20), 0.1)) == math.inf
    assert alpha_req(noise(30, 3) @ noise(3, 20)) == math.inf
    for poison in (math.nan, math.inf):
        z = noise(30, 20)
        z[3, 4] = poison
        assert math.isnan(alpha_req(z))


@pytest.mark.parametrize(
    ("z", "settings", "error", "message"),
    [
        (torch.ones(12, 40), {}, ValueError, r"min\(N − 1, D\) > first, got N = 12, D = 40 and first=11"),
        (torch.ones(40, 11), {}, ValueError, "D = 11 and first=11"),
        (torch.ones(40), {}, ValueError, r"shape \(N, D\)"),
        (torch.ones(40, 0), {}, ValueError, "projector's output width"),
        (torch.ones(40, 40, dtype=torch.long), {}, TypeError, "int64"),
        ([1.0], {}, TypeError, "tensor, got list"),
        (torch.ones(40, 40), {"first": 0}, ValueError, "1 ≤ first < last, got first=0 and last=100"),
        (torch.ones(40, 40), {"last": 11}, ValueError, "first=11 and last=11"),
        (torch.ones(40, 40), {"last": 50.0}, TypeError, "last to be an int, got 50.0"),
        (torch.ones(40, 40), {"first": True}, TypeError, "first to be an int, got True"),
    ],
)
def test_alpha_refuses(z, settings, error, message):
    with pytest.raises(error, match=f"^alpha_req: .*{message}"):
        alpha_req(z, **settings)
