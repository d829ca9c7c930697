"""The tables of what a step costs the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from table_format import counted, grid, paragraphs, plain, shape, spread, times

if TYPE_CHECKING:
    Record = dict[str, Any]


def host(results: Record) -> str:
    """Small steps beside what they are measured against, and the operations of a step."""
    section = results.get("host")
    if not section:
        return ""
    head = ["a small step", "N × D", "dtype", "ours, µs", "beside", "takes, µs", "ours / that"]
    return paragraphs(grid(head, map(_row, section["steps"])), _sentences(section))


def _row(found: Record) -> list[str]:
    own, reference = (plain(1e6 * found[key]["median"]) for key in ("seconds", "reference_seconds"))
    over = times(found["over_reference"]["median"])
    return [found["what"], shape(found), found["dtype"], own, found["reference"], reference, over]


def _sentences(section: Record) -> str:
    sentences = ["Processor time of one thread, forward and backward; medians, of ratios within a round."]
    counts = [f"{counted(each['operations'], 'operation')} at {shape(each)}" for each in section["operations"]]
    sentences.append(f"In eager mode a step on the CPU dispatches {' and '.join(counts)}, views among them.")
    sentences += [
        f"The pretended GPU executes none of the {len(found['launches'])} launches of Triton's kernels: what is timed "
        "is the host's part of them, with the matrix products on the CPU."
        for found in section["steps"]
        if "launches" in found
    ]
    sentences += [f"Not measured: {what}, because {reason}." for what, reason in section["left_out"].items()]
    return " ".join(sentences)


def host_details(results: Record) -> str:
    """Both sides of every ratio, with quartiles."""
    section = results.get("host")
    if not section:
        return ""
    head = ["a small step", "N × D", "rounds", "ours, µs (quartiles)", "beside", "takes, µs (quartiles)"]
    rows = []
    for found in section["steps"]:
        own, reference = (spread(found[key], 1e6) for key in ("seconds", "reference_seconds"))
        row = [found["what"], shape(found), str(found["rounds"]), own, found["reference"], reference]
        rows.append([*row, spread(found["over_reference"])])
    return grid([*head, "ours / that (quartiles)"], rows)
