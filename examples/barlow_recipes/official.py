"""Beginning from a file of weights, and going on from a checkpoint of facebookresearch/barlowtwins."""

from dataclasses import replace
from pathlib import Path

from barlow_recipes import checkpoint
from barlow_recipes.checkpoint import TrainingState
from barlow_recipes.errors import UsageError
from barlow_recipes.models import BarlowTwins
from barlow_recipes.optimization import LARS, LEARNING_RATE_BIASES
from barlow_recipes.weights import OFFICIAL, Match, Weights, find, load, misfit, read_weights


def initialize(model: BarlowTwins, path: Path, strict: bool = False) -> str:
    """Put the weights of a file (UsageError) into the encoder and, if one is there and fits, into the projector.

    With ``strict`` it has to. Returns in words what came from where.
    """
    weights = read_weights(path)
    said, problem = _load(model, weights)
    if strict and problem:
        raise UsageError(f"weights {weights.path}: expected those of this --projector, but {problem}")
    what = f"the encoder (the projector has random weights: {problem})" if problem else "encoder and projector"
    return f"begins with {what} of {weights.path}, {weights.layout}: {said}"


def read_official(path: Path) -> Weights | None:
    """What is in the file, if it is a checkpoint of the official program."""
    if not path.is_file() or checkpoint.is_ours(path):
        return None
    try:
        weights = read_weights(path)
    except UsageError:
        return None
    return weights if weights.layout == OFFICIAL else None


def resume_official(weights: Weights, state: TrainingState, learning_rate_biases: float, steps_per_epoch: int) -> str:
    """Take over model, momenta and epoch of the official program's checkpoint; returns in words what is continued.

    Both step by LARS, with μ ← 0.9 μ + d and p ← p − lr·μ, and number the parameters alike: first the matrices, then
    the vectors. Here another learning rate of the vectors may belong to the same updates, since the official gradient
    is 1/W of the true one (see :func:`.settings.official`), and with it another μ: lr·μ stays what it was. UsageError:
    the weights do not fit the model, or the optimiser is another one.
    """
    if not isinstance(state.optimizer, LARS):
        raise UsageError(f"--resume {weights.path}: that run was optimised by LARS, expected --optimizer lars")
    if problem := _load(state.model, weights)[1]:
        raise UsageError(f"--resume {weights.path}: expected the weights of this --projector, but {problem}")
    factors = (1.0, LEARNING_RATE_BIASES / learning_rate_biases if learning_rate_biases else 1.0)
    saved = weights.content["optimizer"].get("state", {})
    found = {str(number): values["mu"] for number, values in saved.items() if "mu" in values}
    groups = zip(state.optimizer.param_groups, factors, strict=True)
    ours = [(parameter, factor) for group, factor in groups for parameter in group["params"]]
    if problem := misfit({str(number): parameter for number, (parameter, _) in enumerate(ours)}, found):
        raise UsageError(
            f"--resume {weights.path}: its optimizer is not of this model: of the momenta by number, {problem}"
        )
    momenta = {number: {"mu": found[str(number)] * factor} for number, (_, factor) in enumerate(ours)}
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": momenta})
    epoch = int(weights.content["epoch"])
    state.step = epoch * steps_per_epoch
    before = {"last_epoch": state.step - 1, "_step_count": state.step + 1}
    state.schedule.load_state_dict(state.schedule.state_dict() | before)
    state.schedule.step()  # which sets the learning rates
    return f"continues {weights.path}, {weights.layout}, after its epoch {epoch}"


def _load(model: BarlowTwins, weights: Weights) -> tuple[str, str]:
    """Returns in words what was taken for the encoder (UsageError), and why nothing for the projector."""
    marked = {name: f".{name}" for name in weights.tensors if ".projector." in f".{name}"}
    inside = {name: mark.rpartition(".projector.")[2] for name, mark in marked.items()}
    projector = Match({}, "the file has none", "")
    if inside:
        tensors = {within: weights.tensors[name] for name, within in inside.items()}
        projector = find(replace(weights, tensors=tensors), model.projector)
    left = {name: value for name, value in weights.tensors.items() if projector.problem or name not in inside}
    encoder = find(replace(weights, tensors=left), model.backbone, model.heads)
    if encoder.problem:
        expected = "those of this encoder (--arch, --stem)"
        raise UsageError(f"weights {weights.path}: expected {expected}, but {encoder.problem}")
    load(model.backbone, encoder, weights.path)
    if not projector.problem:
        load(model.projector, projector, weights.path)
    return encoder.said, projector.problem
