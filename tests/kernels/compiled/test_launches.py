"""The real launch code on a pretended GPU: what is launched, how often it is compiled, and that nobody waits for it."""

import collections
import contextlib
import inspect
import itertools
import random
import types

import pytest
import torch
import triton as triton_package
from chips import CHIPS
from fake_driver import pretended
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_loss import _plan, barlow_twins_loss
from barlow_loss._backends import eager, triton
from barlow_loss._backends.triton import _frobenius, _input_gradients, _loss_terms, _standardize, _views
from barlow_loss._backends.triton._launch import Kernel, column_tile
from barlow_loss._collectives import ALONE, Shards
from barlow_loss._function import loss_and_sums
from barlow_loss._pairs import all_alike, normalized
from barlow_loss._plan import Plan

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
OWN = ["fused_standardize_kernel", "frobenius_kernel", "loss_terms_kernel", "input_gradients_kernel"]
OPERATIONS = [
    _standardize.fused_standardize,
    _frobenius.frobenius,
    _loss_terms.loss_terms,
    _input_gradients.input_gradients,
]
LAUNCHERS = [
    (_standardize, "_fused_standardize"),
    (_frobenius, "_frobenius"),
    (_loss_terms, "_loss_terms"),
    (_input_gradients, "_input_gradients"),
    (_views, "_pair_dots"),
    (_views, "_mix"),
    (_views, "_view_gradient"),
]
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "copy_", "lift_fresh"}
TENSORS = {"z1", "z2", "u", "c", "rho", "parts", "a", "b", "weight", "loss", "on_diagonal", "off_diagonal"} | {
    *("p1", "p2", "q1", "q2", "dz1", "dz2", "grad_loss")
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
    "unbind",
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
    plan = Plan(algorithm, "triton", torch.promote_types(z, F32), u, weights=all_alike(len(views)))
    with Operations() as forward:
        loss, _, _ = loss_and_sums(views, lambd, 1e-5, plan, Shards(ALONE, (n,)))
    with Operations() as backward:
        torch.autograd.grad(loss, [view for view in views if view.requires_grad], one.to(loss.dtype))
    return forward.names, backward.names


class TestTheDual:
    @pytest.mark.parametrize("lambd", [0.0051, torch.tensor(0.0051)], ids=["number", "tensor"])
    def test_is_eight_launches(self, pretended_h100, lambd):
        forward, backward = step(256, 8192, lambd=lambd)
        assert forward == ["fused_standardize", "mm", "mm", "frobenius", "loss_terms"]
        assert backward == ["mm", "mm", "input_gradients"]
        assert [launch.kernel for launch in pretended_h100.launches] == OWN

    def test_of_one_detached_view_is_seven(self, pretended_h100):
        _, backward = step(64, 2048, needed=(False, True))
        assert backward == ["mm", "input_gradients"]
        assert pretended_h100.count("input_gradients_kernel") == 1


class TestMoreViews:
    @pytest.mark.parametrize("views", [3, 4, 5, 8])
    @pytest.mark.parametrize(("z", "u"), [(BF16, F16), (F32, F32)], ids=str)
    def test_the_dual_is_at_most_4_v_plus_4_launches(self, pretended_h100, views, z, u):
        forward, backward = step(256, 512, z=z, u=u, needed=(True,) * views)
        couples = -(-views // 2)
        expected = [*["fused_standardize"] * couples, "pair_dots", "cat", *["mm"] * views, "mix", "loss_terms"]
        assert forward == expected
        assert backward == ["mm", "view_gradient"] * views
        assert len(forward) + len(backward) <= 4 * views + 4

    def test_views_without_gradient_cost_nothing_in_the_backward(self, pretended_h100):
        _, backward = step(64, 512, needed=(True, False, False, True))
        assert backward == ["mm", "view_gradient"] * 2

    @pytest.mark.parametrize("algorithm", ["dual", "primal"])
    def test_few_compilations(self, pretended_h100, algorithm):
        """Over batch sizes: at most 3 for each kernel, and not one for each view."""
        for n in range(2, 120):
            step(n, 96, algorithm, needed=(True,) * 4)
        counts = collections.Counter(compilation.kernel for compilation in pretended_h100.compilations)
        assert max(counts.values()) <= 3, counts

    def test_the_host_waits_for_nothing(self, pretended_h100):
        names = {name for part in step(40, 100, lambd=torch.tensor(0.1), needed=(True,) * 3) for name in part}
        assert not names & WAITS

    @pytest.mark.parametrize(
        "chip", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_120", "gfx942"))]
    )
    def test_the_whole_step_compiles_as_it_is_launched(self, chip):
        with pretended(CHIPS[chip], compiled=True) as gpu:
            step(32, 512, needed=(True,) * 3)
            step(32, 100, "primal", z=F32, u=F32, lambd=torch.tensor(0.1), needed=(True,) * 4)
        kernels = {"pair_dots_kernel", "mix_kernel", "view_gradient_kernel", "loss_terms_kernel"}
        assert {launch.kernel for launch in gpu.launches} >= kernels
        assert all(launch.shared <= CHIPS[chip].shared for launch in gpu.launches)


def test_the_primal_launches(pretended_h100):
    """Not made for few launches: N is large there."""
    forward, backward = step(512, 128, "primal")
    assert forward[:2] == ["fused_standardize", "mm"]
    assert forward[-1] == "loss_terms"
    assert backward == ["mm", "mm", "input_gradients"]
    assert [launch.kernel for launch in pretended_h100.launches] == [name for name in OWN if name != "frobenius_kernel"]


@pytest.mark.parametrize("algorithm", ["dual", "primal"])
def test_the_host_waits_for_nothing(pretended_h100, algorithm):
    """No operation reads a value back or copies one to the device; λ and the incoming gradient stay where they are."""
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
    assert set(counts) >= {"fused_standardize_kernel", "loss_terms_kernel", "input_gradients_kernel"}
    assert max(counts.values()) <= 3, counts


def test_no_compilation_for_another_lambd_or_eps(pretended_h100):
    views = [torch.empty(20, 64, dtype=F16).requires_grad_() for _ in range(2)]
    for lambd, eps in ((0.0051, 1e-5), (1.0, 1e-3), (0.0, 0.0)):
        plan = Plan("dual", "triton", F32, F16)
        loss_and_sums(views, lambd, eps, plan, Shards(ALONE, (20,)))[0].backward()
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
        _standardize.fused_standardize(z, contiguous, 1e-5, F32)
        _standardize.column_sums(z, contiguous, pivot)
        _standardize.standardize(z, contiguous, pivot, pivot, pivot, F32)
    codes = collections.defaultdict(set)
    for launch in pretended_h100.launches:
        codes[launch.kernel].add(launch.specialization)
        assert torch.equal(launch.arguments["z1"], before[0]), "the kernel was given other numbers"
    assert {kernel: len(different) for kernel, different in codes.items()} == dict.fromkeys(codes, 1)
    assert set(codes) == {"fused_standardize_kernel", "column_sums_kernel", "standardize_kernel"}
    assert torch.equal(view, before[0])
    assert view.stride() == before[1]


def test_aligned_rows_apart_are_not_copied(pretended_h100):
    """The two halves of one forward over both views, and z[:, 0] of (N, 2, D)."""
    both = torch.zeros(40, 2, 96, dtype=BF16)
    for z in (both[:, 0], both.view(80, 96)[40:]):
        _standardize.fused_standardize(z, z, 1e-5, F16)
    assert [launch.arguments["z1"].data_ptr() for launch in pretended_h100.launches] == [
        both.data_ptr(),
        both.view(80, 96)[40:].data_ptr(),
    ]


@pytest.mark.parametrize(("d", "dtype"), [(96, BF16), (100, F32), (4096, BF16), (4100, F64)], ids=str)
def test_grids_cover_the_features(pretended_h100, d, dtype):
    step(40, d, z=dtype, u=dtype if dtype.itemsize > 2 else F16)
    grids = {launch.kernel: launch.grid for launch in pretended_h100.launches}
    width = column_tile(d, dtype).block_d
    assert grids["fused_standardize_kernel"] == (
        -(-(-(-d // 16) * 16) // width),
        1,
        1,
    )  # the padding is written as well
    assert grids["input_gradients_kernel"] == (-(-d // width), 1, 1)
    assert grids["loss_terms_kernel"] == (1, 1, 1)


@pytest.mark.parametrize("n", [2, 100, 4096])
def test_at_most_1024_parts_are_added_up_by_one_program(pretended_h100, n):
    k = torch.empty(n, n, dtype=F16)
    assert len(_frobenius.frobenius(k, k)) == min(max(2, -(-n * n // 4096)), 1024)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize(("z", "u", "d"), [(BF16, F16, 512), (F32, F32, 100)], ids=str)
def test_the_whole_step_compiles_as_it_is_launched(chip, z, u, d):
    """The types, the alignment and the options of real launches, not those of a table."""
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
        assert {"fused_standardize", "loss_terms"} <= set(operations.names)
        assert ("frobenius" in operations.names) == (algorithm == "dual")
        assert loss.dtype == torch.promote_types(dtype, F32)
        assert loss.device.type == "cuda"

    def test_eager_does_not(self):
        with FakeTensorMode(), Operations() as operations:
            views = [torch.empty(16, 64, device="cuda").requires_grad_() for _ in range(2)]
            barlow_twins_loss(*views, backend="eager")
        assert "fused_standardize" not in operations.names


def test_launches_go_to_the_tensor_s_own_device(monkeypatch):
    """Triton launches on the current device."""
    current, launched_on = [0], []

    @contextlib.contextmanager
    def device_index(index):
        current.append(index)
        yield
        current.pop()

    class Compiler:
        def __getitem__(self, grid):
            return lambda *args, **options: launched_on.append(current[-1])

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    kernel = Kernel(Compiler())
    for index in (1, 0):
        kernel.launch(types.SimpleNamespace(get_device=lambda index=index: index), 1, (), (), ())
    assert launched_on == [1, 0]
    assert current == [0]


def test_both_backends_offer_the_same_functions():
    """With the same arguments."""
    assert triton.__all__ == eager.__all__
    for name in eager.__all__:
        wanted, found = (list(inspect.signature(getattr(backend, name)).parameters) for backend in (eager, triton))
        assert found == wanted, name


class TestTheHost:
    """What a step costs before the GPU is asked, in the plain loop."""

    def test_no_operation_is_called_for_a_kernel(self, pretended_h100, monkeypatch):
        """A call through the dispatcher takes 20 µs; see benches for the time."""
        for operation in OPERATIONS:
            monkeypatch.setattr(operation, "operation", None)
        views = [torch.empty(16, 32, dtype=BF16).requires_grad_() for _ in range(2)]
        loss_and_sums(views, 0.1, 1e-5, Plan("dual", "triton", F32, F16), Shards(ALONE, (16,)))[0].backward()
        assert [launch.kernel for launch in pretended_h100.launches] == OWN

    def test_a_mode_sees_the_operations(self, pretended_h100, monkeypatch):
        """Also one that is entered between forward and backward; and a subclass of Tensor does without a mode."""
        for operation in OPERATIONS:
            monkeypatch.setattr(operation, "launch", None)
        forward, backward = step(16, 32)
        assert "fused_standardize" in forward
        assert "input_gradients" in backward
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(torch.empty(16, 32))
        assert _standardize.fused_standardize(fake, fake, 1e-5, F16)[0].shape == (2, 16, 32)

    def test_a_second_step_finds_its_kernels_in_the_cache(self, pretended_h100, monkeypatch):
        """For another batch size too."""
        views = [torch.empty(n, 32, dtype=BF16).requires_grad_() for n in (16, 16, 40, 40)]
        for number, pair in enumerate((views[:2], views[2:], views[:2])):
            if number == 2:
                for module, name in LAUNCHERS:
                    monkeypatch.setattr(getattr(module, name), "_kernel", None)
            plan, shards = Plan("dual", "triton", F32, F16), Shards(ALONE, (len(pair[0]),))
            loss_and_sums(pair, 0.1 + number, 1e-5, plan, shards)[0].backward()
        assert [launch.kernel for launch in pretended_h100.launches] == OWN * 3

    @pytest.mark.parametrize("version", ["3.5.1", "4.0.0"])
    def test_an_unknown_triton_finds_its_kernels_itself(self, version, pretended_h100, monkeypatch):
        monkeypatch.setattr(triton_package, "__version__", version)
        kernel = Kernel(_frobenius.frobenius_kernel)
        k = torch.empty(16, 16)
        for _ in range(2):
            kernel.launch(k, 1, (), (k, k, k, 256), (4096, triton_package.language.float32), num_warps=8)
        assert len(pretended_h100.launches) == 2
        assert not kernel._compiled

    def test_hooks_of_profilers_see_every_launch(self):
        """Those from the cache too, which triton's own compiled kernel launches."""
        seen, hooks = [], triton_package.knobs.runtime.launch_enter_hook

        def hook(metadata):
            seen.append(metadata.get()["name"])

        kernel, k = Kernel(_frobenius.frobenius_kernel), torch.empty(16, 16)
        with pretended(CHIPS["sm_90"], compiled=True):
            for _ in range(3):
                kernel.launch(k, 1, (), (k, k, k, 256), (4096, triton_package.language.float32), num_warps=8)
                hooks.add(hook)
        hooks.remove(hook)
        assert seen == ["frobenius_kernel"] * 2
        assert len(kernel._compiled) == 1

    def test_a_kernel_from_the_cache_is_the_one_that_triton_takes(self, pretended_h100, monkeypatch):
        """Whatever came before: sizes, dtypes, layouts, algorithms, what is needed, pointers that are not aligned."""
        sizes = [(40, 96), (48, 100), (17, 33), (32, 1)]
        dtypes = [(BF16, F16), (F16, F16), (F32, F16), (F32, F32), (F64, F64)]
        cases = list(itertools.product(sizes, dtypes, range(60)))

        def specializations(case):
            pretended_h100.launches.clear()
            self.a_step(*case)
            return [launch.specialization for launch in pretended_h100.launches]

        with monkeypatch.context() as patched:
            for module, name in LAUNCHERS:
                patched.setattr(getattr(module, name), "_caches", False)
            right = [specializations(case) for case in cases]
        assert len(set(itertools.chain(*right))) > 200
        for number in random.Random(0).sample(range(len(cases)), len(cases)):
            assert specializations(cases[number]) == right[number], cases[number]

    def a_step(self, size, dtypes, number):
        """Forward and backward of what the number says: layouts, algorithm, views, terms, λ as a number or a tensor."""
        draw = random.Random(number)
        (z, u), compute = dtypes, torch.promote_types(dtypes[0], F32)
        layouts = draw.choices(list(LAYOUTS.values()), k=2)
        views = [layout(torch.zeros(size, dtype=z)).detach() for layout in layouts]
        views += [torch.zeros(size, dtype=z) for _ in range(draw.choice([0, 0, 1, 2]))]
        for view in draw.choice([views, views[:1], views[1:]]):
            view.requires_grad_()
        weights = all_alike(len(views))
        if len(views) == 3:
            weights = draw.choice([weights, normalized(((0, 1, 2), (1, 0, 0), (2, 0, 0)))])
        scalars = torch.ones(4, dtype=compute)  # of which one is aligned
        lambd = draw.choice([0.0051, 0.1, scalars[0], scalars[1]])
        plan = Plan(draw.choice(["dual", "primal"]), "triton", compute, u, weights=weights)
        unpack = draw.choice([lambda t: t, lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            terms = loss_and_sums(views, lambd, 1e-5, plan, Shards(ALONE, size[:1]))
        grad_outputs = [(term, scalars[draw.randrange(4)]) for term in terms if draw.random() < 0.6] or [
            (terms[0], scalars[1])
        ]
        torch.autograd.backward(*zip(*grad_outputs, strict=True))
