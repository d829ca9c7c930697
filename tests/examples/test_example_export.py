"""An encoder given away: the same bits in torchvision, in timm, and by PyTorch Hub; and a card that says what it is."""

import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import timm
import torch
from official_files import official_model, write_official
from outcomes import SMALL_RESNET, rows
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

import export_backbone
from barlow_recipes.encoders import build_encoder, resnets
from barlow_recipes.errors import Aborted
from barlow_recipes.weights import load_encoder
from programs import run

REPOSITORY = str(Path(__file__).parents[2])
Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Export:
    return lambda *flags: (export_backbone.main([str(flag) for flag in flags]), *capsys.readouterr())


@pytest.fixture(scope="module")
def resnet_run(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on photographs whose batch statistics have moved."""
    from imagenet_pretrain import main as pretrain

    out = tmp_path_factory.mktemp("runs") / "flowers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["imagenet_pretrain.py", "--data", "flowers"])
        assert pretrain([*map(str, SMALL_RESNET), "--data", str(jpegs), "--out", str(out)]) == 0
    return out


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


@pytest.fixture
def small(tmp_path: Path) -> tuple[object, ...]:
    """The flags that export an encoder to a folder."""
    torch.save(build_encoder("small-cnn").module.state_dict(), tmp_path / "any.pth")
    return "--weights", tmp_path / "any.pth", "--out", tmp_path / "out"


def test_the_files_are_those_of_torchvision_and_of_timm(resnet_run: Path, export: Export, tmp_path: Path) -> None:
    out = tmp_path / "given away"
    status, output, errors = export("--weights", resnet_run, "--out", out)
    assert (status, errors) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "backbone.safetensors", "resnet18.pth"]
    for name in ("backbone.safetensors", "resnet18.pth"):
        assert f"{out / name}: the same bits when loaded by this program and torchvision" in output

    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    ours = models.resnet18()
    ours.fc = nn.Identity()
    ours.load_state_dict(torch.load(resnet_run / "backbone.pt", weights_only=True))
    expected = features_of(ours, images)
    for state in (torch.load(out / "resnet18.pth", weights_only=True), load_file(out / "backbone.safetensors")):
        plain = models.resnet18()
        assert plain.load_state_dict(state, strict=False) == (["fc.weight", "fc.bias"], [])
        plain.fc = nn.Identity()
        assert torch.equal(features_of(plain, images), expected)
        theirs = timm.create_model("resnet18", num_classes=0)
        theirs.load_state_dict(state)
        assert torch.equal(features_of(theirs, images), expected)


@pytest.mark.parametrize("arch", resnets())
def test_every_resnet_has_the_same_names_and_shapes_in_timm(arch: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_encoder(arch).module, timm.create_model(arch, num_classes=0)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_card_is_filled_from_the_run(resnet_run: Path, export: Export, tmp_path: Path) -> None:
    assert export("--weights", resnet_run, "--out", tmp_path)[0] == 0
    card = (tmp_path / "README.md").read_text()
    *_, last = (row for row in rows(resnet_run, "evaluation") if row["representation"] == "pretrained encoder")
    for line in (
        "# resnet18, pretrained with Barlow Twins on flowers",
        "takes images of shape 3×224×224 to 512 features. It has 11,176,512 parameters.",
        "\ndata: flowers\n", "\nimages: 36\n", "\nepochs: 2\n", "\nbatch_size: 8\n", "\nprocesses: 1\n",
        "\ncommand: --data flowers\n",  # of the process that called main
        f"\ntorch: {torch.__version__.partition('+')[0]}",
        "\nsteps done: 8\n", "\nepochs done: 2\n",
        f"| pretrained encoder | {last['knn']:.1f} % |",
    ):  # fmt: skip
        assert line in card, line
    assert not re.search(r"\bNone\b|\{\{|\{%", card)
    about = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (about["library_name"], about["pipeline_tag"]) == ("torchvision", "image-feature-extraction")


@pytest.mark.parametrize(
    ("arch", "shape", "code"),
    [
        (
            "timm/vit_tiny_patch16_224",
            (5, 64, 64),
            "'vit_tiny_patch16_224', num_classes=0, dynamic_img_size=True, in_chans=5",
        ),
        (
            "timm/convnext_atto",
            (3, 64, 64),
            "import timm, torch\n\nmodel = timm.create_model('convnext_atto', num_classes=0)",
        ),
        ("mobilenet_v3_small", (3, 64, 64), "torchvision.models.get_model('mobilenet_v3_small')"),
        ("resnet18", (3, 64, 64), "torchvision.models.get_model('resnet18')"),
    ],
)
def test_the_code_on_the_card_runs(
    arch: str, shape: tuple[int, int, int], code: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder(arch, channels=shape[0], image_size=shape[1])
    export_backbone.write_files(encoder, tmp_path)
    assert export("--weights", tmp_path / "backbone.safetensors", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f" to {encoder.features} features" in text
    assert code in text
    (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    exec(found, names := {"images": torch.rand(2, *shape)})
    assert torch.equal(names["features"], features_of(encoder.module, names["images"]))


class Hub:
    """What is asked of ``huggingface_hub.HfApi``, without a network."""

    calls: ClassVar[list[tuple[str, dict]]] = []
    refuses: ClassVar[str] = ""

    def __getattr__(self, name: str) -> Callable[..., str]:
        def call(*_: object, **values: object) -> str:
            self.calls.append((name, values))
            if name == self.refuses:
                raise OSError(f"no {name}\nand more lines")
            return "https://hub.example/me/it"

        return call


@pytest.mark.parametrize("refuses", ["", "whoami", "create_repo", "upload_folder"])
def test_push(refuses: str, small: tuple, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "refuses", refuses)
    out = tmp_path / "out"
    status, output, errors = export(*small, "--push", "me/it")
    if refuses == "whoami":
        reason = "expected somebody logged in to the Hugging Face Hub (no whoami). Log in with: hf auth login"
        assert (status, errors) == (2, f"error: --push me/it: {reason}\n")
        assert not out.exists()  # told before the work
    elif refuses:
        assert (status, errors) == (1, f"error: --push me/it: no {refuses}; the files are in {out}\n")
    else:
        assert (status, errors) == (0, "")
        assert "uploaded to https://hub.example/me/it" in output
        files = {"repo_id": "me/it", "folder_path": out, "allow_patterns": ["backbone.safetensors", "README.md"]}
        assert Hub.calls[-2:] == [("create_repo", {"exist_ok": True}), ("upload_folder", files)]


def test_push_without_a_login(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real package, which asks nobody without a token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    status, _, errors = export("--weights", tmp_path / "any.pth", "--push", "me/it")
    assert status == 2
    assert re.match(r"error: --push me/it: expected somebody logged in to the Hugging Face Hub \(.*[Tt]oken", errors)


@pytest.mark.slow
def test_an_encoder_that_no_library_has(export: Export, tmp_path: Path) -> None:
    for arch, stem, images in (("small-cnn", "imagenet", (2, 3, 28, 28)), ("resnet18", "cifar", (2, 3, 32, 32))):
        encoder, out = build_encoder(arch, stem), tmp_path / arch
        torch.save(encoder.module.state_dict(), tmp_path / "any.pth")
        status, output, _ = export("--weights", tmp_path / "any.pth", "--out", out)
        assert status == 0
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "backbone.safetensors"]
        assert "it does not say how it was pretrained" in output
        card = (out / "README.md").read_text()
        assert (
            "From a state_dict; how it was made, and its images normalised:\n\n```yaml\n# The file does not say" in card
        )
        assert "Not measured" in card
        loaded = torch.hub.load(REPOSITORY, "encoder", str(out / "backbone.safetensors"), source="local")
        x = torch.rand(images)
        assert torch.equal(features_of(loaded, x), features_of(encoder.module, x))


def test_the_official_checkpoint(export: Export, tmp_path: Path) -> None:
    path, _ = write_official(tmp_path / "official", official_model(), epoch=1000)
    status, _, errors = export("--weights", path)
    assert (status, errors) == (0, "")
    card = (tmp_path / "official" / "export" / "README.md").read_text()
    assert "From a checkpoint of facebookresearch/barlowtwins; " in card
    assert "\nepochs done: 1000\n" in card


def test_nothing_is_overwritten_by_accident(small: tuple, export: Export, tmp_path: Path) -> None:
    assert export(*small)[0] == 0
    said = f"error: --out {tmp_path / 'out'}: holds backbone.safetensors. Choose another folder, or --overwrite\n"
    assert export(*small)[::2] == (2, said)
    assert export(*small, "--overwrite")[0] == 0


@pytest.mark.slow
def test_the_records_end_with_the_weights(resnet_run: Path, export: Export, tmp_path: Path) -> None:
    """Of a run that was cut off, of bare weights beside its records, and of an earlier checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(resnet_run, run)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "epoch", "st')
    for name, step, epochs in (("checkpoint.pt", 8, 2), ("backbone.pt", None, 2), ("checkpoint.previous.pt", 4, 1)):
        assert export("--weights", run / name, "--out", run / "export", "--overwrite")[0] == 0
        card = (run / "export" / "README.md").read_text()
        assert f"\nepochs done: {epochs}\n" in card
        assert re.findall(r"\nsteps done: (\d+)\n", card) == ([str(step)] if step else [])


def test_an_exported_file_says_how_its_images_were_normalised(tmp_path: Path) -> None:
    pixels = {"value_range": [0.0, 4095.0], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}
    encoder = build_encoder("small-cnn", channels=4)._replace(pixels=pixels)
    (path,) = export_backbone.write_files(encoder, tmp_path)
    assert load_encoder(path).pixels == pixels
    (path,) = export_backbone.write_files(encoder._replace(pixels={}), tmp_path)
    assert load_encoder(path).pixels == {}


def test_a_file_that_has_changed_on_its_way_is_noticed(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18")
    _, other = export_backbone.write_files(encoder, tmp_path)
    state = torch.load(other, weights_only=True)
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, other)
    with pytest.raises(Aborted, match=r"loaded by .*, the encoder is not the one that was exported"):
        export_backbone.check(encoder, other)


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = official_model("resnet50", "16-16")
    checkpoint, backbone = write_official(tmp_path / "official", model)
    images = torch.rand(2, 3, 64, 64)
    for weights in (str(backbone), backbone.as_uri(), str(checkpoint)):
        loaded = torch.hub.load(REPOSITORY, "resnet50", weights=weights, source="local")
        assert loaded.fc.out_features == 1000
        loaded.fc = nn.Identity()
        assert torch.equal(features_of(loaded, images), features_of(model.backbone, images))
    (kept,) = (tmp_path / "hub" / "checkpoints" / "barlow-loss").iterdir()
    assert kept.name.endswith(f"-{backbone.name}")
    assert torch.hub.load(REPOSITORY, "resnet50", pretrained=False, source="local").fc.out_features == 1000
    projector = torch.hub.load(REPOSITORY, "projector", checkpoint.as_uri(), source="local")
    assert torch.equal(projector[3].weight, model.projector[3].weight)
    assert torch.hub.load(REPOSITORY, "projector", in_features=8, hidden_features=9, source="local")[0].in_features == 8
    loss_fn = torch.hub.load(REPOSITORY, "barlow_twins_loss", lambd=0.1, source="local")
    assert loss_fn.lambd == 0.1


@pytest.mark.slow
def test_the_hub_beside_a_project_with_modules_of_the_same_names(tmp_path: Path) -> None:
    torch.save(build_encoder("small-cnn").module.state_dict(), tmp_path / "any.pth")
    for name in ("recipes", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    program = f"""
import torch
import examples
for _ in range(2):
    model = torch.hub.load({REPOSITORY!r}, "encoder", "any.pth", source="local")
    import recipes
assert not model.training
print(recipes.__file__)
"""
    (tmp_path / "program.py").write_text(program)
    done = run([sys.executable, "program.py"], tmp_path)
    assert done.output == f"{tmp_path / 'recipes' / '__init__.py'}\n", done.errors


def test_two_addresses_that_end_alike_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda address, path: Path(path).write_text(address))
    hub = runpy.run_path(f"{REPOSITORY}/hubconf.py")
    addresses = [f"https://{host}/v1/resnet50.pth{query}" for host in ("a", "b") for query in ("", "?id=2")]
    assert [hub["_local"](address).read_text() for address in [*addresses, *addresses]] == addresses * 2
