"""Weights from a file, whichever program has written it; nothing in it is run.

Those tensors are taken that stand, by the names and shapes of the encoder, behind the prefix where most of them fit; if
they do not all fit, those that fit in order. What was taken and what was left is said.

This program and facebookresearch/barlowtwins have the encoder behind ``model.`` or bare, torchvision and timm bare,
solo-learn and mmselfsup in ``state_dict.backbone.``, VISSL in ``classy_state_dict.``..., MoCo, DINO and BYOL in
``encoder_q``, ``teacher`` and ``online_encoder``; lightly's is an nn.Sequential, so in order.
``module.`` and the like before or behind these are prefixes as well; ``_orig_mod.``, of torch.compile, counts nowhere.
"""

import contextlib
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow_recipes import checkpoint
from barlow_recipes.encoders import SMALL_ARCHS, STEMS, Encoder, build_encoder, is_own, is_within, resnets
from barlow_recipes.errors import UsageError, first_line, require
from barlow_recipes.outputs import BACKBONE, CHECKPOINT, CHECKPOINTS, replacing

OURS, SAFETENSORS = "a checkpoint of this program", "safetensors"
OFFICIAL, STATE_DICT = "a checkpoint of facebookresearch/barlowtwins", "a state_dict"
SECOND = ("momentum", "target", "encoder_k", "key", "student", "ema")  # in the prefix of an encoder not to prefer
COUNTER = "num_batches_tracked"  # batch norms of before torch 0.4 did not count their batches
FIRST = ("resnet50", "resnet18")  # to be tried: an architecture takes 0.1 s
RANDOM = "random"  # in the place of a file

State = Mapping[str, Tensor]
Names = dict[str, str]  # of a module's tensors: those in the file


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    path: Path
    layout: str
    tensors: State  # all, by the names that lead to them
    settings: Mapping[str, Any] = field(default_factory=dict)  # what it says of its encoder ("arch", "stem", ...)
    content: Mapping[str, Any] = field(default_factory=dict)  # all of it
    ignored: tuple[str, ...] = ()  # the kinds of objects that could only be read by running code


class Match(NamedTuple):
    """What of a file is for a module: its tensors, why they do not fit ("" if they do), and in words what was taken."""

    state: State
    problem: str
    said: str


def read_weights(path: Path) -> Weights:
    """Read a file, or of a run's folder its checkpoint; UsageError: damaged, or no tensors without running code."""
    if path.is_dir():
        found = [path / name for name in (*CHECKPOINTS, BACKBONE) if (path / name).is_file()]
        if not found:
            raise UsageError(
                f"weights {path}: expected a file, or a run's folder with {CHECKPOINT} or {BACKBONE} in it"
            )
        path = found[0]
    settings, ignored, layout = {}, (), STATE_DICT
    try:
        if path.suffix == ".safetensors":
            layout, (content, settings) = SAFETENSORS, _safetensors(path)
        elif checkpoint.is_ours(path):
            content = checkpoint.read(path)
        else:
            content, ignored = _foreign(path)
    except FileNotFoundError:
        raise UsageError(f"weights {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"weights {path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"weights {path}: expected a state_dict or a checkpoint, got {type(content).__name__}")
    tensors = dict(_named_tensors(content))
    if not tensors:
        some = ", ".join(map(str, list(content)[:3])) or "nothing"
        raise UsageError(f"weights {path}: expected tensors by their names, got {some}")
    if set(content) >= checkpoint.PARTS and checkpoint.is_ours(path):
        layout, settings = OURS, content["settings"]
    elif _is_official(content):
        layout = OFFICIAL
    return Weights(path, layout, tensors, settings, content, ignored)


def _is_official(content: Mapping[str, Any]) -> bool:
    """Whether this is what the official program saves after an epoch."""
    kinds = {"model": Mapping, "optimizer": Mapping, "epoch": int}
    known = all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    return known and any(str(name).startswith("module.projector.") for name in content["model"])


def _safetensors(path: Path) -> tuple[State, dict[str, str]]:
    library: Any = require("safetensors", str(path))
    try:
        with library.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(first_line(error)) from None


class _Inert(list[Any]):
    """Stands for whatever torch's reader of tensors and plain values refuses: it takes all, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _foreign(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What is in a pickle (ValueError), and the names in it for which there is an inert stand-in."""
    inert: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in inert.items()]):
                return torch.load(path, map_location="cpu", weights_only=True), tuple(inert)
        except OSError:
            raise
        except Exception as error:  # whatever a hostile pickle raises
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            mapping = re.search(r"Can only SETITEM.* but got <class 'inert\.(\S+)'>", str(error))
            name = mapping[1] if mapping else unknown[1] if unknown else ""
            name = name if "." in name else f"builtins.{name}"  # as the message leaves out
            if not mapping and (not unknown or name in inert):
                # The first line of torch.load's advises to run what is in the file.
                reason = re.search(r"\n\n(.+)\n\nCheck the documentation", str(error))
                said = reason[1] if reason else first_line(error)
                raise ValueError(f"not a file of tensors and plain values: {said}") from None
            # torch's reader fills no other mappings than plain ones.
            made = {"__new__": lambda *_: OrderedDict()} if mapping else {}
            inert[name] = type(name, () if mapping else (_Inert,), made | {"__module__": "inert"})


def _named_tensors(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_orig_mod.", "")
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _named_tensors(value, f"{name}.")


def find(weights: Weights, module: nn.Module, heads: tuple[str, ...] = ()) -> Match:
    """The part of a file that is for a module; ``heads`` are parts that it has no more, whose weights are left."""
    tensors, expected = weights.tensors, module.state_dict()

    shapes = {(name, value.shape) for name, value in expected.items()}
    behind = _behind_prefixes(tensors)
    fitting = {p: sum((n, tensors[found].shape) in shapes for n, found in behind[p].items()) for p in behind}
    most = max(1, *fitting.values())
    prefixes = _preferred(prefix for prefix in behind if fitting[prefix] == most) or [""]
    inside = {n: found for n, found in behind[prefixes[0]].items() if n in expected or not is_within(n, heads)}
    parts = {name.partition(".")[0] for name in expected} | {name for name, _ in module.named_children()}
    names = {name: found for name, found in inside.items() if name.partition(".")[0] in parts or name[0].isdigit()}
    problem, how = misfit(expected, {name: tensors[found] for name, found in names.items()}), ""
    if problem and (in_order := _in_order(behind, tensors, expected)):
        prefixes = _preferred(in_order)
        problem, how, names = "", " in order", in_order[prefixes[0]]
    elif problem:
        problem = misfit(expected, {name: tensors[found] for name, found in inside.items()})
    said = _words(weights, prefixes, names, len(expected) - len(names), how)
    return Match({name: tensors[found] for name, found in names.items()}, problem, said)


def _behind_prefixes(tensors: State) -> dict[str, Names]:
    """Of every prefix, shorter ones first, the names behind it: the rest of the name to the whole."""
    behind: dict[str, Names] = {"": {}}
    for name in tensors:
        for place in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            behind.setdefault(name[:place], {})[name[place:]] = name
    return dict(sorted(behind.items(), key=lambda found: len(found[0])))


def _preferred(prefixes: Iterable[str]) -> list[str]:
    """Last those of the slower or the worse of two encoders."""
    return sorted(prefixes, key=lambda prefix: any(word in prefix for word in SECOND))


def _in_order(behind: Mapping[str, Names], tensors: State, expected: State) -> dict[str, Names]:
    """The names behind prefixes where, in order, all have the last parts and the shapes that are expected."""
    wanted = [(name.rpartition(".")[2], value.shape) for name, value in expected.items()]
    found = {}
    for prefix, names in behind.items():
        if len(names) == len(wanted) and [(n.rpartition(".")[2], tensors[names[n]].shape) for n in names] == wanted:
            found[tuple(names.values())] = prefix  # the longest of those that have the same behind them
    return {prefix: dict(zip(expected, names, strict=True)) for names, prefix in found.items()}


def _words(weights: Weights, prefixes: list[str], names: Names, missing: int, how: str) -> str:
    prefix, *others = prefixes
    parent = prefix[: prefix.rfind(".", 0, -1) + 1]
    left = [name for name in weights.tensors.keys() - names.values() if not name.startswith(tuple(others))]
    groups = sorted({name.removeprefix(prefix).removeprefix(parent).partition(".")[0] for name in left})
    facts = {
        "rather than": [f"{other}*" for other in others],
        "left": groups[:4] + [f"{len(groups) - 4} more"] * (len(groups) > 4),
        "missing": [f"{missing} {COUNTER}"] * (missing > 0),
        "not read, since that runs code:": weights.ignored,
    }
    taken = f"{len(names)} tensors{f' of {prefix}*' if prefix else ''}{how}"
    return "; ".join([taken, *(f"{label} {', '.join(values)}" for label, values in facts.items() if values)])


def misfit(expected: State, found: State) -> str:
    """In words, why a state_dict with the shapes of ``found`` cannot be loaded; nothing if it can."""
    names = {
        "missing": [name for name in expected if name not in found and not name.endswith(COUNTER)],
        "unexpected": [name for name in found if name not in expected],
    }
    if any(names.values()):
        firsts = [f"the first {label} is {some[0]}" for label, some in names.items() if some]
        counts = f"{len(names['missing'])} names are missing and {len(names['unexpected'])} unexpected"
        return f"{counts}: {', '.join(firsts)}"
    for name, value in found.items():
        if value.shape != expected[name].shape:
            return f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
    return ""


def load(module: nn.Module, match: Match, path: Path) -> None:
    """Put in what was found in a file; UsageError: a value is not finite, as of a run that has diverged."""
    bad = next((name for name, value in match.state.items() if not value.float().isfinite().all()), None)
    if bad:
        raise UsageError(f"weights {path}: {bad} has values that are not finite; give an earlier checkpoint")
    module.load_state_dict(match.state, strict=False)


def find_encoder(weights: str, arch: str | None, stem: str | None = None, *images: int) -> Encoder:
    """That of :func:`load_encoder`, or for "random" one with random weights, by default a ResNet-50."""
    if weights == RANDOM:
        return build_encoder(arch or "resnet50", stem or STEMS[0], *images)
    return load_encoder(Path(weights), arch, stem, *images)


def load_encoder(
    path: Path,
    arch: str | None = None,
    stem: str | None = None,
    channels: int | None = None,
    image_size: int | None = None,
) -> Encoder:
    """The encoder that a file, or a run's folder, has the weights of.

    What is None is as the file says or, where it is silent, as its names and shapes say of torchvision's ResNets.
    UsageError where its weights do not fit, with the first missing and unexpected names.
    """
    weights = read_weights(path)
    known = _known(weights.settings)
    found = (known["arch"], known.get("stem", STEMS[0])) if "arch" in known else None
    if found is None and (arch is None or arch in resnets()):
        found = recognized(weights)
    if arch is None and found is None:
        problem = find(weights, *_without_memory("resnet50", STEMS[0])).problem
        raise UsageError(
            f"weights {weights.path}: no ResNet of torchvision has its names and shapes. Name the architecture with "
            f"--arch, such as vit_b_16 or timm/convnext_tiny. {problem}"
        )
    arch_found, stem_found = found or ("", STEMS[0])
    if arch is None and is_own(arch_found):  # a file must not decide what is run
        raise UsageError(f"weights {weights.path}: made by code of your own. Name it with --arch {arch_found}")
    arch, stem = arch or arch_found, stem or (stem_found if arch in (None, arch_found) else STEMS[0])
    channels = channels or known.get("channels") or _channels(weights)
    encoder = build_encoder(arch, stem, channels, image_size or known.get("image_size"))
    match = find(weights, encoder.module, encoder.heads)
    if match.problem:
        named = f"{arch} with the {stem} stem" if arch in resnets() else arch
        found = found or recognized(weights)
        hint = "; they fit --arch {} --stem {}".format(*found) if found else ""
        raise UsageError(f"weights {weights.path}: expected those of {named}, but {match.problem}{hint}")
    load(encoder.module, match, weights.path)
    mapping = "" if weights.layout == OURS else f": {match.said}"
    pixels = {name: known[name] for name in ("value_range", "mean", "std") if known.get(name)}
    return encoder._replace(source=f"{weights.path} ({weights.layout}{mapping})", pixels=pixels)


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its encoder and images; of safetensors all values are text."""
    known = dict(settings)
    for name in {"channels", "image_size", "value_range", "mean", "std"} & known.keys():
        with contextlib.suppress(TypeError, ValueError):
            value = json.loads(known[name]) if isinstance(known[name], str) else known[name]
            known[name] = int(value) if name in ("channels", "image_size") else [*map(float, value)]
            continue
        del known[name]
    return known


def _channels(weights: Weights) -> int:
    """Of the images, as the first convolution in the file says."""
    return next((v.shape[1] for name, v in weights.tensors.items() if v.ndim == 4 and name.endswith("weight")), 3)


def save_safetensors(path: Path, state: State, encoder: Encoder, **facts: str) -> None:
    """Tensors, and in the metadata of what encoder they are (Aborted)."""
    library: Any = require("safetensors.torch", path.name)
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    known = {"format": "pt", "arch": encoder.arch, "stem": encoder.stem, "image_size": str(encoder.shape[1])}
    with replacing(path) as temporary:
        temporary.write_bytes(library.save(tensors, known | facts))


def digest(module: nn.Module) -> str:
    """The SHA-256 of all that the module holds."""
    sha256 = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def recognized(weights: Weights) -> tuple[str, str] | None:
    """The architecture and the stem, of ResNets and the small ones, whose names and shapes these are."""
    known = [(arch, stem) for stem in STEMS for arch in sorted(resnets(), key=FIRST.__contains__, reverse=True)]
    for arch, stem in (*known, *((arch, STEMS[0]) for arch in SMALL_ARCHS)):
        if not find(weights, *_without_memory(arch, stem, _channels(weights))).problem:
            return arch, stem
    return None


@cache
def _without_memory(arch: str, stem: str, channels: int = 3) -> tuple[nn.Module, tuple[str, ...]]:
    with torch.device("meta"):
        encoder = build_encoder(arch, stem, channels)
    return encoder.module, encoder.heads
