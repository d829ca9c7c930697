"""Give a pretrained encoder away: in files that plain torchvision and timm load, with a card that says what it is.

    python examples/export_backbone.py --weights runs/imagenet-resnet50 --out to-publish

The folder gets ``backbone.safetensors``; where torchvision or timm has the architecture, ``NAME.pth``, a state_dict for
it; and ``README.md``, the model card, filled from the run's own records. Each file is read back, and the encoder in it
compared bit for bit with the one that was exported. --push uploads them. Of others' weights the card says less.
"""

from dataclasses import dataclass
from pathlib import Path

from barlow_recipes.command_line import read
from barlow_recipes.errors import UsageError
from barlow_recipes.exporting import check, file_names, hub_of, push, read_record, write_card, write_files
from barlow_recipes.outputs import writing
from barlow_recipes.program import exit_status, start
from barlow_recipes.weights import load_encoder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    weights: Path  # a run's folder, or a file of weights
    arch: str | None = None  # architecture: of torchvision, timm/NAME or module:callable; without it as the file says
    stem: str | None = None  # first layers of a ResNet: imagenet or cifar; without it as the file says
    out: Path | None = None  # folder for the files; without it export/ in the run's folder, or beside the file
    overwrite: bool = False  # replace the files there
    push: str | None = None  # repository of the Hugging Face Hub, such as NAME/resnet50-barlow, to which to upload them


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is that of :func:`~barlow_recipes.program.exit_status`."""
    return exit_status(lambda: run(read(Settings, argv, __doc__ or "")))


def run(settings: Settings) -> None:
    """Load, write, read back, describe, upload."""
    hub = hub_of(settings.push) if settings.push else None  # now, not after the work
    encoder = load_encoder(settings.weights, settings.arch, settings.stem)
    record = read_record(settings.weights)
    out = settings.out or (settings.weights if settings.weights.is_dir() else settings.weights.parent) / "export"
    taken = [name for name in file_names(encoder) if (out / name).exists()]
    if taken and not settings.overwrite:
        raise UsageError(f"--out {out}: holds {taken[0]}. Choose another folder, or --overwrite")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    files = write_files(encoder, out)
    print(f"{encoder.arch} of {encoder.source}")
    for file in files:
        loaders = check(encoder, file)
        print(f"{file}: the same bits when loaded by {' and '.join(loaders)}")
    card = write_card(encoder, files, record)
    print(f"{card}: the model card" + ("" if record["settings"] else "; it does not say how it was pretrained"))
    if hub and settings.push:
        print(f"uploaded to {push(hub, settings.push, [*files, card])}")


if __name__ == "__main__":
    start(main)
