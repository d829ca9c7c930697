"""The tables of errors: in one process, and over several of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baselines import JOINT, OURS, PAPER, RELAXED, UNBIASED
from table_format import NONE, error, grid, listed, names, paragraphs, percent
from table_speed import compact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Record = dict[str, Any]

DIFFERENCES = {
    PAPER: "the paper's loss",
    UNBIASED: "unbiased deviation",
    JOINT: "statistics of both views together",
    RELAXED: "relaxed sum",
}
SAME_DIRECTION = 0.9999  # of cosines: the rest is length
RIGHT = 1e-3  # a gradient error below it is rounding, above it another function


def exactness(results: Record, chosen: Callable[[list[Record]], list[str]] = compact) -> str:
    """The largest distance of each contender to float64: of its own function, and of the paper's where it differs."""
    cells = results.get("cells", [])
    if not cells:
        return ""
    head = ["", "computes", "from its own float64: loss", "gradient", "from the paper's loss: loss", "gradient"]
    rows = []
    for name in chosen(cells):
        found = [cell["contenders"][name] for cell in cells if name in cell["contenders"]]
        own = [_largest(c["error_of_own"][what] for c in found) for what in ("loss", "gradient")]
        other = [_largest(c[f"{what}_error"] for c in found) for what in ("loss", "gradient")]
        definition = found[0]["definition"]
        rows.append([name, DIFFERENCES[definition], *own, *(["", ""] if definition == PAPER else other)])
    return paragraphs(grid(head, rows), _sentences(cells))


def _largest(errors: Iterable[float]) -> str:
    return error(max(errors))


def _sentences(cells: list[Record]) -> str:
    shapes = len({(cell["n"], cell["d"]) for cell in cells})
    ours = [cell["contenders"][OURS] for cell in cells]
    sentences = [
        f"The largest relative error over {shapes} shapes. Ours is at most {_largest(c['loss_error'] for c in ours)} "
        f"from the loss in float64 and {_largest(c['gradient_error'] for c in ours)} from its gradient."
    ]
    found = {name: [c["contenders"][name] for c in cells if name in c["contenders"]] for name in names(cells)}
    others = {name: own for name, own in found.items() if own[0]["definition"] != PAPER}
    if others:
        far = listed(f"{name} by up to {_farthest(own)}" for name, own in others.items())
        sentences.append(f"Another loss than the paper's is computed, of another value and gradient: {far}.")
    return " ".join(sentences)


def _farthest(found: list[Record]) -> str:
    loss, gradient = (max(c[field] for c in found) for field in ("loss_error", "gradient_error"))
    return f"{percent(loss)} and {percent(gradient)}"


def over_processes(results: Record) -> str:
    """What each contender makes of shards: distance to float64 of the whole batch's loss, after DDP's mean."""
    settings = results.get("distributed", {}).get("exactness", [])
    if not settings:
        return ""
    rows = [[name, *(_found(setting, name) for setting in settings)] for name in names(settings)]
    head = ["loss error / gradient error / cosine", *map(_title, settings)]
    return paragraphs(grid(head, rows), _process_sentences(settings))


def _title(setting: Record) -> str:
    even = "even" if len(set(setting["rows"])) == 1 else "uneven"
    return f"{setting['processes']} processes, {even}: {' + '.join(map(str, setting['rows']))}"


def _found(setting: Record, name: str) -> str:
    found = setting["contenders"].get(name)
    if found is None:
        return NONE
    if "refused" in found:
        return "refuses"
    return f"{error(found['loss_error'])} / {error(found['gradient_error'])} / {found['gradient_cosine']:.4f}"


def _process_sentences(settings: list[Record]) -> str:
    """Who is right, whose gradient is only too short or too long, and who refused why."""
    measured = [(name, setting, c) for setting in settings for name, c in setting["contenders"].items()]
    answered = [(name, setting, c) for name, setting, c in measured if "refused" not in c]
    everywhere = [
        name for name in names(settings) if all(_is_right(setting["contenders"].get(name)) for setting in settings)
    ]
    first = "The whole batch in one process, in float64, is the truth; gradients are those after DDP's mean."
    right = f"Right everywhere (errors below {RIGHT:g}): {listed(everywhere) if everywhere else 'none'}."
    lines = [f"{first} {right}"]
    scaled = dict.fromkeys(
        name for name, _, c in answered if c["gradient_cosine"] > SAME_DIRECTION and c["gradient_error"] > RIGHT
    )
    if scaled:
        lines.append(
            f"The gradient has the right direction and a wrong length with {listed(map(_length(answered), scaled))}."
        )
    refusals = dict.fromkeys((name, c["refused"]) for name, _, c in measured if "refused" in c)
    lines += [f"{name} refuses: “{_one_line(reason)}”." for name, reason in refusals]
    return "\n".join(lines)


def _is_right(found: Record | None) -> bool:
    return found is not None and "refused" not in found and max(found["loss_error"], found["gradient_error"]) < RIGHT


def _length(answered: list[tuple[str, Record, Record]]) -> Callable[[str], str]:
    """The name, and that the length is 1/W of the right one where that is what was measured in every setting."""

    def said(name: str) -> str:
        found = [
            abs(c["gradient_error"] - (1 - 1 / setting["processes"])) < RIGHT
            for other, setting, c in answered
            if other == name and c["gradient_cosine"] > SAME_DIRECTION
        ]
        return f"{name} (1/W of it)" if all(found) else name

    return said


def _one_line(reason: str) -> str:
    return " ".join(reason.split()).replace("|", "\\|")
