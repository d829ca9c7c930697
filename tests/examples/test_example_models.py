"""Encoders by name, and activations that are computed twice."""

import copy

import pytest
import torch
from torch import Tensor, nn

from barlow_recipes.errors import UsageError
from barlow_recipes.models import build_model, checkpoint_activations, parse_projector


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


def test_computing_activations_twice_keeps_fewer_of_them() -> None:
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(2, 3, 32, 32))
        return sum(sizes.values())

    plain = build_model("resnet18", "16", "cifar")
    parameters = sum(p.numel() * p.element_size() for p in plain.parameters())
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed.backbone)
    assert kept(checkpointed) < 0.6 * (kept(plain) - parameters)


def test_an_encoder_without_blocks_cannot_compute_them_twice() -> None:
    with pytest.raises(UsageError, match="--checkpoint-activations: expected a ResNet"):
        checkpoint_activations(build_model("digits-cnn", "16").backbone)
