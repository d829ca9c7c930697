"""Both backends and algorithms in every precision against float64, over shapes and layouts that a kernel may get wrong.

Triton has a second bound: at most twice the error of the eager backend on the same views plus what is stated here.
"""

import pytest
import torch
from precision import (
    UNIT,
    Setting,
    assert_exact,
    distance,
    draw,
    evaluate,
    exact,
    gradient_budget,
    loss_budget,
    on,
    rounding,
    terms,
)

from comparison import LAMBD

# Multiples of every tile; then sizes that none divides: one more than a tile, odd D (rows of 16-bit elements that start
# at odd multiples of 2 bytes), odd N, fewer rows and features than one tile, primes; N on either side of D/2 and D.
ALIGNED = [(64, 512), (128, 1024), (256, 256)]
RAGGED = [(65, 1001), (33, 129), (129, 67), (257, 514), (7, 23), (2, 5), (31, 1)]


@pytest.mark.parametrize(("n", "d"), ALIGNED + RAGGED)
def test_against_float64(setting, backend, algorithm, device, n, d):
    views = draw(n, d)
    got = evaluate(setting, *on(device, setting, *views), backend=backend, algorithm=algorithm)
    assert_exact(setting, got, exact(*views))


@pytest.mark.parametrize(("n", "d"), ALIGNED + RAGGED[:4])
def test_triton_is_at_most_twice_as_far_off_as_eager(setting, algorithm, device, n, d):
    """The band: an eighth of a float16 unit, or four roundings, of the loss; a quarter of the gradient's budget."""
    pytest.importorskip("triton")
    views = draw(n, d, seed=1)
    expected, inputs = exact(*views), on(device, setting, *views)
    triton, eager = (evaluate(setting, *inputs, backend=name, algorithm=algorithm) for name in ("triton", "eager"))
    unit = UNIT / 8 if setting.half else 4 * torch.finfo(setting.compute).eps
    error, base = (distance(found.loss, expected.loss) for found in (triton, eager))
    assert error <= 2 * base + max(unit * float(expected.loss), loss_budget(setting, expected) / 4), "loss"
    for view, right in enumerate(expected.gradients):
        error, base = (distance(found.gradients[view], right) for found in (triton, eager))
        band = gradient_budget(setting, expected, view) / 4 + rounding(setting, right)
        assert error <= 2 * base + band, f"gradient of z{view + 1}: {error:.2e}, eager {base:.2e}"


def _transposed(z):
    return z.T.contiguous().T


def _every_other_row(z):
    return z.repeat_interleave(2, dim=0)[::2]


def _every_other_column(z):
    return z.repeat_interleave(2, dim=1)[:, ::2]


def _one_element_in(z):
    """Starts one element after an allocation does: a 16-bit view is aligned to 2 bytes alone."""
    flat = z.new_empty(z.numel() + 1)
    flat[1:] = z.flatten()
    return flat[1:].view(z.shape)


def _odd_pitch(z):
    return torch.nn.functional.pad(z, (1, 2 + z.shape[1] % 2))[:, 1 : 1 + z.shape[1]]


@pytest.mark.parametrize("layout", [_transposed, _every_other_row, _every_other_column, _one_element_in, _odd_pitch])
@pytest.mark.parametrize(("n", "d"), [(64, 512), (33, 129)])
def test_p25_layout_changes_no_bit(setting, backend, algorithm, device, n, d, layout):
    z1, z2 = on(device, setting, *draw(n, d))
    settings = {"backend": backend, "algorithm": algorithm}
    plain = evaluate(setting, z1, z2, **settings)
    for views in ((layout(z1), z2), (z1, layout(z2)), (layout(z1), layout(z2))):
        for view, same in zip(views, (z1, z2), strict=True):
            assert torch.equal(view, same)
        got = evaluate(setting, *views, **settings)
        assert torch.equal(got.loss, plain.loss)
        for one, other in zip(got.gradients, plain.gradients, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shared", ["sample", "feature"])
def test_p25_expanded_view(setting, backend, algorithm, device, shared):
    """Stride 0 over samples (a collapsed view) or features (all of them equal)."""
    z1, z2 = on(device, setting, *draw(33, 129))
    expanded = (z1[:1] if shared == "sample" else z1[:, :1]).expand_as(z1)
    settings = {"backend": backend, "algorithm": algorithm}
    got, plain = (evaluate(setting, view, z2, **settings) for view in (expanded, expanded.contiguous()))
    assert torch.equal(got.loss, plain.loss)
    for one, other in zip(got.gradients, plain.gradients, strict=True):
        assert torch.equal(one, other)


def test_p25_inputs_are_never_written(setting, backend, algorithm, device):
    views = on(device, setting, *draw(33, 129))
    before, versions = [view.clone() for view in views], [view._version for view in views]
    evaluate(setting, *views, backend=backend, algorithm=algorithm)
    assert [view._version for view in views] == versions
    assert all(torch.equal(view, same) for view, same in zip(views, before, strict=True))


@pytest.mark.parametrize("name", ["float32", "float32 under bfloat16 autocast"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_p29_mean_1e4_std_1e_2(backend, algorithm, device, name, size):
    """Features far from 0: the gradient is within 1e-5 (two units in 16 bits) of float64 on the same float32 views."""
    setting = Setting(name, torch.float32, torch.bfloat16 if "autocast" in name else None)
    views = [(size + 1e-2 * view).float() for view in draw(64, 192)]
    got = evaluate(setting, *on(device, setting, *views), backend=backend, algorithm=algorithm)
    assert_exact(setting, got, exact(*views))


def test_means_far_apart_in_bfloat16(backend, algorithm, device):
    """A mean of its own for each feature, 40 times the spread, as bfloat16 rounds it: exact for what is left."""
    setting = Setting("bfloat16", torch.bfloat16, None)
    views = [(view + 40 * torch.linspace(-1, 1, 257)).bfloat16() for view in draw(64, 257)]
    got = evaluate(setting, *on(device, setting, *views), backend=backend, algorithm=algorithm)
    assert_exact(setting, got, exact(*(view.double() for view in views)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 32, 128), (1, 17, 64), (1, 32, 0)], ids=str)
def test_p26_nan_or_inf_anywhere_gives_nan(setting, backend, algorithm, device, bad, place):
    """In the first and the last row and feature, of either view; in the samples of the pivot and outside of them."""
    views = on(device, setting, *draw(33, 129))
    view, row, column = place
    views[view][row, column] = bad
    found = terms(setting, *views, backend=backend, algorithm=algorithm)
    assert found.loss.isnan()
    assert found.on_diagonal.isnan()
    assert terms(setting, *views, backend=backend, algorithm=algorithm, lambd=0.0).loss.isnan()


def test_an_outlier_does_not_overflow(setting, backend, algorithm, device):
    """One sample far from the rest: K_00 is D, and float16 holds it because the features are scaled by 1/√N."""
    z1, z2 = draw(64, 4096 if algorithm == "dual" else 256)
    z1[0], z2[0] = 512 * z1[0], 512 * z2[0]
    got = evaluate(setting, *on(device, setting, z1, z2), backend=backend, algorithm=algorithm)
    assert all(gradient.isfinite().all() for gradient in got.gradients)
    expected = exact(z1, z2)
    # Nearly all of the features' variance is that sample's, so the rounding of its one row is most of the error.
    assert distance(got.loss, expected.loss) <= 4 * loss_budget(setting, expected)


def test_more_features_than_float16_holds(device, backend):
    """|K| ≤ D: above 65504 features the products take float32."""
    setting = Setting("bfloat16", torch.bfloat16, None)
    z = torch.zeros(16, 65_536 + 16, dtype=torch.bfloat16, device=device)
    z[0] = 1
    loss = terms(setting, z, z, backend=backend, algorithm="dual", lambd=LAMBD).loss
    k = float((v := 15 / 256) / (v + 1e-5))
    d = z.shape[1]
    assert distance(loss, d * (1 - k) ** 2 + LAMBD * d * (d - 1) * k**2) <= 1e-5 * float(loss)


def test_offsets_beyond_2_to_the_31(backend, algorithm, device):
    """Rows so far apart that the last ones lie more than 2³¹ elements after the first: 4.3 GB of bfloat16."""
    n, d = 33, 128
    pitch = 2**31 // (n - 2)
    needed = 2 * (pitch * (n - 1) + d)
    free, _ = torch.cuda.mem_get_info(device)
    if free < 1.2 * needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of free memory, found {free / 1e9:.1f}")
    setting = Setting("bfloat16", torch.bfloat16, None)
    z1, z2 = on(device, setting, *draw(n, d))
    memory = torch.empty(pitch * (n - 1) + d, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((n, d), (pitch, 1)).copy_(z1)
    assert (n - 1) * far.stride(0) > 2**31
    settings = {"backend": backend, "algorithm": algorithm}
    got, plain = (evaluate(setting, view, z2, **settings) for view in (far, z1))
    assert torch.equal(got.loss, plain.loss)
    for one, other in zip(got.gradients, plain.gradients, strict=True):
        assert torch.equal(one, other)
    del memory, far, got
    torch.cuda.empty_cache()
