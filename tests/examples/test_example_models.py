"""The model that is trained: encoders, frozen parts, activations that are computed twice, chunks of a batch."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import export_backbone as exporting
from barlow_loss import BarlowTwinsLoss, Projector, barlow_twins_loss
from barlow_recipes.encoders import build_encoder, freeze
from barlow_recipes.errors import UsageError
from barlow_recipes.models import BarlowTwins, build_model, parse_projector
from barlow_recipes.weights import load_encoder


@pytest.mark.parametrize(
    ("arch", "stem", "shape"),
    [
        ("digits-cnn", "imagenet", (1, 8, 8)),
        ("small-cnn", "imagenet", (3, 28, 28)),
        ("resnet18", "imagenet", (3, 64, 64)),
        ("resnet18", "cifar", (3, 32, 32)),
    ],
)
def test_an_encoder_and_its_projector(arch: str, stem: str, shape: tuple[int, ...]) -> None:
    model, features = build_model(arch, "64-64-32", stem), build_encoder(arch, stem).features
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
    last = [module.bn2 for module in build_encoder("resnet18").module.modules() if hasattr(module, "bn2")]
    assert len(last) == 8
    assert not any(norm.weight.any() for norm in last)


@pytest.mark.parametrize("layers", ["", "0", "1-2-3", "8192-8192-", "many"])
def test_a_crooked_projector_is_named(layers: str) -> None:
    with pytest.raises(UsageError, match=f"--projector {layers}: expected widths"):
        parse_projector(layers)


FAMILIES = {
    "ConvNeXt": "convnext_atto", "ViT": "vit_tiny_patch16_224", "RegNet": "regnetx_002", "XCiT": "xcit_nano_12_p16_224",
    "MobileNet": "mobilenetv3_small_050", "EdgeNeXt": "edgenext_xx_small", "MobileViT": "mobilevit_xxs",
    "PVT": "pvt_v2_b0", "CoaT": "coat_lite_tiny", "ReXNet": "rexnet_100", "StarNet": "starnet_s1",
    "InceptionNeXt": "inception_next_atto", "DeiT": "deit_tiny_distilled_patch16_224", "gMLP": "gmlp_ti16_224",
}  # fmt: skip
SLOW_FAMILIES = {
    "ResNet": "resnet10t", "EfficientNet": "efficientnet_b0", "GhostNet": "ghostnet_050", "LeViT": "levit_128s",
    "FastViT": "fastvit_t8", "TinyViT": "tiny_vit_5m_224", "MobileOne": "mobileone_s0", "RepVGG": "repvgg_a0",
    "Swin": "swin_tiny_patch4_window7_224", "DenseNet": "densenet121", "HRNet": "hrnet_w18_small",
    "PoolFormer": "poolformer_s12", "ResNeXt": "resnext26ts", "DaViT": "davit_tiny", "FocalNet": "focalnet_tiny_srf",
    "MViT": "mvitv2_tiny", "Hiera": "hiera_tiny_224", "NFNet": "dm_nfnet_f0",
}  # fmt: skip


@pytest.mark.parametrize(
    "arch", [*FAMILIES.values(), *(pytest.param(arch, marks=pytest.mark.slow) for arch in SLOW_FAMILIES.values())]
)
def test_every_family_of_timm_is_pretrained_saved_evaluated_and_exported(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    side = 64
    model = build_model(f"timm/{arch}", "32-32", image_size=side)
    first, second = torch.rand(2, 4, 3, side, side)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    BarlowTwinsLoss()(model(first), model(second)).backward()
    optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert next(model.named_parameters())[0] in moved  # the gradient has come through
    assert len(moved) > len(before) / 6  # of NFNet, whose branches begin at 0, few move at once
    assert all(value.isfinite().all() for value in model.state_dict().values())

    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pt")
    encoder = load_encoder(tmp_path / "backbone.pt", f"timm/{arch}", image_size=side)
    with torch.no_grad():
        features = encoder.module.eval()(first)
        assert torch.equal(features, model.backbone.eval()(first))
    assert features.shape == (4, encoder.features)

    files = exporting.write_files(encoder, tmp_path)
    assert [exporting.check(encoder, file) for file in files] == [["this program", "timm"]] * 2
    exported = load_encoder(files[0])  # which says all of it
    assert exported[1:4] == (encoder.features, f"timm/{arch}", "imagenet")
    with torch.no_grad():
        assert torch.equal(exported.module.eval()(first), features)


@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize(
    "arch", ["small-cnn", "resnet18", "mobilenet_v3_small", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]
)
def test_images_of_other_than_three_channels(arch: str, channels: int) -> None:
    torch.manual_seed(0)
    side = 28 if arch == "small-cnn" else 64
    encoder, usual = (build_encoder(arch, channels=number, image_size=side) for number in (channels, 3))
    assert encoder.shape[0] == channels
    assert encoder.module(torch.rand(2, channels, side, side)).shape == (2, encoder.features)
    first, before = (
        next(layer for layer in found.module.modules() if isinstance(layer, nn.Conv2d)) for found in (encoder, usual)
    )
    assert first.weight.shape[1] == channels
    if arch in ("resnet18", "mobilenet_v3_small"):  # ours, drawn as widely as the one that it replaces
        assert abs(first.weight.std() / before.weight.std() - 1) < 0.1
    cifar = build_encoder("resnet18", "cifar", channels).module
    assert cifar.conv1.weight.shape == (64, channels, 3, 3)


@pytest.mark.parametrize("side", [64, None])
@pytest.mark.parametrize("arch", ["vit_b_32", "timm/levit_128s", "googlenet", "regnet_x_400mf", "inception_v3"])
def test_encoders_with_ways_of_their_own(arch: str, side: int | None) -> None:
    """Built for images of one size, with other classifiers inside, or not without memory."""
    side = 96 if side and arch == "inception_v3" else side
    encoder = build_encoder(arch, image_size=side)
    assert encoder.shape == (3, side or 224, side or 224)
    with torch.no_grad():
        assert encoder.module.eval()(torch.rand(2, *encoder.shape)).shape == (2, encoder.features)


OWN = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def told(channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 7))

def a_map():
    return nn.Conv2d(3, 8, 3)

class Pair(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images

class Data(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum().item() == 0 else images.amax((2, 3))

def nothing():
    return 3
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "my_own", raising=False)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("name", "channels", "features"), [("plain", 3, 8), ("told", 5, 7), ("Data", 4, 4)])
def test_an_encoder_of_ones_own(name: str, channels: int, features: int, tmp_path: Path) -> None:
    arch = f"my_own:{name}"
    encoder = build_encoder(arch, channels=channels, image_size=16)
    assert (encoder.features, encoder.module.training, encoder.shape) == (features, True, (channels, 16, 16))
    (file,) = exporting.write_files(encoder, tmp_path)
    if name != "Data":  # it has no weights
        assert exporting.check(encoder, file) == ["this program"]
        loaded = load_encoder(file, arch)
        assert torch.equal(*(next(found.module.parameters()) for found in (loaded, encoder)))
    assert build_model(arch, "6-5", channels=channels, image_size=16)(torch.rand(2, channels, 16, 16)).shape == (2, 5)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("my_own:a_map", r"features of shape \(2, F\) for two images, got shape \(2, 8, 14, 14\)\. An encoder ends"),
        ("my_own:Pair", "for two images, got a tuple"),
        ("my_own:nothing", "expected a function that gives an nn.Module, got a int"),
        ("my_own:number", "expected a callable, got a int"),
        ("my_own:absent", "cannot be imported"),
        ("no_module:build", "cannot be imported .ModuleNotFoundError"),
        ("timm/inception_v4", r"cannot take 16 pixels of 3 channels \("),
        ("timm/efficientformer_l1", r"cannot take 16 pixels of 3 channels \("),  # its attention is built for 224 pixels
        ("vit_b_61", "expected digits-cnn, small-cnn, a classifier of torchvision"),
        ("timm/resnet5", "timm has no model resnet5; it has"),
        ("squeezenet1_0", "ends with a linear layer"),
    ],
)
def test_an_encoder_that_cannot_be_used(arch: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--arch {arch}: .*{message}"):
        build_encoder(arch, image_size=16)


@pytest.mark.parametrize(
    ("arch", "side", "reason"),
    [
        ("vit_b_16", 16, "Wrong image height! Expected 32 but got 16!"),
        ("timm/vit_tiny_patch16_224", 24, "Input height .24. should be divisible by patch size .16.."),
        ("small-cnn", 1, "Output size is too small"),
        ("torch.nn:Flatten", 16, "768 features in place of 3072"),
    ],
)
def test_an_encoder_that_does_not_take_local_crops(arch: str, side: int, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^--local-size {side}: --arch {arch} does not take it .*{reason}"):
        build_model(arch, "6-5", image_size=32, local_size=side)


@pytest.mark.parametrize("arch", ["resnet18", "timm/vit_tiny_patch16_224", "regnet_y_400mf"])
def test_an_encoder_that_takes_local_crops(arch: str) -> None:
    model = build_model(arch, "6-5", image_size=32, local_size=16)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_a_stem_is_of_a_resnet() -> None:
    with pytest.raises(UsageError, match="--stem cifar: expected a ResNet of torchvision, got --arch timm/resnet18"):
        build_encoder("timm/resnet18", "cifar")


@pytest.mark.parametrize("names", [("conv1", "bn1", "layer1"), ("all",), ("layer4.0.conv1",)])
def test_frozen_parts_stand_still(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", "16", "cifar")
    freeze(model.backbone, names)
    model = copy.deepcopy(model)  # as synchronising processes may
    before = copy.deepcopy(model.backbone.state_dict())
    model.eval()
    train(model.train())
    after = model.backbone.state_dict()
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    expected = {name for name in after if names == ("all",) or name.startswith(tuple(f"{part}." for part in names))}
    assert still == expected


def test_a_frozen_part_has_to_exist() -> None:
    with pytest.raises(UsageError, match=r"--freeze layer5: .*expected all, conv1, bn1, layer1, .* or a part of one"):
        freeze(models.resnet18(), ["layer1", "layer5"])


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


def test_chunks_keep_fewer_activations() -> None:
    torch.manual_seed(0)
    plain = build_model("resnet18", "16", "cifar")
    chunked = copy.deepcopy(plain)
    chunked.chunks = 4
    images = torch.rand(8, 3, 32, 32)
    assert kept(chunked, images) < 0.6 * kept(plain, images)


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
