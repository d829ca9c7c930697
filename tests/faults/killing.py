"""Processes that are killed, and processes that are asked to stop."""

import signal
import time
from pathlib import Path

import start
import torch
from plan import DIGITS, EPOCH, Plan, Row, on_jpegs
from runs import Training, expect, expect_same_end, expect_same_steps, send, state

from barlow_recipes import checkpoint
from barlow_recipes.errors import UsageError
from programs import Wrong

MOST_SECONDS = 20.0  # from the death of a rank to the end of the run


class Lost(Wrong):
    """A checkpoint that had been acknowledged is gone."""


def killed_save(plan: Plan) -> Row:
    row = Row("SIGKILL while checkpoints are saved", "0 acknowledged saves lost")
    inside = 0
    for number in range(plan.count(40, 4)):
        with row.injection(f"kill {number + 1}"):
            inside += _kill_a_saver(plan, f"{number}")
    row.note(f"{inside} of {row.injected} kills within a save")
    lost, kills = _lost_in_place(plan)
    row.note(f"a writer in place lost {lost} of {kills}")
    with row.check("a writer in place"):
        expect(lost, "it lost nothing: these kills prove nothing")
    return row


def _kill_a_saver(plan: Plan, name: str, *bugs: str) -> bool:
    """Tell whether a save was in progress; one that was acknowledged must not be lost."""
    folder = plan.folder / name
    path = folder / "checkpoint.pt"
    saver = plan.nursery.start(folder, changes=[*([bug] for bug in bugs), ["save_forever", str(path)]])
    saver.until(lambda: "saved 1\n" in saver.output, "the first save")
    time.sleep(plan.random.uniform(0, 0.2))
    send(saver.pid, signal.SIGKILL)
    expect(saver.wait() == -signal.SIGKILL, f"ended by itself: {saver.errors[-500:]}")
    begun, ended = (saver.output.count(f"{word} ") for word in ("saving", "saved"))
    try:
        content, *_ = checkpoint.load(path)
    except UsageError as error:
        raise Lost(f"{ended} saves were acknowledged, and none is left: {error}") from None
    step = content["step"]
    if step < ended:
        raise Lost(f"{ended} saves were acknowledged, and step {step} is left")
    expect(torch.equal(content["model"], start.state_of(step)["model"]), f"another content than that of step {step}")
    return begun > ended


def _lost_in_place(plan: Plan) -> tuple[int, int]:
    """How many kills a writer in place does not survive, of how many; the short form stops at the first."""
    lost = kills = 0
    while kills < 40 and not (lost and plan.short):
        kills += 1
        try:
            _kill_a_saver(plan, f"in-place-{kills}", "saves-in-place")
        except Lost:
            lost += 1
    return lost, kills


def killed_rank(plan: Plan) -> Row:
    row = Row(
        "SIGKILL of one rank of two under torchrun",
        f"end ≤ {plan.at_most(MOST_SECONDS):.0f} s after it; 0 steps lost beyond the checkpoint; 0 differing bits",
    )
    reference = plan.references.of(2)
    ranks = [number % 2 for number in range(plan.count(20, 2))]
    plan.random.shuffle(ranks)
    for number, killed in enumerate(ranks[first : first + 2] for first in range(0, len(ranks), 2)):
        folder, saved = plan.folder / f"{number}", 0
        for rank in killed:
            with row.injection(f"rank {rank} of run {number + 1}, which goes on from step {saved}"):
                launch = plan.nursery.torchrun(folder, *DIGITS)
                saved = _kill_a_rank(plan, row, launch, rank, saved)
                expect_same_steps(launch.out, reference)
        with row.check(f"the end of run {number + 1}"):
            for last in plan.nursery.ranks(2, folder, *DIGITS):
                last.succeed()
            expect_same_end(folder / "out", reference)
    if not plan.short:
        with row.injection("rank 1 under --max-restarts"):
            launch = plan.nursery.torchrun(plan.folder / "restarted", *DIGITS, launcher=("--max-restarts", "1"))
            launch.reach(7)
            send(launch.rank(1), signal.SIGKILL)
            expect_same_end(launch.succeed().out, reference)
    return row


def _kill_a_rank(plan: Plan, row: Row, launch: Training, rank: int, saved: int) -> int:
    """Kill it in some step, or now and then while it starts; get the step of the checkpoint that is left."""
    victim = launch.rank(rank)
    if not plan.short and plan.random.random() < 0.2:
        time.sleep(plan.random.uniform(0, 4))
    else:
        launch.reach(saved + plan.random.randint(1, 6))
        _expect_continued(launch, saved)
        time.sleep(plan.random.uniform(0, 0.05))
    killed = send(victim, signal.SIGKILL)
    status = launch.wait(plan.at_most(MOST_SECONDS))
    row.measure("s to the end", time.monotonic() - killed)
    expect(status == 1, f"torchrun ended with {status}, not 1")
    newest = launch.out / "checkpoint.pt"
    now = checkpoint.load(newest)[0]["step"] if newest.exists() else 0
    due = max(step for step in range(max(launch.step, 1)) if step % 3 == 0 or step % EPOCH == 0)
    row.measure("steps lost", max(0, due - now))
    expect(now >= due, f"step {due} had been saved, and step {now} is left")
    return now


def _expect_continued(run: Training, saved: int) -> None:
    if saved:
        line = f"continuing from out/checkpoint.pt, after step {saved}\n"
        expect(line in run.output, f"it did not say {line!r}: {run.output}")


def signal_to_stop(plan: Plan) -> Row:
    row = Row(
        "SIGTERM or SIGUSR1 to the program, to torchrun, to a job with loaders",
        "checkpoint of the current step; status 128 + n (torchrun: 1); 0 differing bits",
    )
    numbers = [signal.SIGTERM] if plan.short else [signal.SIGTERM, signal.SIGUSR1]
    for number in numbers * plan.count(3, 1):
        with row.injection(f"{number.name} to the program"):
            run = plan.nursery.start(plan.folder / f"program-{row.injected}", *DIGITS)
            _stop(plan, row, run, run.pid, number, 128 + number)
            _resume(plan, run, 1, DIGITS, plan.references.of(1))
        with row.injection(f"{number.name} to torchrun"):
            forwarded = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
            run = plan.nursery.torchrun(plan.folder / f"torchrun-{row.injected}", *DIGITS, launcher=forwarded)
            _stop(plan, row, run, run.pid, number, 1)
            _resume(plan, run, 2, DIGITS, plan.references.of(2))
    jpegs = plan.jpegs()
    flags = on_jpegs(jpegs, workers=2)
    whole = plan.nursery.start(plan.folder / "whole", *flags).succeed().out
    for number in numbers:
        with row.injection(f"{number.name} to the program and its loaders"):
            run = plan.nursery.start(plan.folder / f"loaders-{row.injected}", *flags)
            _stop(plan, row, run, -run.pid, number, 128 + number)
            _resume(plan, run, 1, flags, whole)
    return row


def _stop(plan: Plan, row: Row, run: Training, pid: int, number: signal.Signals, status: int) -> None:
    """Send a signal, to a group if the pid is negative; what is left is a checkpoint of the last step."""
    run.reach(plan.random.randint(1, 6))
    send(pid, number)
    after = run.step
    expect(run.wait() == status, f"status {run.status}, not {status}: {run.errors[-800:]}")
    last = run.step
    row.measure("steps after the signal", last - after)
    line = f"error: stopped by {number.name} after step {last}, saved in out/checkpoint.pt: continue with --resume"
    expect(run.told == [line], f"it said {run.told}, not {line!r}")
    expect(state(run.out)["step"] == last, f"the checkpoint is of step {state(run.out)['step']}, not {last}")


def _resume(plan: Plan, run: Training, size: int, flags: tuple[object, ...], reference: Path) -> None:
    for again in plan.nursery.ranks(size, run.folder, *flags):
        again.succeed()
    expect_same_end(run.out, reference)
