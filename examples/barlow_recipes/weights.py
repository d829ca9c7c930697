"""Weights from a file, whichever program has written it; nothing in it is run.

| layout | what it holds |
|---|---|
| a run of this program | checkpoint.pt: encoder, projector, settings; backbone.pt: the encoder |
| safetensors | the encoder, as exported by this program or any other |
| facebookresearch/barlowtwins | checkpoint.pth: epoch, model (``module.backbone.*``, ...), optimizer; resnet50.pth |
| torchvision, timm | a state_dict, with or without its classifier; bare, or as "state_dict" or "model" of a dict |
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from barlow_recipes import checkpoint
from barlow_recipes.encoders import SMALL_ARCHS, STEMS, Encoder, build_encoder, resnets
from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.reporting import BACKBONE, CHECKPOINT

OURS, SAFETENSORS = "a checkpoint of this program", "safetensors"
OFFICIAL, STATE_DICT = "a checkpoint of facebookresearch/barlowtwins", "a state_dict"
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
BACKBONE_PREFIX, PROJECTOR_PREFIX = "backbone.", "projector."

FIRST = ("resnet50", "resnet18")  # to be tried: an architecture takes 0.1 s

State = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Weights:
    """What a file says of an encoder: ``content`` is all of it; where it is silent, ``arch`` and ``stem`` are None."""

    path: Path
    layout: str
    backbone: State
    projector: State = field(default_factory=dict)
    arch: str | None = None
    stem: str | None = None
    content: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Read a file, or of a run's folder its checkpoint, on the CPU.

    Raises:
        UsageError: it is not there, damaged, or none of the layouts; or it could only be read by running code in it.
    """
    path = _file_of(path)
    try:
        if path.suffix == ".safetensors":
            return _from_safetensors(path)
        own = checkpoint.is_ours(path)
        content = checkpoint.read(path) if own else _foreign(path)
    except FileNotFoundError:
        raise UsageError(f"weights {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"weights {path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"weights {path}: expected a state_dict or a checkpoint, got {type(content).__name__}")
    if own and set(content) >= checkpoint.PARTS:
        settings = content["settings"]
        parts = _parts(path, content["model"])
        return Weights(path, OURS, *parts, settings["arch"], settings["stem"], content)
    layout = OFFICIAL if is_official(content) else STATE_DICT
    inner = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)), content)
    return Weights(path, layout, *_parts(path, inner), content=content)


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether this is what the official program saves after an epoch."""
    return isinstance(content.get("model"), Mapping) and {"epoch", "optimizer"} <= set(content)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = (CHECKPOINT, checkpoint.previous(Path(CHECKPOINT)).name, BACKBONE)
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise UsageError(f"weights {path}: expected a file, or a run's folder with {CHECKPOINT} or {BACKBONE} in it")
    return found[0]


def _from_safetensors(path: Path) -> Weights:
    safetensors: Any = require("safetensors", str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(first_line(error)) from None
    return Weights(path, SAFETENSORS, *_parts(path, state), metadata.get("arch"), metadata.get("stem"), metadata)


def _exclude_bias_and_norm(_: object) -> None:
    """Stands for the function that the official optimiser keeps in its groups, and that weights_only refuses."""


def _foreign(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_exclude_bias_and_norm, "__main__.exclude_bias_and_norm")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a hostile pickle raises
        raise ValueError(f"not a file of tensors and plain values: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """In one line; of torch.load's not the first, which advises to run what is in the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-2] if isinstance(error, UnpicklingError) and len(lines) > 2 else first_line(error)


def _parts(path: Path, state: Mapping[str, Any]) -> tuple[State, State]:
    """The encoder's tensors and the projector's, by their names there."""
    tensors = {_bare(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        some = ", ".join(map(str, list(state)[:3]))
        raise UsageError(f"weights {path}: expected tensors by their names, got {some or 'nothing'}")
    if not any(name.startswith(BACKBONE_PREFIX) for name in tensors):
        return tensors, {}
    backbone, projector = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (BACKBONE_PREFIX, PROJECTOR_PREFIX)
    )
    return backbone, projector


def _bare(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def load_encoder(path: Path, arch: str | None = None, stem: str | None = None) -> Encoder:
    """The encoder that a file has the weights of.

    Args:
        path: of the file, or a run's folder.
        arch: its architecture, as of :func:`~barlow_recipes.encoders.build_encoder`; None: what the file says or, where
            it is silent, what its names and shapes say of torchvision's ResNets.
        stem: likewise.

    Raises:
        UsageError: the file cannot be read or its weights do not fit: with the first missing and unexpected names.
    """
    weights = read_weights(path)
    found = (weights.arch, weights.stem) if weights.arch else recognized(weights.backbone)
    if arch is None and found is None:
        raise UsageError(
            f"weights {weights.path}: no ResNet of torchvision has its names and shapes. Name the architecture with "
            f"--arch, such as vit_b_16 or timm/convnext_tiny. {_misfit(build_encoder('resnet50'), weights.backbone)}"
        )
    arch_found, stem_found = found or (None, None)
    encoder = build_encoder(arch or arch_found or "", stem or stem_found or "imagenet")
    named = f"{encoder.arch} with the {encoder.stem} stem" if encoder.arch in resnets() else encoder.arch
    hint = f"; they fit --arch {arch_found} --stem {stem_found}" if arch_found else ""
    fill(
        encoder.module,
        without(weights.backbone, encoder.heads),
        f"weights {weights.path}: expected those of {named}",
        hint,
    )
    return encoder._replace(source=f"{weights.path} ({weights.layout})")


def fill(module: nn.Module, state: State, expected: str, hint: str = "") -> None:
    """Load a state_dict whose every tensor fits.

    Raises:
        UsageError: it does not; the message begins with ``expected``, names the first misfits and ends with ``hint``.
    """
    if problem := misfit(shapes(module.state_dict()), shapes(state)):
        raise UsageError(f"{expected}, but {problem}{hint}")
    module.load_state_dict(state, strict=False)


def _misfit(encoder: Encoder, state: State) -> str:
    return misfit(shapes(encoder.module.state_dict()), shapes(without(state, encoder.heads)))


def misfit(expected: Shapes, found: Shapes) -> str:
    """In words, why a state_dict with these shapes cannot be loaded; nothing if it can.

    Batch norms of before torch 0.4 did not count their batches.
    """
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        first = [f"the first missing is {missing[0]}"] if missing else []
        first += [f"the first unexpected is {unexpected[0]}"] if unexpected else []
        return f"{len(missing)} names are missing and {len(unexpected)} unexpected: {', '.join(first)}"
    for name, shape in found.items():
        if shape != expected[name]:
            return f"{name} is {tuple(shape)} instead of {tuple(expected[name])}"
    return ""


def without(state: State, heads: tuple[str, ...]) -> State:
    """The state without the parameters of the classifier."""
    return {name: value for name, value in state.items() if name.rpartition(".")[0] not in heads}


def shapes(state: State) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def digest(module: nn.Module) -> str:
    """The SHA-256 of all that the module holds."""
    sha256 = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def recognized(state: State) -> tuple[str, str] | None:
    """The architecture and the stem, of those that pretraining knows, whose names and shapes these are."""
    known = [(arch, stem) for stem in STEMS for arch in sorted(resnets(), key=FIRST.__contains__, reverse=True)]
    known += [(arch, STEMS[0]) for arch in SMALL_ARCHS]
    return next((pair for pair in known if not _misfit(_without_memory(*pair), state)), None)


@cache
def _without_memory(arch: str, stem: str) -> Encoder:
    with torch.device("meta"):
        return build_encoder(arch, stem)
