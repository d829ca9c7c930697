"""Losses that are not finite, other numbers of loader processes, other numbers of processes."""

import json
from pathlib import Path
from typing import Any

from plan import DIGITS, Plan, Row, on_jpegs
from runs import Training, expect, expect_same_end, rows, state

WAYS = {"loss": 14, "gradient": 17, "images": 20}  # what is NaN on the one rank, and in which step


def non_finite_loss(plan: Plan) -> Row:
    row = Row(
        "a loss that is not finite, on one rank of two",
        "both ranks leave the step out: the same weights as before it, finite buffers, an event; "
        "5 in a row: status 1 on both",
    )
    for rank in (1, 0)[: plan.count(2, 1)]:
        folder = plan.folder / f"{rank}"
        for run in _start(plan, folder, rank, {way: [step] for way, step in WAYS.items()}):
            run.succeed()
        for way, step in WAYS.items():
            with row.injection(f"the {way} of rank {rank}"):
                _expect_left_out(folder, step)
        with row.check("the other steps"):
            _expect_left_out_alone(folder)
        with row.injection(f"5 losses of rank {rank} in a row"):
            one, other = _start(plan, plan.folder / f"five-{rank}", rank, {"loss": [*range(5, 10)]})
            expect((one.wait(), other.wait()) == (1, 1), f"status {one.status} and {other.status}, not 1")
            told = [line for run in (one, other) for line in run.told]
            expect(len(told) == 1 and "not finite in 5 steps in a row" in told[0], f"not one line: {told}")
            expect(state(one.out)["step"] == 6, f"the checkpoint is of step {state(one.out)['step']}, not 6")
    return row


def _start(plan: Plan, folder: Path, rank: int, ways: dict[str, list[int]]) -> list[Training]:
    folder.mkdir()
    changes = [["quick"], ["weights", str(folder)], ["fails", rank, ways]]
    return plan.nursery.ranks(2, folder, *DIGITS, changes=changes)


def _noted(folder: Path, what: str, rank: int) -> dict[int, Any]:
    return dict(json.loads(line) for line in (folder / f"{what}-{rank}.jsonl").read_text().splitlines())


def _expect_left_out(folder: Path, step: int) -> None:
    (before, _), (after, finite) = (_noted(folder, "weights", 0)[number] for number in (step - 1, step))
    expect(after == before, "the weights have changed")
    expect(finite, "a buffer of the model is not finite afterwards")


def _expect_left_out_alone(folder: Path) -> None:
    first, second = ({step: noted[0] for step, noted in _noted(folder, "weights", rank).items()} for rank in (0, 1))
    expect(
        first == second, f"the ranks' weights differ after {[step for step in first if first[step] != second[step]]}"
    )
    unchanged = [step for step in first if step > 1 and first[step] == first[step - 1]]  # a warm-up begins with rate 0
    expect(unchanged == [*WAYS.values()], f"the weights are unchanged in {unchanged}")
    told = [event["step"] for event in rows(folder / "out", "event")]
    expect(told == [*WAYS.values()], f"events of {told}")


def other_workers(plan: Plan) -> Row:
    row = Row("resume with another number of loader processes", "0 differing bits")
    data = plan.jpegs()
    whole = plan.nursery.start(plan.folder / "whole", *on_jpegs(data, workers=0)).succeed().out
    for numbers in ((0, 2), (2, 3, 0), (3, 0, 2))[: plan.count(3, 1)]:
        with row.injection(f"--workers {', '.join(map(str, numbers))}"):
            folder = plan.folder / "-".join(map(str, numbers))
            for position, workers in enumerate(numbers, start=1):
                limit = [] if position == len(numbers) else ["--limit-steps", 7 * position - 3]  # amid an epoch
                plan.nursery.start(folder, *on_jpegs(data, workers), *limit).succeed()
            expect_same_end(folder / "out", whole)
    return row


def other_processes(plan: Plan) -> Row:
    """With SGD and LARS. AdamW divides tiny gradients by their own size, and with it float32 parts within ten steps.

    In float32 these part as well, if later: in one process 1e-7 of the first weights becomes 0.08 in 120 steps of SGD,
    while 1e-12 in float64 becomes 2e-11. The bound of float32 is missed since one process and several round unlike.
    """
    row = Row(
        "resume with another number of processes",
        "the same samples in every step; weights within 1e-12 in float64, 1e-4 in float32",
    )
    sizes, steps = ((1, 2, 1), 12) if plan.short else ((1, 2, 4, 1), 120)
    for optimizer, rate, rate_of_biases in (("lars", 10, 0.02), ("sgd", 0.002, 0.002))[: plan.count(2, 1)]:
        for change, limit in (("in_float64", 1e-12), ("in_float32", 1e-4))[: plan.count(2, 1)]:
            with row.injection(f"{sizes} processes, {optimizer} {change}"):
                ends = [steps * number // len(sizes) for number in range(1, len(sizes) + 1)]
                folders = plan.folder / f"{optimizer}-{change}-whole", plan.folder / f"{optimizer}-{change}-turns"
                flags = (*DIGITS, "--epochs", 12, "--optimizer", optimizer, "--learning-rate-weights", rate)
                flags += ("--learning-rate-biases", rate_of_biases)
                _train(plan, folders[0], change, 1, *flags, "--limit-steps", steps)
                for size, end in zip(sizes, ends, strict=True):
                    _train(plan, folders[1], change, size, *flags, "--limit-steps", end)
                whole, turns = (_samples(folder) for folder in folders)
                expect(len(whole) == steps and whole == turns, "other samples")
                difference = _difference(*folders)
                row.measure(f"{change.removeprefix('in_')}, {optimizer}:", difference)
                expect(difference <= limit, f"the weights differ by {difference:.3g}")
    return row


def _train(plan: Plan, folder: Path, change: str, size: int, *flags: object) -> None:
    folder.mkdir(exist_ok=True)
    changes = [["quick"], ["samples", str(folder)], *([[change]] if change == "in_float64" else [])]
    for run in plan.nursery.ranks(size, folder, *flags, changes=changes):
        run.succeed()


def _samples(folder: Path) -> dict[int, list[list[str]]]:
    """The hashes of each step's images, of both views, in the order of the ranks."""
    parts: dict[int, list[list[str]]] = {}
    for rank in range(len(list(folder.glob("samples-*.jsonl")))):
        for step, views in _noted(folder, "samples", rank).items():
            parts[step] = [a + b for a, b in zip(parts.get(step, [[], []]), views, strict=True)]
    return parts


def _difference(one: Path, other: Path) -> float:
    left, right = (state(folder / "out")["model"] for folder in (one, other))
    return max(float((left[name] - right[name]).abs().max()) for name in left if left[name].is_floating_point())
