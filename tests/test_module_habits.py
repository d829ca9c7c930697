"""What anybody does with a module: print, copy, save, load, move, and pass it to another process."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from torch import nn

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm, MixedBarlowTwinsLoss, Projector, VICRegLoss

Z = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
PI = torch.tensor([3, 1, 0, 2, 5, 7, 6, 4])


def _projector():
    projector = Projector(6, 8, 10)
    projector(Z[0])
    return projector


# Each with settings of its own, and what it is called with.
MODULES = {
    "BarlowTwinsLoss": (lambda: BarlowTwinsLoss(lambd=0.02, eps=1e-3, correction=1), tuple(Z)),
    "BarlowTwinsLoss, λ a tensor": (lambda: BarlowTwinsLoss(lambd=torch.tensor(0.02)), tuple(Z)),
    "VICRegLoss": (lambda: VICRegLoss(invariance=3.0), tuple(Z)),
    "MixedBarlowTwinsLoss": (lambda: MixedBarlowTwinsLoss(eps=1e-3), (*Z, Z.mean(0), 0.5, PI)),
    "Projector": (_projector, (Z[0],)),
    "DistributedBatchNorm": (lambda: DistributedBatchNorm(6, eps=1e-3, momentum=None), (Z[0],)),
}
every_module = pytest.mark.parametrize(("make", "inputs"), MODULES.values(), ids=MODULES)


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_module
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_does_the_same(make, inputs, copied, training):
    module = make().train(training)
    other = copied(module)
    assert repr(other) == repr(module)
    assert other.training is training
    assert torch.equal(copied(module)(*inputs), module(*inputs))


@every_module
def test_a_deep_copy_has_tensors_of_its_own(make, inputs):
    module = make()
    before = copy.deepcopy(module.state_dict())
    other = copy.deepcopy(module)
    other.train()(*inputs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


class Lazy(BarlowTwinsLoss):
    """Of a user: what it has opened stays behind, and is opened anew."""

    def __init__(self):
        super().__init__(lambd=0.02)
        self.opened = "by the first"

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "opened"}

    def __setstate__(self, state):
        super().__setstate__({"opened": "by the copy"} | state)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled, _saved])
def test_a_copy_is_made_as_a_users_class_says(copied):
    module = Lazy()
    assert copied(module).opened == "by the copy"
    assert copied(module)(*Z).equal(module(*Z))


@every_module
def test_a_state_dict_loads_into_another(make, inputs):
    module, other = make(), make()
    module(*inputs)
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other.eval()(*inputs), module.eval()(*inputs))


@every_module
def test_it_prints_in_a_model(make, inputs):
    module = make()
    text = repr(nn.ModuleDict({"part": module}))
    assert f"(part): {type(module).__name__}(" in text


@every_module
def test_it_changes_dtype_and_device(make, inputs):
    wide = [z.double() if torch.is_tensor(z) and z.is_floating_point() else z for z in inputs]
    assert make().double()(*wide).dtype == torch.float64
    assert all(tensor.is_meta for tensor in make().to("meta").state_dict().values())


def _in_another_process(module, inputs, answers):
    torch.set_num_threads(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    answers.put(module(*inputs).sum().item())


@pytest.mark.slow
@every_module
def test_it_is_shared_with_another_process(make, inputs):
    """Shared memory: what the other process writes into a parameter is seen here."""
    module = make().eval()
    module.share_memory()
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(module, inputs, answers))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert answers.get() == pytest.approx(module(*inputs).sum().item())
    assert not any(parameter.any() for parameter in module.parameters())
