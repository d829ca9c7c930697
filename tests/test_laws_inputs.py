"""Laws of the inputs: strides do not matter, nothing is written to them, NaN and inf are never masked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barlow_loss import barlow_twins_loss
from comparison import assert_bitwise, evaluate
from strategies import batches

# Another layout of the same numbers.
LAYOUTS = {
    "transposed": lambda z: z.T.contiguous().T,
    "every other row": lambda z: z.repeat_interleave(2, dim=0)[::2],
    "every other column": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda z: torch.cat([z[:1], z])[1:],
    "row pitch": lambda z: torch.nn.functional.pad(z, (0, 3))[:, : z.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(batch=batches())
def test_p25_strided_input_equals_its_contiguous_copy(algorithm, dtype, layout, batch):
    """The same numbers in another layout give the same bits."""
    z1, z2 = batch.views(dtype)
    strided = LAYOUTS[layout](z1)
    expected = evaluate(z1, z2, algorithm=algorithm)
    assert torch.equal(strided, z1)
    assert_bitwise(evaluate(strided, z2, algorithm=algorithm), expected)
    assert_bitwise(evaluate(strided, LAYOUTS[layout](z2), algorithm=algorithm), expected)


@pytest.mark.parametrize("shared", ["sample", "feature"])
@given(batch=batches())
def test_p25_expanded_input_equals_its_contiguous_copy(algorithm, dtype, shared, batch):
    """An expanded tensor shares its memory between rows or columns; it is read like any other."""
    z1, z2 = batch.views(dtype)
    expanded = (z1[:1] if shared == "sample" else z1[:, :1]).expand_as(z1)
    got = evaluate(expanded, z2, algorithm=algorithm)
    assert_bitwise(got, evaluate(expanded.contiguous(), z2, algorithm=algorithm))


@given(batch=batches())
def test_p25_inputs_are_never_mutated(algorithm, dtype, batch):
    """Neither forward nor backward writes to the views: same contents, same version counter."""
    leaves = [view.requires_grad_() for view in batch.views(dtype)]
    before = [view.detach().clone() for view in leaves]
    versions = [view._version for view in leaves]
    barlow_twins_loss(*leaves, algorithm=algorithm).backward()
    assert [view._version for view in leaves] == versions
    for view, contents in zip(leaves, before, strict=True):
        assert torch.equal(view.detach(), contents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(
    batch=batches(means=(0.0,), stds=(1.0,)),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    view=st.integers(0, 1),
    position=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_p26_nan_or_inf_anywhere_gives_nan(algorithm, dtype, batch, bad, view, position):
    """One bad element in either view: the loss and the on-diagonal sum are NaN, whatever the other numbers are."""
    views = batch.views(dtype)
    views[view][position[0] % batch.n, position[1] % batch.d] = bad
    terms = barlow_twins_loss(*views, algorithm=algorithm, return_terms=True)
    assert terms.loss.isnan()
    assert terms.on_diagonal.isnan()
    assert batch.d == 1 or terms.off_diagonal.isnan()
    assert barlow_twins_loss(*views, lambd=0.0, algorithm=algorithm).isnan()
