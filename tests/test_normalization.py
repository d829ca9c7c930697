"""standardize and DistributedBatchNorm: parity with torch, float64-accurate statistics, AMP, compile, conversion."""

import copy
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from barlow_loss.normalization import DistributedBatchNorm, standardize

# (N, C), sequences, images, volumes; odd sizes, one sample of several values, and a batch above the pivot's 32 rows.
SHAPES = [(7, 5), (67, 3), (5, 3, 11), (1, 3, 5), (6, 3, 5, 7), (2, 3, 2, 3, 4)]
TORCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reference_standardize(z, eps=1e-5):
    """The definition, by autograd in float64."""
    x = z.double() - z.double().mean(0)
    return x / (x.square().mean(0) + eps).sqrt()


def value_and_gradient(function, z, g):
    z = z.detach().clone().requires_grad_()
    y = function(z)
    return y.detach(), torch.autograd.grad(y, z, g.to(y.dtype))[0]


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def twins(shape, **settings):
    """nn.BatchNorm*d and ours, with the same random parameters."""
    theirs = TORCH_NORM[len(shape)](shape[1], **settings)
    ours = DistributedBatchNorm(shape[1], **settings)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


# standardize


@given(
    n=st.integers(2, 70),
    d=st.integers(1, 9),
    mean=st.floats(-100, 100),
    log_std=st.floats(-3, 3),
    log_eps=st.floats(-8, 0),
    seed=st.integers(0, 2**31),
)
def test_standardize_is_its_definition(n, d, mean, log_std, log_eps, seed):
    generator = torch.Generator().manual_seed(seed)
    z = mean + 10**log_std * torch.randn(n, d, generator=generator, dtype=torch.float64)
    g = torch.randn(n, d, generator=generator, dtype=torch.float64)
    eps = 10**log_eps
    y, grad = value_and_gradient(lambda z: standardize(z, eps), z, g)
    expected_y, expected_grad = value_and_gradient(lambda z: reference_standardize(z, eps), z, g)
    assert relative_error(y, expected_y) < 1e-10
    # The gradient of N = 2 is a cancellation down to ε/(v + ε): measured against what is subtracted.
    band = 1e-9 * ((10 ** (2 * log_std) + eps) ** -0.5) * g.norm()
    assert (grad - expected_grad).norm() < 1e-9 * expected_grad.norm() + band


@given(n=st.integers(2, 40), d=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_standardized_features_are_centred_and_of_variance_k(n, d, seed):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eps, v = 0.1, z.var(0, correction=0)
    y = standardize(z, eps)
    torch.testing.assert_close(y.mean(0), torch.zeros(d, dtype=y.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.square().mean(0), v / (v + eps), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (1e4, 1.0), (-3e6, 1.0), (1e-4, 1e-3)])
def test_large_means_are_float64_accurate_where_batch_norm_is_not(mean, std):
    generator = torch.Generator().manual_seed(0)
    z = (mean + std * torch.randn(256, 64, generator=generator, dtype=torch.float64)).float()
    g = torch.randn(256, 64, generator=generator)
    expected_y, expected_grad = value_and_gradient(reference_standardize, z, g)
    expected_grad = expected_grad.double()
    y, grad = value_and_gradient(standardize, z, g)
    assert relative_error(y, expected_y) < 2e-6
    assert relative_error(grad, expected_grad) < 1e-5
    if mean == 1e4 and std == 1e-2:
        _, torch_grad = value_and_gradient(lambda z: F.batch_norm(z, None, None, training=True), z, g)
        assert relative_error(torch_grad, expected_grad) > 1e-3  # 7e-3


def test_sorted_batches_and_outliers_stay_accurate():
    """The pivot comes from 32 rows of all the batch, wherever it is sorted or its first rows are far away."""
    generator = torch.Generator().manual_seed(0)
    ordered = (1e4 + torch.linspace(-1, 1, 512, dtype=torch.float64)[:, None].expand(512, 8)).float()
    outlier = 1e4 + torch.randn(512, 8, generator=generator)
    outlier[0] = -1e4
    front = torch.randn(16384, 8, generator=generator)
    front[:32] += 100
    for z in (ordered, outlier, front):
        g = torch.randn(z.shape, generator=generator)
        expected_y, expected_grad = value_and_gradient(reference_standardize, z, g)
        y, grad = value_and_gradient(standardize, z, g)
        assert relative_error(y, expected_y) < 2e-6
        assert relative_error(grad, expected_grad.double()) < 1e-5


def test_constant_features_are_exactly_zero_with_zero_gradient():
    z = torch.randn(33, 4)
    z[:, 1], z[:, 3] = 0.1, -12345.678
    y, grad = value_and_gradient(standardize, z, torch.randn(33, 4))
    assert torch.equal(y[:, [1, 3]], torch.zeros(33, 2))
    # g − mean(g) is left, times 1/√ε: finite, and it sums to 0.
    assert grad.isfinite().all()
    assert grad[:, [1, 3]].sum(0).abs().max() < 1e-5 * grad.abs().max()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38, 1e20])
@pytest.mark.parametrize("row", [0, 5, 40])
def test_what_has_no_finite_variance_is_nan_not_zero(poison, row):
    z = torch.randn(41, 3)
    z[row, 1] = poison
    y, grad = value_and_gradient(standardize, z, torch.ones(41, 3))
    assert y[:, 1].isnan().all()
    assert grad[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs_are_computed_in_float32(dtype, autocast):
    z = (torch.randn(64, 16) + 30).to(dtype)
    g = torch.randn(64, 16).to(dtype)
    expected_y, expected_grad = value_and_gradient(reference_standardize, z, g)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, grad = value_and_gradient(standardize, z, g)
    assert y.dtype == grad.dtype == dtype
    assert torch.equal(y, expected_y.to(dtype)) or relative_error(y, expected_y) < torch.finfo(dtype).eps / 2
    assert relative_error(grad, expected_grad.double()) < torch.finfo(dtype).eps


def test_autocast_does_not_touch_float32():
    z, g = torch.randn(64, 16) + 100, torch.randn(64, 16)
    plain = value_and_gradient(standardize, z, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_gradient(standardize, z, g)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, mixed, strict=True))


def test_standardize_leaves_its_input_alone_and_takes_any_strides():
    base = torch.randn(20, 12)
    for z in (base.T, base[::2], base[:, 3:7], base[:, :1].expand(20, 5)):
        before, version = z.clone(), z._version
        torch.testing.assert_close(standardize(z), standardize(z.contiguous()), atol=1e-6, rtol=1e-6)
        assert torch.equal(z, before)
        assert z._version == version


def test_standardize_without_grad_modes():
    z = torch.randn(8, 4, requires_grad=True)
    with torch.no_grad():
        quiet = standardize(z)
    with torch.inference_mode():
        inferred = standardize(z)
    assert not quiet.requires_grad
    assert torch.equal(quiet, standardize(z))
    assert torch.equal(quiet, inferred)


def test_derivatives_of_both_orders():
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(standardize, (z, 0.1))
    assert gradgradcheck(standardize, (z, 0.1))


@pytest.mark.parametrize(
    ("z", "error", "match"),
    [
        ([1.0, 2.0], TypeError, "standardize: expected z to be a tensor, got list"),
        (torch.ones(4, 3, dtype=torch.long), TypeError, r"torch\.int64"),
        (torch.ones(4, 3, dtype=torch.complex64), TypeError, r"torch\.complex64"),
        (torch.ones(4), ValueError, r"\(N, D\).*\(4,\)"),
        (torch.ones(4, 3, 2), ValueError, r"\(4, 3, 2\).*flatten"),
        (torch.ones(1, 3), ValueError, r"N ≥ 2.*\(1, 3\)"),
        (torch.ones(4, 0), ValueError, r"D ≥ 1.*\(4, 0\)"),
    ],
)
def test_standardize_names_what_is_wrong(z, error, match):
    with pytest.raises(error, match=match):
        standardize(z)


@pytest.mark.parametrize(("eps", "error"), [(-1e-5, ValueError), (math.nan, ValueError), ("1e-5", TypeError)])
def test_eps_is_checked(eps, error):
    with pytest.raises(error, match="eps"):
        standardize(torch.ones(4, 3), eps)
    with pytest.raises(error, match="eps"):
        DistributedBatchNorm(3, eps)


# DistributedBatchNorm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_training_steps_equal_torchs(shape, settings):
    """Outputs, gradients, running statistics and the step counter over several steps, then eval()."""
    theirs, ours = twins(shape, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        z = step + torch.randn(shape, generator=generator)
        g = torch.randn(shape, generator=generator)
        expected, got = value_and_gradient(theirs, z, g), value_and_gradient(ours, z, g)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            expected_grad = torch.autograd.grad(theirs(z), b, g)[0]
            torch.testing.assert_close(torch.autograd.grad(ours(z), a, g)[0], expected_grad, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-5, rtol=1e-5)
    ours.eval(), theirs.eval()
    state = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(value_and_gradient(ours, z, g), value_and_gradient(theirs, z, g), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.state_dict(), state, atol=0, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_parameter_gradients_in_one_backward(training):
    """Gradients by .grad, for all inputs at once and for a subset."""
    theirs, ours = twins((6, 3, 5, 7))
    for norm in (theirs, ours):
        norm(torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 3 + 2)
        norm.train(training).bias.requires_grad_(False)
        norm(torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(2))).square().mean().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-6, rtol=1e-5)
    assert ours.bias.grad is None


@pytest.mark.parametrize("shape", [(6, 3), (3, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layer_derivatives_of_both_orders(shape, training):
    norm = DistributedBatchNorm(3, eps=0.1, dtype=torch.float64).train(training)
    norm.running_mean.normal_()
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind()

    def apply(z, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (z,))

    inputs = (z, weight.requires_grad_(), bias.requires_grad_())
    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


def test_gradient_penalty_equals_torchs():
    """create_graph=True through a layer, as a gradient penalty does it."""
    theirs, ours = twins((8, 3, 4, 4))
    z = torch.randn(8, 3, 4, 4)
    penalties = []
    for norm in (theirs, ours):
        norm.double()
        x = z.double().requires_grad_()
        (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), [x, norm.weight, norm.bias]))
    torch.testing.assert_close(penalties[1], penalties[0])


def test_layer_is_accurate_at_large_means_in_training_and_in_eval():
    generator = torch.Generator().manual_seed(0)
    z = (1e4 + 1e-2 * torch.randn(16, 8, 6, 6, generator=generator, dtype=torch.float64)).float()
    g = torch.randn(z.shape, generator=generator)
    rows = z.double().movedim(1, -1).reshape(-1, 8)
    expected_y, expected_grad = value_and_gradient(reference_standardize, rows, g.movedim(1, -1).reshape(-1, 8))
    norm = DistributedBatchNorm(8, momentum=1.0)
    y, grad = value_and_gradient(norm, z, g)
    assert relative_error(y.movedim(1, -1).reshape(-1, 8), expected_y) < 2e-6
    assert relative_error(grad.movedim(1, -1).reshape(-1, 8), expected_grad) < 1e-5
    torch.testing.assert_close(norm.running_var.double(), rows.var(0), atol=0, rtol=1e-6)

    norm.eval()
    mean, var = norm.running_mean.double(), norm.running_var.double()
    expected = (rows - mean) / (var + norm.eps).sqrt()
    assert relative_error(norm(z).detach().movedim(1, -1).reshape(-1, 8), expected) < 1e-6


def test_non_finite_running_variance_is_nan_not_zero():
    norm = DistributedBatchNorm(2).eval()
    norm.running_var[1] = math.inf
    y = norm(torch.randn(4, 2))
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("training", [True, False])
def test_16_bit_layers(dtype, parameters, training):
    norm = DistributedBatchNorm(3, dtype=dtype if parameters == "same" else torch.float32).train(training)
    z, g = (torch.randn(6, 3, 5, 5) * 2 + 1).to(dtype), torch.randn(6, 3, 5, 5).to(dtype)
    wide = copy.deepcopy(norm).double()
    expected_y, expected_grad = value_and_gradient(wide, z.double(), g)
    y, grad = value_and_gradient(norm, z, g)
    assert y.dtype == grad.dtype == dtype
    assert relative_error(y, expected_y) < torch.finfo(dtype).eps
    assert relative_error(grad, expected_grad) < torch.finfo(dtype).eps
    assert relative_error(norm.running_var, wide.running_var) < 2 * torch.finfo(norm.running_var.dtype).eps
    norm(z).sum().backward()
    assert norm.weight.grad.dtype == norm.weight.dtype


def test_autocast_trains_a_network_as_in_float32():
    network = DistributedBatchNorm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = network[0](torch.randn(4, 3, 8, 8))
        y = network[1:](hidden)
        y.float().square().mean().backward()
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert network[1].running_mean.dtype == torch.float32
    expected = hidden.double().mean((0, 2, 3)) * 0.1
    torch.testing.assert_close(network[1].running_mean.double(), expected, atol=1e-7, rtol=1e-5)
    assert network[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays(training):
    norm = DistributedBatchNorm(5).train(training)
    z = torch.randn(4, 5, 6, 7)
    g = torch.randn(4, 5, 6, 7)
    last = z.to(memory_format=torch.channels_last).requires_grad_()
    y = norm(last)
    y.backward(g.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    expected, expected_grad = value_and_gradient(norm, z, g)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_memory_saved_for_backward_is_the_input_and_vectors():
    """No more full-size tensors than nn.BatchNorm keeps, and no copy: the input itself."""
    z = torch.randn(64, 32, 4, 4, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        DistributedBatchNorm(32)(z)
    full = [tensor for tensor in kept if tensor.numel() > 32]
    assert len(full) == 1
    assert full[0].data_ptr() == z.data_ptr()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_without_graph_breaks(backend, training, momentum):
    torch.compiler.reset()
    plain = DistributedBatchNorm(3, momentum=momentum).train(training)
    norm = copy.deepcopy(plain)
    compiled = torch.compile(norm, fullgraph=True, backend=backend)
    for n in (6, 9):  # the second size makes the shapes dynamic
        z, g = torch.randn(n, 3, 5, 5), torch.randn(n, 3, 5, 5)
        torch.testing.assert_close(value_and_gradient(compiled, z, g), value_and_gradient(plain, z, g))
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standardize_compiles_without_graph_breaks(dtype):
    torch.compiler.reset()
    compiled = torch.compile(standardize, fullgraph=True, backend="aot_eager")
    z, g = torch.randn(40, 6).to(dtype), torch.randn(40, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value_and_gradient(compiled, z, g), value_and_gradient(standardize, z, g))


def test_exports():
    norm = DistributedBatchNorm(3).eval()
    z = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.export.export(norm, (z,)).module()(z), norm(z))


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_tracing_leaves_the_layer_whole(training):
    """As torch's own layers, which torch.fx does not enter: conv and norm are found, features are taken in between."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), DistributedBatchNorm(3), nn.ReLU()).train(training)
    x = torch.randn(4, 2, 5, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.op for node in traced.graph.nodes][1:-1] == ["call_module"] * 3
    assert torch.equal(traced(x), model(x))
    for name, value in traced.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_torchvision_takes_features_of_a_converted_network():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    network = DistributedBatchNorm.convert(pytest.importorskip("torchvision.models").resnet18()).eval()
    taken = extraction.create_feature_extractor(network, {"layer1.0.bn1": "norm", "flatten": "features"})
    x = torch.randn(2, 3, 32, 32)
    network.fc = nn.Identity()
    found = taken(x)
    assert torch.equal(found["features"], network(x))
    assert found["norm"].shape == (2, 64, 8, 8)


def test_functional_transforms():
    """Of batch statistics and of given ones; running statistics of many batches at once cannot be kept."""
    for norm in (standardize, DistributedBatchNorm(3, track_running_stats=False), DistributedBatchNorm(3).eval()):
        z, stacked, tangent = torch.randn(8, 3), torch.randn(2, 8, 3), torch.randn(8, 3)
        (expected,) = torch.autograd.grad(norm(z.requires_grad_()).pow(3).sum(), z)
        z = z.detach()
        torch.testing.assert_close(torch.func.grad(lambda z, norm=norm: norm(z).pow(3).sum())(z), expected)
        torch.testing.assert_close(torch.func.vmap(norm)(stacked), torch.stack([norm(one) for one in stacked]))
        jacobian = torch.autograd.functional.jacobian(norm, z)
        torch.testing.assert_close(torch.func.jacrev(norm)(z), jacobian)
        torch.testing.assert_close(torch.autograd.functional.jacobian(norm, z, vectorize=True), jacobian)
        torch.testing.assert_close(torch.func.jacfwd(norm)(z), jacobian)
        expected = (jacobian * tangent).sum((2, 3))
        torch.testing.assert_close(torch.func.jvp(norm, (z,), (tangent,))[1], expected)
    with pytest.raises(RuntimeError, match=r"many by torch\.vmap\. Pass track_running_stats=False"):
        torch.func.vmap(DistributedBatchNorm(3))(stacked)


def test_activation_checkpointing():
    norm = DistributedBatchNorm(3, momentum=None)
    z = torch.randn(8, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(norm(z).pow(3).sum(), z)
    (got,) = torch.autograd.grad(checkpoint(norm, z, use_reentrant=False).pow(3).sum(), z)
    assert torch.equal(got, expected)


def test_meta_tensors_have_shapes():
    norm = DistributedBatchNorm(3, device="meta")
    assert norm(torch.empty(4, 3, 5, device="meta")).shape == (4, 3, 5)
    assert norm.eval()(torch.empty(4, 3, 5, device="meta")).shape == (4, 3, 5)


def test_an_input_changed_before_backward_is_noticed():
    z = torch.randn(8, 3, requires_grad=True) * 1
    y = DistributedBatchNorm(3)(z)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_pass_and_teach_nothing(shape, training):
    norm = DistributedBatchNorm(3).train(training)
    before = copy.deepcopy(norm.state_dict())
    y = norm(torch.empty(shape))
    y.sum().backward()
    assert y.shape == shape
    assert torch.equal(norm.weight.grad, torch.zeros(3))
    before["num_batches_tracked"] += training  # torch counts it, too
    torch.testing.assert_close(norm.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel_raises_as_torch_does(shape):
    theirs, ours = twins(shape)
    for norm in (theirs, ours):
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training"):
            norm(torch.randn(shape))
        norm.eval()(torch.randn(shape))


@pytest.mark.parametrize(
    ("z", "error", "match"),
    [
        (torch.ones(4), ValueError, r"\(N, C, \*\) with C = 3.*\(4,\)"),
        (torch.ones(4, 5), ValueError, r"C = 3.*\(4, 5\)"),
        (torch.ones(4, 5, 3), ValueError, r"C = 3.*\(4, 5, 3\)"),
        (torch.ones(4, 3, dtype=torch.int32), TypeError, r"input.*torch\.int32"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_layer_names_what_is_wrong(z, error, match, training):
    with pytest.raises(error, match=match):
        DistributedBatchNorm(3).train(training)(z)


def test_repr_is_torchs():
    theirs, ours = twins((4, 3), momentum=None, affine=False)
    assert repr(ours) == repr(theirs).replace("BatchNorm1d", "DistributedBatchNorm")


# convert


def network() -> nn.Sequential:
    shared = nn.BatchNorm1d(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, eps=0.01, momentum=None),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6, affine=False, track_running_stats=False)),
        nn.Flatten(),
        nn.LazyLinear(4),
        shared,
        nn.ReLU(),
        shared,
        nn.SyncBatchNorm(4).eval(),
    )


def test_convert_replaces_every_batch_norm_and_keeps_all_else():
    model = network()
    for _ in range(2):
        model[:-1](torch.randn(5, 3, 6, 6))
    before = copy.deepcopy(model)
    identities = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert DistributedBatchNorm.convert(model) is model

    assert identities == {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert [type(layer) for layer in model if isinstance(layer, nn.modules.batchnorm._BatchNorm)] == (
        [DistributedBatchNorm] * 4
    )
    assert type(model[2][1]) is DistributedBatchNorm
    assert model[5] is model[7]  # one layer under two names stays one layer
    assert [layer.training for layer in model] == [layer.training for layer in before]
    torch.testing.assert_close(model.state_dict(), before.state_dict(), atol=0, rtol=0)

    x, g = torch.randn(5, 3, 6, 6), torch.randn(5, 4)
    before[8] = nn.BatchNorm1d(4).eval()  # nn.SyncBatchNorm has no CPU
    model(x).backward(g)
    before(x).backward(g)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    optimizer.step()
    assert not torch.equal(model[5].weight, before[5].weight)


def test_convert_of_a_layer_returns_the_new_layer():
    old = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    new = DistributedBatchNorm.convert(old)
    assert type(new) is DistributedBatchNorm
    assert new.weight is old.weight
    assert (new.training, new.weight.dtype, new.running_mean.dtype) == (False, torch.float64, torch.float64)
    assert DistributedBatchNorm.convert(new) is new
    assert isinstance(DistributedBatchNorm.convert(nn.Linear(2, 2)), nn.Linear)


def test_convert_keeps_or_sets_the_process_group():
    group, other = (torch.distributed.ProcessGroup(0, size) for size in (2, 3))
    sync = nn.SyncBatchNorm(3, process_group=group)
    assert DistributedBatchNorm.convert(sync).process_group is group
    assert DistributedBatchNorm.convert(sync, other).process_group is other
    assert DistributedBatchNorm.convert(nn.BatchNorm1d(3)).process_group is None


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm1d).parameters, reason="this torch has no such layer")
def test_convert_keeps_a_missing_bias():
    old = nn.BatchNorm1d(3, bias=False)
    new = DistributedBatchNorm.convert(old)
    assert new.bias is None
    assert "bias=False" in repr(new)
    z = torch.randn(8, 3)
    torch.testing.assert_close(new(z), old(z), atol=1e-6, rtol=1e-5)


def test_convert_never_drops_what_a_subclass_adds():
    class BatchNormReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Renamed(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormReLU(3))
    with pytest.raises(TypeError, match="BatchNormReLU"):
        DistributedBatchNorm.convert(model)
    assert type(model[0]) is nn.BatchNorm2d  # nothing was converted halfway
    assert type(DistributedBatchNorm.convert(Renamed(3))) is DistributedBatchNorm
    with pytest.raises(ValueError, match="LazyBatchNorm1d that has seen no input"):
        DistributedBatchNorm.convert(nn.Sequential(nn.LazyBatchNorm1d()))


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan, True, "0.1"])
def test_a_momentum_out_of_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"expected momentum in \[0, 1\] or None"):
        DistributedBatchNorm(3, momentum=momentum)


@pytest.mark.parametrize("flag", ["affine", "track_running_stats", "bias"])
def test_a_flag_is_true_or_false(flag):
    with pytest.raises(TypeError, match=f"expected {flag} to be True or False, got 'no'"):
        DistributedBatchNorm(3, **{flag: "no"})


def test_convert_keeps_dropout_and_activation_of_timms_layer():
    timm = pytest.importorskip("timm")
    encoder = timm.create_model("mobilenetv3_small_050")
    before = encoder.state_dict()
    layer = timm.layers.BatchNormAct2d(3, act_layer=nn.GELU, drop_layer=nn.Dropout)
    z = torch.randn(4, 3, 5, 5)
    layer.drop.p = 0.0
    expected, new = layer(z), DistributedBatchNorm.convert(layer)
    torch.testing.assert_close(new(z), expected)
    assert isinstance(new, DistributedBatchNorm)
    assert isinstance(new.act, nn.GELU)
    traced = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(new)))  # its activation is done once
    torch.testing.assert_close(traced(z), expected)
    after = DistributedBatchNorm.convert(encoder).state_dict()
    assert all(after[name] is value or torch.equal(after[name], value) for name, value in before.items())
    assert not [type(part) for part in encoder.modules() if type(part) is timm.layers.BatchNormAct2d]


def test_update_bn_knows_the_layer():
    """Tools that look for batch normalisation find it, here stochastic weight averaging."""
    model = nn.Sequential(nn.Linear(4, 3), DistributedBatchNorm(3))
    torch.optim.swa_utils.update_bn([torch.randn(8, 4) for _ in range(3)], model)
    assert model[1].num_batches_tracked == 3


def test_many_rows_cost_no_digits():
    """F.batch_norm adds up the rows of (N, C) in float32 one after another (torch 2.14.1, CPU)."""
    z = torch.randn(2**19, 2, generator=torch.Generator().manual_seed(0))
    expected = reference_standardize(z.double())
    assert relative_error(standardize(z), expected) < 5e-7
    assert relative_error(F.batch_norm(z, None, None, training=True), expected) > 5e-6


def _converted_by_lightning(model):
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    return TorchSyncBatchNorm().apply(model)


def _converted_by_timm(model):
    return pytest.importorskip("timm.layers").convert_sync_batchnorm(model)


def convert_syncbn_model(model):
    """As apex goes through a model."""
    for name, child in model.named_children():
        model.add_module(name, convert_syncbn_model(child))
    return nn.SyncBatchNorm(3) if isinstance(model, nn.modules.batchnorm._BatchNorm) else model


@pytest.mark.parametrize(
    "convert",
    [nn.SyncBatchNorm.convert_sync_batchnorm, _converted_by_timm, _converted_by_lightning, convert_syncbn_model],
)
def test_the_conversions_to_torchs_own_are_refused(convert):
    """They would replace the layer, and forget its group."""
    for model in (DistributedBatchNorm(3), nn.Sequential(nn.Linear(3, 3), nn.Sequential(DistributedBatchNorm(3)))):
        with pytest.raises(RuntimeError, match=r"sync_batchnorm=False\); DistributedBatchNorm.convert\(model\)"):
            convert(model)
        assert type(list(model.modules())[-1]) is DistributedBatchNorm


def test_its_children_are_those_of_every_module():
    layer = DistributedBatchNorm(3)
    assert list(layer.children()) == []
    layer.add_module("act", nn.ReLU())
    assert [name for name, _ in layer.named_children()] == ["act"]
    assert len(list(layer.modules())) == 2
