"""The model that is trained: its layers, activations that are computed twice, chunks of a batch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from barlow_loss import Projector, barlow_twins_loss
from barlow_recipes.errors import UsageError
from barlow_recipes.models import BarlowTwins, build_model, checkpoint_activations, has_batch_norms, parse_projector


@pytest.mark.parametrize(
    ("arch", "stem", "shape", "features"),
    [
        ("digits-cnn", "imagenet", (1, 8, 8), 96),
        ("small-cnn", "imagenet", (3, 28, 28), 128),
        ("resnet18", "imagenet", (3, 64, 64), 512),
        ("resnet18", "cifar", (3, 32, 32), 512),
    ],
)
def test_an_encoder_and_its_projector(arch: str, stem: str, shape: tuple[int, ...], features: int) -> None:
    model = build_model(arch, "64-64-32", stem)
    images = torch.rand(4, *shape)
    assert model.backbone(images).shape == (4, features)
    assert model(images).shape == (4, 32)
    assert [layer.out_features for layer in model.projector if isinstance(layer, nn.Linear)] == [64, 64, 32]


def test_the_cifar_stem_keeps_small_images_large() -> None:
    backbone = build_model("resnet18", "64", "cifar").backbone
    sizes: list[tuple[int, ...]] = []
    backbone.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    backbone(torch.rand(2, 3, 32, 32))
    assert sizes == [(32, 32)]


def test_residual_branches_begin_at_zero() -> None:
    """``zero_init_residual`` of the recipe."""
    blocks = [
        block for layer in (1, 2, 3, 4) for block in getattr(build_model("resnet18", "64").backbone, f"layer{layer}")
    ]
    assert all(not block.bn2.weight.any() for block in blocks)


@pytest.mark.parametrize("layers", ["", "0", "1-2-3", "8192-8192-", "many"])
def test_a_crooked_projector_is_named(layers: str) -> None:
    with pytest.raises(UsageError, match=f"--projector {layers}: expected widths"):
        parse_projector(layers)


def train(model: nn.Module, steps: int = 3) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        first, second = torch.rand(2, 6, 3, 32, 32, generator=generator)
        z1, z2 = model(first), model(second)  # both passes before the backward, as in training
        optimizer.zero_grad()
        loss = (z1 * z2).sum()
        loss.backward()
        optimizer.step()
    return loss


def test_computing_activations_twice_changes_no_bit() -> None:
    """Neither of the weights, nor of the running statistics, which a second pass must leave alone."""
    torch.manual_seed(0)
    plain = build_model("resnet18", "16", "cifar")
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed.backbone)
    assert torch.equal(train(plain), train(checkpointed))
    states = plain.state_dict(), checkpointed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []
    assert states[0]["backbone.layer1.0.bn1.num_batches_tracked"] == 6


def kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, apart from the parameters."""
    sizes: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(size for place, size in sizes.items() if place not in parameters)


def test_computing_activations_twice_keeps_fewer_of_them() -> None:
    plain = build_model("resnet18", "16", "cifar")
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed.backbone)
    images = torch.rand(2, 3, 32, 32)
    assert kept(checkpointed, images) < 0.6 * kept(plain, images)


def test_an_encoder_without_blocks_cannot_compute_them_twice() -> None:
    with pytest.raises(UsageError, match="--checkpoint-activations: expected a ResNet"):
        checkpoint_activations(build_model("digits-cnn", "16").backbone)


def encoder_with(norm: str) -> nn.Module:
    """A small encoder with a normalisation after each convolution; "frozen": batch norms that do not learn."""

    def layer(width: int) -> nn.Module:
        return {"group": nn.GroupNorm(2, width), "layer": nn.GroupNorm(1, width)}.get(norm) or nn.BatchNorm2d(width)

    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), layer(8), nn.ReLU(), nn.Conv2d(8, 12, 3), layer(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    if norm == "frozen":
        for module in net:
            module.train = lambda mode=True, module=module: nn.Module.train(module, False)  # type: ignore[method-assign]
    return net


def gradients_of(model: BarlowTwins, views: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    barlow_twins_loss(*map(model, views)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("chunks", [2, 5, 23])
@pytest.mark.parametrize("norm", ["group", "layer", "frozen"])
def test_chunks_give_the_gradient_of_the_whole_batch(norm: str, chunks: int) -> None:
    """23 images, in parts of different sizes; the projector has batch norms, which see all."""
    torch.manual_seed(0)
    model = BarlowTwins(encoder_with(norm), Projector(12, 16, 16, num_layers=2)).double().train()
    assert not has_batch_norms(model.backbone)
    views = torch.rand(2, 23, 3, 10, 10, dtype=torch.float64)
    chunked = copy.deepcopy(model)
    chunked.chunks = chunks
    whole, found = gradients_of(model, views), gradients_of(chunked, views)
    for name, expected in whole.items():
        assert (found[name] - expected).norm() <= 1e-10 * expected.norm(), name
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(chunked.state_dict()[name], expected, rtol=1e-12, atol=1e-12)


def test_batch_norms_of_the_encoder_see_chunks_and_keep_each_once() -> None:
    torch.manual_seed(0)
    model = BarlowTwins(encoder_with("batch"), Projector(12, 16, 16, num_layers=2), chunks=4).double().train()
    assert has_batch_norms(model.backbone)
    views = torch.rand(2, 24, 3, 10, 10, dtype=torch.float64)
    ghost = copy.deepcopy(model)
    ghost.chunks = 1
    found = gradients_of(model, views)
    features = [torch.cat([ghost.backbone(part) for part in view.split(6)]) for view in views]
    barlow_twins_loss(*map(ghost.projector, features)).backward()
    for name, parameter in ghost.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)
    for name, expected in ghost.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    assert model.state_dict()["backbone.1.num_batches_tracked"] == 8


def test_chunks_repeat_a_dropout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.Dropout(0.5), nn.Linear(16, 12))
    model = BarlowTwins(net, nn.Identity(), chunks=3).double().train()
    images = torch.rand(12, 3, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    model(images).square().sum().backward()
    found = net[1].weight.grad.clone()  # type: ignore[union-attr]
    net.zero_grad()
    torch.manual_seed(1)
    torch.cat([net(part) for part in images.tensor_split(3)]).square().sum().backward()
    torch.testing.assert_close(found, net[1].weight.grad, rtol=1e-12, atol=1e-12)


def test_chunks_keep_the_activations_of_one() -> None:
    model = build_model("resnet18", "16", "cifar")
    plain = kept(model, torch.rand(16, 3, 32, 32))
    model.chunks = 8
    assert kept(model, torch.rand(16, 3, 32, 32)) < plain / 20
