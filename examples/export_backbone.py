"""Give a pretrained encoder away: in files that plain torchvision and timm load, with a card that says what it is.

    python examples/export_backbone.py --weights runs/imagenet-resnet50
    python examples/export_backbone.py --weights runs/imagenet-resnet50 --evaluation runs/evaluation --out to-publish

The folder gets ``backbone.safetensors``; where torchvision has the architecture, ``NAME.pth``, a state_dict for
``torchvision.models.NAME`` and ``timm.create_model("NAME")``; and ``README.md``, the model card, filled from the run's
own records. Each file is read back, and the encoder in it compared bit for bit with the one that was exported.

Any weights can be exported, also those of others; the card then says less.
"""

from dataclasses import dataclass
from pathlib import Path

from barlow_recipes.errors import UsageError
from barlow_recipes.exporting import CARD, check, file_names, write_files
from barlow_recipes.flags import Flags
from barlow_recipes.model_card import check_evaluations, read_record, write_card
from barlow_recipes.program import exit_status, start
from barlow_recipes.weights import load_encoder


@dataclass(frozen=True)
class Settings:
    """The flags, complete."""

    weights: Path
    arch: str | None
    stem: str | None
    evaluation: tuple[Path, ...]
    out: Path
    overwrite: bool


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read_settings(argv)))


def read_settings(argv: list[str] | None) -> Settings:
    parser = Flags(__doc__ or "")
    parser.add("--weights", Path, "a run's folder, or a file of weights", required=True, metavar="FILE")
    parser.add("--arch", str, "architecture [by the file]")
    parser.add("--stem", str, "first layers of a ResNet: imagenet or cifar [by the file]")
    text = "folders with a results.json of an evaluation or a transfer, for the card"
    parser.add("--evaluation", Path, text, nargs="+", default=(), metavar="FOLDER")
    parser.add("--out", Path, "folder for the files [export/ in the run's folder, or beside the file]")
    parser.switch("--overwrite", "replace the files there")
    flags = vars(parser.parse_args(argv))
    weights: Path = flags["weights"]
    flags["out"] = flags["out"] or (weights if weights.is_dir() else weights.parent) / "export"
    return Settings(**flags | {"evaluation": tuple(flags["evaluation"])})


def run(settings: Settings) -> None:
    """Load, write, read back, describe."""
    encoder = load_encoder(settings.weights, settings.arch, settings.stem)
    record = read_record(settings.weights, settings.evaluation)
    check_evaluations(encoder, record)
    taken = [name for name in file_names(encoder) if (settings.out / name).exists()]
    if taken and not settings.overwrite:
        raise UsageError(f"--out {settings.out}: holds {taken[0]}. Choose another folder, or --overwrite")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {settings.out}: cannot be written ({error.strerror or error})") from None
    files = write_files(encoder, settings.out)
    print(f"{encoder.arch} of {encoder.source}")
    for file in files:
        loaders = check(encoder, file)
        print(f"{file}: the same bits when loaded by {' and '.join(loaders)}")
    print(write_card(settings.out / CARD, encoder, files, record))


if __name__ == "__main__":
    start(main)
