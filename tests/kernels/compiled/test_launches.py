"""The real launch code on a pretended GPU: what is launched, how often it is compiled, and that nobody waits for it."""

import collections
import inspect

import pytest
import torch
from chips import CHIPS
from fake_driver import pretended
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import barlow_loss
from barlow_loss import _plan, barlow_twins_loss
from barlow_loss._backends import triton
from barlow_loss._backends.triton._launch import column_tile, on_device_of
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._plan import Plan

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
OWN = ["whiten_kernel", "frobenius_kernel", "penalties_kernel", "backproject_kernel"]
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "copy_", "lift_fresh"}
TENSORS = {"z1", "z2", "u", "c", "rho", "parts", "a", "b", "weight", "loss", "on_diagonal", "off_diagonal"} | {
    *("p1", "p2", "q1", "q2", "dz1", "dz2", "of_loss")
}
# Operations that allocate or look at what is there, and launch nothing.
FREE = {
    "empty",
    "new_empty",
    "select",
    "t",
    "detach",
    "alias",
    "view",
    "slice",
    "unsqueeze",
    "expand",
    "permute",
    "diagonal",
}


class Operations(TorchDispatchMode):
    """Writes down every operation that would be a launch on a GPU, or more than one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step(n, d, algorithm="dual", z=BF16, u=F16, lambd=0.0051, needed=(True, True)):
    """Forward and backward of one process; returns the operations of either, but for the fill of ∂L/∂L = 1."""
    views = [torch.empty(n, d, dtype=z).requires_grad_(need) for need in needed]
    one = torch.ones(())
    plan = Plan(algorithm, "triton", torch.promote_types(z, F32), u)
    with Operations() as forward:
        loss, _, _ = loss_and_sums(*views, lambd, 1e-5, plan, Shards(ALONE, (n,)))
    with Operations() as backward:
        torch.autograd.grad(loss, [view for view in views if view.requires_grad], one.to(loss.dtype))
    return forward.names, backward.names


class TestTheDual:
    @pytest.mark.parametrize("lambd", [0.0051, torch.tensor(0.0051)], ids=["number", "tensor"])
    def test_is_eight_launches(self, pretended_h100, lambd):
        forward, backward = step(256, 8192, lambd=lambd)
        assert forward == ["whiten", "mm", "mm", "frobenius", "penalties"]
        assert backward == ["mm", "mm", "backproject"]
        assert [launch.kernel for launch in pretended_h100.launches] == OWN

    def test_is_seven_with_the_symmetric_gram(self, pretended_h100, monkeypatch):
        monkeypatch.setattr(triton, "SYMMETRIC_GRAM_FROM", 1)
        forward, backward = step(256, 8192)
        assert forward == ["whiten", "symmetric_grams", "frobenius", "penalties"]
        assert backward == ["mm", "mm", "backproject"]
        assert len(pretended_h100.launches) == 5

    def test_of_one_detached_view_is_seven(self, pretended_h100):
        _, backward = step(64, 2048, needed=(False, True))
        assert backward == ["mm", "backproject"]
        assert pretended_h100.count("backproject_kernel") == 1


def test_the_primal_launches(pretended_h100):
    """Not made for few launches: N is large there."""
    forward, backward = step(512, 128, "primal")
    assert forward[:2] == ["whiten", "mm"]
    assert forward[-1] == "penalties"
    assert backward == ["mm", "mm", "backproject"]
    assert [launch.kernel for launch in pretended_h100.launches] == [name for name in OWN if name != "frobenius_kernel"]


@pytest.mark.parametrize("algorithm", ["dual", "primal"])
def test_the_host_waits_for_nothing(pretended_h100, algorithm):
    """No operation reads a value back or copies one to the device; λ and the arriving gradient stay where they are."""
    names = {name for part in step(40, 100, algorithm, lambd=torch.tensor(0.1)) for name in part}
    assert not names & WAITS
    for launch in pretended_h100.launches:
        for name, value in launch.arguments.items():
            assert value is None or isinstance(value, torch.Tensor) == (name in TENSORS), f"{launch.kernel}: {name}"


@pytest.mark.parametrize("algorithm", ["dual", "primal"])
def test_few_compilations_over_batch_sizes(pretended_h100, algorithm):
    """A last batch, or a user who tries sizes, does not wait for a compiler each time: at most 3 for each kernel."""
    for n in range(2, 301):
        step(n, 96, algorithm)
    counts = collections.Counter(compilation.kernel for compilation in pretended_h100.compilations)
    assert set(counts) >= {"whiten_kernel", "penalties_kernel", "backproject_kernel"}
    assert max(counts.values()) <= 3, counts


def test_no_compilation_for_another_lambd_or_eps(pretended_h100):
    views = [torch.empty(20, 64, dtype=F16).requires_grad_() for _ in range(2)]
    for lambd, eps in ((0.0051, 1e-5), (1.0, 1e-3), (0.0, 0.0)):
        plan = Plan("dual", "triton", F32, F16)
        loss_and_sums(*views, lambd, eps, plan, Shards(ALONE, (20,)))[0].backward()
    assert len(pretended_h100.launches) == 12
    assert len(pretended_h100.compilations) == 4


LAYOUTS = {
    "contiguous": lambda z: z,
    "rows apart": lambda z: torch.cat([z] * 16, 1)[:, : z.shape[1]],
    "rows apart, unaligned": lambda z: torch.cat([z, z[:, :3]], 1)[:, : z.shape[1]],
    "every other row": lambda z: torch.cat([z, z], 1).view(-1, z.shape[1])[::2],
    "transposed": lambda z: z.T.contiguous().T,
    "every other column": lambda z: torch.stack([z, z], 2).flatten(1)[:, ::2],
    "off by one element": lambda z: torch.cat([z.flatten(), z[0]])[1 : 1 + z.numel()].view(z.shape),
    "one row for all": lambda z: z[:1].expand_as(z),
    "one column for all": lambda z: z[:, :1].expand_as(z),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "d"), [(40, 96), (40, 100), (40, 1), (2, 33)])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_a_layout_has_the_machine_code_of_its_contiguous_copy(pretended_h100, layout, n, d, dtype):
    """So that its sums are added in the same order, and P25 holds to the bit. The view is left as it is."""
    contiguous = torch.arange(n * d).to(dtype).view(n, d)
    view = LAYOUTS[layout](contiguous)
    before = view.clone(), view.stride()
    pivot = torch.zeros(2, d, dtype=torch.promote_types(dtype, F32))
    for z in (view, view.clone(memory_format=torch.contiguous_format)):
        triton.whiten(z, contiguous, 1e-5, F32)
        triton.standardize(triton.centre(z, contiguous, pivot)[0], pivot, pivot, F32)
    codes = collections.defaultdict(set)
    for launch in pretended_h100.launches:
        codes[launch.kernel].add(launch.specialization)
        assert torch.equal(launch.arguments["z1"], before[0]), "the kernel was given other numbers"
    assert {kernel: len(different) for kernel, different in codes.items()} == dict.fromkeys(codes, 1)
    assert set(codes) == {"whiten_kernel", "column_sums_kernel", "standardize_kernel"}
    assert torch.equal(view, before[0])
    assert view.stride() == before[1]


def test_aligned_rows_apart_are_not_copied(pretended_h100):
    """The two halves of one forward over both views, and z[:, 0] of (N, 2, D)."""
    both = torch.zeros(40, 2, 96, dtype=BF16)
    for z in (both[:, 0], both.view(80, 96)[40:]):
        triton.whiten(z, z, 1e-5, F16)
    assert [launch.arguments["z1"].data_ptr() for launch in pretended_h100.launches] == [
        both.data_ptr(),
        both.view(80, 96)[40:].data_ptr(),
    ]


@pytest.mark.parametrize(("d", "dtype"), [(96, BF16), (100, F32), (4096, BF16), (4100, F64)], ids=str)
def test_grids_cover_the_features(pretended_h100, d, dtype):
    step(40, d, z=dtype, u=dtype if dtype.itemsize > 2 else F16)
    grids = {launch.kernel: launch.grid for launch in pretended_h100.launches}
    width = column_tile(d, dtype).block_d
    assert grids["whiten_kernel"] == (-(-(-(-d // 16) * 16) // width), 1, 1)  # the padding is written as well
    assert grids["backproject_kernel"] == (-(-d // width), 1, 1)
    assert grids["penalties_kernel"] == (1, 1, 1)


@pytest.mark.parametrize("n", [2, 100, 4096])
def test_at_most_1024_parts_are_added_up_by_one_program(pretended_h100, n):
    k = torch.empty(n, n, dtype=F16)
    assert len(triton.frobenius(k, k)) == min(max(2, -(-n * n // 4096)), 1024)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize(("z", "u", "d"), [(BF16, F16, 512), (F32, F32, 100)], ids=str)
def test_the_whole_step_compiles_as_it_is_launched(monkeypatch, chip, z, u, d):
    """The types, the alignment and the options of real launches, not those of a table."""
    monkeypatch.setattr(triton, "SYMMETRIC_GRAM_FROM", 1)
    with pretended(CHIPS[chip], compiled=True) as gpu:
        step(32, d, z=z, u=u)
        step(32, d, "primal", z=z, u=u, lambd=torch.tensor(0.1))
    assert {launch.kernel for launch in gpu.launches} >= set(OWN)
    assert all(launch.shared <= CHIPS[chip].shared for launch in gpu.launches)


class TestOnFakeCudaTensors:
    """No kernel runs and no driver is asked; which operations are called for which tensors is all that shows."""

    @pytest.fixture(autouse=True)
    def _a_gpu(self, monkeypatch):
        monkeypatch.setattr(_plan, "_triton_on", lambda device_type, index: (None, True))

    @pytest.mark.parametrize(
        ("n", "d", "dtype", "algorithm"),
        [(64, 512, BF16, "dual"), (64, 512, F32, "dual"), (64, 50, F16, "primal"), (9, 33, F64, "dual")],
        ids=str,
    )
    def test_auto_takes_triton(self, n, d, dtype, algorithm):
        """The forward: torch's backward wants a GPU for a CUDA tensor, even a fake one."""
        with FakeTensorMode(), Operations() as operations:
            views = [torch.empty(n, d, dtype=dtype, device="cuda").requires_grad_() for _ in range(2)]
            loss = barlow_twins_loss(*views)
        assert {"whiten", "penalties"} <= set(operations.names)
        assert ("frobenius" in operations.names) == (algorithm == "dual")
        assert loss.dtype == torch.promote_types(dtype, F32)
        assert loss.device.type == "cuda"

    def test_eager_does_not(self):
        with FakeTensorMode(), Operations() as operations:
            views = [torch.empty(16, 64, device="cuda").requires_grad_() for _ in range(2)]
            barlow_twins_loss(*views, backend="eager")
        assert "whiten" not in operations.names

    def test_launches_go_to_the_tensor_s_own_device(self):
        with FakeTensorMode():
            guard = on_device_of(torch.empty(2, device="cuda:1"))
        assert isinstance(guard, torch.cuda.device)
        assert guard.idx == 1


def test_the_backend_offers_every_primitive():
    """With the arguments that the Protocol names."""
    protocol = barlow_loss._backends.Primitives
    names = [name for name in vars(protocol) if not name.startswith("_")]
    assert len(names) >= 8
    for name in names:
        assert hasattr(triton, name), name
        if name not in ("whiten", "standardize"):
            wanted = [
                parameter for parameter in inspect.signature(getattr(protocol, name)).parameters if parameter != "self"
            ]
            assert list(inspect.signature(getattr(triton, name)).parameters) == wanted, name
