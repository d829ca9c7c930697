"""The diagnostics: definitions against plain formulas, known spectra, measured noise, and the report's judgement."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss import barlow_twins_loss, reference
from barlow_loss.diagnostics import CollapseReport, collapse_report, cross_correlation, effective_rank, noise_floor

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def embeddings(n: int, d: int, seed: int = 0, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """One signal seen twice."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z1, z2 = signal + noise * torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return z1, z2


def correlation(z1, z2, eps=1e-5):
    """C by its definition, in float64."""
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (z1.double(), z2.double()))
    return a.T @ b / len(a)


# cross_correlation


@pytest.mark.parametrize("shape", [(2, 3), (7, 1), (33, 9), (16, 40)], ids=str)
@pytest.mark.parametrize("mean", [0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_correlation_is_its_definition(shape, mean, dtype):
    z1, z2 = (z.to(dtype) for z in (z + mean for z in embeddings(*shape)))
    c = cross_correlation(z1, z2)
    assert c.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(c.double(), correlation(z1, z2), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_correlation_of_any_dtype_is_wide_and_without_gradient(dtype):
    z1, z2 = (z.to(dtype).requires_grad_() for z in embeddings(33, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = cross_correlation(z1, z2)
    assert c.dtype == torch.promote_types(dtype, torch.float32)
    assert not c.requires_grad
    torch.testing.assert_close(c.double(), correlation(z1.detach(), z2.detach()), atol=3e-6, rtol=0)


def test_loss_from_the_matrix_is_the_loss():
    z1, z2 = embeddings(33, 9)
    c = cross_correlation(z1, z2, eps=0.1)
    off = c - torch.diag(c.diagonal())
    loss = (c.diagonal() - 1).square().sum() + 0.02 * off.square().sum()
    torch.testing.assert_close(loss, barlow_twins_loss(z1, z2, lambd=0.02, eps=0.1))


# noise_floor


@pytest.mark.parametrize(("n", "d"), [(16, 64), (64, 16), (100, 100), (5, 300)])
@pytest.mark.parametrize("identical", [False, True], ids=["independent views", "identical views"])
def test_noise_floor_is_what_random_embeddings_have(n, d, identical):
    sums = []
    for seed in range(30):
        z1, z2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sums.append(reference.barlow_twins_loss(z1, z1 if identical else z2, eps=0.0).off_diagonal)
    measured = torch.stack(sums)
    error_of_the_mean = measured.std() / len(sums) ** 0.5
    assert abs(measured.mean() - noise_floor(n, d)) < 4 * error_of_the_mean
    assert error_of_the_mean < 0.03 * noise_floor(n, d)


def test_noise_floor_of_one_feature_is_zero_and_arguments_are_checked():
    assert noise_floor(2, 1) == 0
    for n, d in [(1, 5), (0, 5), (5, 0)]:
        with pytest.raises(ValueError, match=f"n={n} and d={d}"):
            noise_floor(n, d)


# effective_rank


def with_spectrum(sigma: torch.Tensor, n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    left, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))
    return left * sigma @ right.T


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (12, 12)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7, 12])
def test_equal_singular_values_give_the_rank(shape, rank):
    assert effective_rank(with_spectrum(torch.full((rank,), 3.0), *shape)) == pytest.approx(rank, rel=1e-9)


@given(
    sigma=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    shape=st.sampled_from([(8, 20), (20, 8), (9, 9)]),
    log_scale=st.integers(-200, 200),
)
def test_effective_rank_is_the_exponential_of_the_entropy(sigma, shape, log_scale):
    p = torch.tensor(sigma, dtype=torch.float64) / sum(sigma)
    expected = math.exp(-(p * p.log()).sum())
    z = with_spectrum(torch.tensor(sigma, dtype=torch.float64), *shape)
    assert effective_rank(z * 10.0**log_scale) == pytest.approx(expected, rel=1e-6)
    assert 1 - 1e-9 <= effective_rank(z) <= min(shape) * (1 + 1e-9)


def test_centring_removes_the_common_mean():
    z, _ = embeddings(40, 10)
    far = z + 1e3
    assert effective_rank(far) < 1.5
    assert effective_rank(far, center=True) == pytest.approx(effective_rank(z, center=True), rel=1e-6)
    assert effective_rank(far, center=True) > 8


@pytest.mark.parametrize("dtype", FLOATS)
def test_effective_rank_of_any_dtype_autocast_or_not(dtype):
    z = embeddings(40, 10)[0].to(dtype).requires_grad_()
    expected = effective_rank(z.detach().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert effective_rank(z) == pytest.approx(expected, rel=1e-12)


def test_effective_rank_at_the_edges():
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert effective_rank(torch.full((4, 3), 7.0), center=True) == 0
    assert effective_rank(torch.full((4, 3), 7.0)) == pytest.approx(1)
    for poison in (math.nan, math.inf):
        assert math.isnan(effective_rank(torch.tensor([[1.0, poison], [2.0, 3.0]])))
    for wrong, error in [
        (torch.ones(3), ValueError),
        (torch.ones(0, 3), ValueError),
        (torch.ones(3, 0), ValueError),
        (torch.ones(2, 3, 4), ValueError),
        (torch.ones(2, 3, dtype=torch.long), TypeError),
        (3.0, TypeError),
    ]:
        with pytest.raises(error, match="effective_rank"):
            effective_rank(wrong)


# collapse_report


@pytest.mark.parametrize("shape", [(40, 7), (12, 60), (20, 20), (2, 5), (9, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_report_is_its_definitions(shape, dtype):
    n, d = shape
    z1, z2 = (z.to(dtype).requires_grad_() for z in embeddings(n, d))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = collapse_report(z1, z2, lambd=0.02, eps=1e-3)
    z1, z2 = z1.detach().double(), z2.detach().double()
    c = correlation(z1, z2, 1e-3)
    off = c[~torch.eye(d, dtype=torch.bool)].square()
    stds = torch.cat([z1.std(0, correction=0), z2.std(0, correction=0)])
    cosine = torch.nn.functional.cosine_similarity(z1, z2)
    on_diagonal = (c.diagonal() - 1).square().sum().item()
    expected = {
        "n": n,
        "d": d,
        "lambd": 0.02,
        "eps": 1e-3,
        "loss": on_diagonal + 0.02 * off.sum().item(),
        "loss_noise_floor": 0.02 * d * (d - 1) / (n - 1),
        "on_diagonal": on_diagonal,
        "off_diagonal": off.sum().item(),
        "off_diagonal_noise_floor": d * (d - 1) / (n - 1),
        "mean_diagonal": c.diagonal().mean().item(),
        "off_diagonal_rms": off.mean().sqrt().item() if d > 1 else 0.0,
        "off_diagonal_rms_noise_floor": 1 / math.sqrt(n - 1),
        "dead_features": 0,
        "std_min": stds.min().item(),
        "std_p10": stds.quantile(0.1).item(),
        "std_median": stds.quantile(0.5).item(),
        "std_p90": stds.quantile(0.9).item(),
        "std_max": stds.max().item(),
        "effective_rank_1": effective_rank(z1, center=True),
        "effective_rank_2": effective_rank(z2, center=True),
        "alignment": (2 - 2 * cosine).mean().item(),
    }
    got = report.as_dict()
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_report_is_plain_numbers_frozen_and_leaves_the_views_alone():
    z1, z2 = embeddings(12, 30)
    before = z1.clone()
    report = collapse_report(z1, z2)
    assert {type(value) for value in report.as_dict().values()} == {int, float}
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loss = 0.0
    assert torch.equal(z1, before)
    assert isinstance(report, CollapseReport)


def test_report_never_builds_a_features_by_features_matrix():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    z1, z2 = (z.float() for z in embeddings(16, 400))
    with Largest():
        collapse_report(z1, z2)
    assert 0 < Largest.elements < 400 * 400 // 4


def dead_count(column: torch.Tensor, eps: float = 1e-5) -> int:
    z1, z2 = (z.to(column.dtype) for z in embeddings(len(column), 6))
    z2[:, 3] = column
    return collapse_report(z1, z2, eps=eps).dead_features


def test_dead_features_are_those_below_epsilon_or_below_the_resolution():
    noise = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    assert dead_count(torch.full((64,), 5.0)) == 1
    assert dead_count(0.99e-2 * noise, eps=1e-4) == 1
    assert dead_count(1.01e-2 * noise, eps=1e-4) == 0
    # Around 1e4 float32 steps by 1e-3: a spread of 1e-2 is signal, one of 5e-4 is rounding. float64 resolves both.
    assert dead_count((1e4 + 1e-2 * noise).float()) == 0
    assert dead_count((1e4 + 5e-4 * noise).float(), eps=1e-8) == 1
    assert dead_count(1e4 + 5e-4 * noise, eps=1e-8) == 0


def test_a_feature_dead_in_both_views_counts_once():
    z1, z2 = embeddings(32, 5)
    z1[:, 2] = z2[:, 2] = 1.0
    z1[:, 4] = 0.0
    assert collapse_report(z1, z2).dead_features == 2


# The report's judgement


def test_verdict_on_random_but_matching_embeddings():
    z1, z2 = embeddings(64, 256)
    report = collapse_report(z1, z2)
    assert report.warnings == ()
    assert "as decorrelated as a batch of this size can show" in report.verdict
    assert report.off_diagonal == pytest.approx(report.off_diagonal_noise_floor, rel=0.05)


def test_verdict_on_redundant_embeddings():
    z1, z2 = embeddings(200, 16)
    mix = torch.randn(16, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    report = collapse_report(z1 @ mix, z2 @ mix)
    assert report.warnings == ()
    assert "times its noise floor" in report.verdict


@pytest.mark.parametrize("d", [8, 200])
def test_verdict_on_complete_collapse(d):
    report = collapse_report(torch.ones(32, d), torch.ones(32, d))
    assert (report.loss, report.dead_features) == (d, d)
    assert report.effective_rank_1 == report.effective_rank_2 == 0
    assert report.alignment == 0
    warnings = " ".join(report.warnings)
    assert all(word in warnings for word in (f"{d} of {d} features are dead", "rank collapse", "share little"))


def test_verdict_on_dimensional_collapse():
    z1, z2 = (z @ torch.linspace(-3, 5, 200, dtype=torch.float64).sin().view(2, 100) for z in embeddings(64, 2))
    report = collapse_report(z1, z2 + 1e-3 * embeddings(64, 100)[0])
    assert any("rank collapse" in warning for warning in report.warnings)
    assert report.dead_features == 0


@pytest.mark.parametrize(
    ("directions", "n", "d", "collapsed"),
    [(1, 12, 10, True), (3, 12, 10, False), (3, 101, 200, True), (12, 101, 200, False)],
)
def test_rank_collapse_is_a_single_direction_or_few_of_many(directions, n, d, collapsed):
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(n, directions, generator=generator) @ torch.randn(directions, d, generator=generator)
    assert any("rank collapse" in warning for warning in collapse_report(z, z).warnings) is collapsed


def test_verdict_on_views_that_do_not_match():
    z1, z2 = embeddings(64, 100)
    report = collapse_report(z1, z2.roll(1, dims=0))
    assert [warning for warning in report.warnings if "share little" in warning]
    assert report.alignment == pytest.approx(2, abs=0.2)


def test_verdict_on_non_finite_embeddings():
    z1, z2 = embeddings(16, 4)
    z1[3, 2] = math.nan
    report = collapse_report(z1, z2)
    assert math.isnan(report.loss)
    assert math.isnan(report.effective_rank_1)
    assert report.warnings == ("the loss is not finite: NaN, infinity or overflow in the embeddings",)
    assert "NaN" in str(report)


def test_a_single_feature_or_two_samples_are_no_rank_collapse():
    for n, d in [(20, 1), (2, 5)]:
        assert not [w for w in collapse_report(*embeddings(n, d)).warnings if "rank" in w]


def test_report_prints_an_aligned_table_with_a_meaning_for_each_quantity():
    text = str(collapse_report(*embeddings(64, 3000)))
    head, names, *rows, verdict = text.splitlines()
    assert head == "N = 64 samples, D = 3000 features, λ = 0.0051, ε = 1e-05"
    assert names.split() == ["quantity", "value", "compare", "with", "meaning"]
    assert len(rows) == 14
    start = names.index("compare")
    ends = {len(row[: start - 2].rstrip()) for row in rows}
    assert ends == {names.index("value") + len("value")}  # numbers are right-aligned under their title
    for field in ("loss", "off-diagonal RMS", "dead features", "effective rank, z1", "alignment"):
        assert sum(row.startswith(field + "  ") for row in rows) == 1
    assert "of 3,000" in text
    assert max(map(len, text.splitlines())) <= 120
    assert verdict.startswith("No sign of collapse")


@pytest.mark.parametrize("function", [cross_correlation, collapse_report])
def test_views_and_settings_are_checked(function):
    z = torch.randn(4, 3)
    name = function.__name__
    with pytest.raises(ValueError, match=rf"{name}.*\(4, 3\).*\(4, 2\)"):
        function(z, z[:, :2])
    with pytest.raises(ValueError, match=rf"{name}.*\(1, 3\)"):
        function(z[:1], z[:1])
    with pytest.raises(TypeError, match=rf"{name}.*float32.*float64"):
        function(z, z.double())
    with pytest.raises(TypeError, match=rf"{name}.*int64"):
        function(z.long(), z.long())
    with pytest.raises(ValueError, match=rf"{name}.*eps"):
        function(z, z, eps=-1.0)


def test_lambd_is_checked():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"collapse_report.*lambd"):
        collapse_report(z, z, lambd=-1.0)


class TestMoreViews:
    def views(self):
        z1, z2 = embeddings(64, 100)
        return z1, z2, embeddings(64, 100, seed=3)[0], z2 + 0.1 * z1

    def test_a_report_of_each_pair_is_that_of_a_call_with_it(self):
        views = self.views()
        reports = collapse_report(*views, lambd=0.02)
        assert list(reports) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        for (i, j), report in reports.items():
            assert report == collapse_report(views[i], views[j], lambd=0.02)

    def test_the_worst_is_named_and_shown(self):
        reports = collapse_report(*self.views())
        assert 2 in reports.worst
        assert all("share little" in reports[pair].warnings[0] for pair in reports if 2 in pair)
        text = str(reports)
        assert f"Worst: z{reports.worst[0] + 1}, z{reports.worst[1] + 1}" in text
        assert str(reports[reports.worst]) in text
        assert len(text.splitlines()) == 1 + len(reports) + 1 + len(str(reports[reports.worst]).splitlines())

    def test_what_is_not_finite_is_the_worst(self):
        z1, z2, z3, z4 = self.views()
        z4[0, 0] = torch.nan
        assert 3 in collapse_report(z1, z2, z3, z4).worst

    def test_cross_correlations_of_pairs(self):
        z1, z2, z3, _ = self.views()
        found = cross_correlation(z1, z2, z3)
        assert list(found) == [(0, 1), (0, 2), (1, 2)]
        assert torch.equal(found[0, 2], cross_correlation(z1, z3))


def test_a_notebook_shows_the_table():
    """Every cell, escaped, and the verdict; of more views the text."""
    z1, z2, z3 = torch.randn(3, 16, 8)
    report = collapse_report(z1, z2)
    html = report._repr_html_()
    assert html.count("<tr>") == len(report._rows()) + 1
    assert "<td>Σ (C_ii − 1)²: 0 where the views agree</td>" in html
    assert html.endswith(f"<p>{report.verdict}</p>")
    assert "Worst: z" in collapse_report(z1, z2, z3)._repr_html_()
