"""Damaged and hostile checkpoints, full disks, damaged images, and loaders that die or hang."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import torch
from PIL import Image
from plan import DIGITS, EPOCH, JPEGS, Plan, Row, on_jpegs
from runs import Training, expect, expect_same_end, rows, send

from barlow_recipes import checkpoint
from programs import until


def flipped(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def truncated(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def zeroed(data: bytes, random: Random) -> bytes:
    """A block of 512 bytes, as a disk has them, that was not zero."""
    while True:
        place = 512 * random.randrange(len(data) // 512)
        if any(data[place : place + 512]):
            return data[:place] + bytes(512) + data[place + 512 :]


DAMAGES = {"a bit flipped": flipped, "cut off": truncated, "a block zeroed": zeroed}


def damaged_checkpoint(plan: Plan) -> Row:
    row = Row(
        "a bit flipped, the end cut off, a block zeroed in a checkpoint",
        "all rejected; one generation back, one warning, 0 differing bits; both damaged: status 2",
    )
    reference = plan.references.of(1)
    stopped = plan.nursery.start(plan.folder / "stopped", *DIGITS, "--limit-steps", 7).succeed().folder
    whole = (stopped / "out" / "checkpoint.pt").read_bytes()
    path, unnoticed = plan.folder / "damaged.pt", 0
    for (name, damage), times in zip(DAMAGES.items(), (plan.count(500, 50), *[plan.count(50, 5)] * 2), strict=True):
        for number in range(times):
            with row.injection(f"{name}, {number + 1}"):
                path.write_bytes(damage(whole, plan.random))
                unnoticed += _torch_reads(path)
                expect(not _is_accepted(path), "it was accepted")
    row.note(f"torch.load alone accepts {unnoticed} of them")
    for name in list(DAMAGES)[: plan.count(3, 1)]:
        with row.injection(f"{name}, and the run is resumed"):
            _resume_damaged(plan, stopped, DAMAGES[name], reference)
    with row.injection("both generations"):
        folder = shutil.copytree(stopped, plan.folder / "both")
        for generation in (paths := [folder / "out" / f"checkpoint{end}.pt" for end in ("", ".previous")]):
            generation.write_bytes(flipped(generation.read_bytes(), plan.random))
        before = [generation.read_bytes() for generation in paths]
        names = (r"out/checkpoint\.pt: not a readable", r"out/checkpoint\.previous\.pt: not a readable")
        plan.nursery.start(folder, *DIGITS).fail(2, *names)
        expect([generation.read_bytes() for generation in paths] == before, "it has touched them")
    return row


def _is_accepted(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except ValueError:
        return False
    return True


def _torch_reads(path: Path) -> bool:
    with suppress(Exception):
        torch.load(path, weights_only=True)
        return True
    return False


def _resume_damaged(plan: Plan, stopped: Path, damage: Callable[[bytes, Random], bytes], reference: Path) -> None:
    folder = shutil.copytree(stopped, plan.folder / damage.__name__)
    newest = folder / "out" / "checkpoint.pt"
    newest.write_bytes(damage(newest.read_bytes(), plan.random))
    run = plan.nursery.start(folder, *DIGITS).succeed()
    expect("continuing from out/checkpoint.previous.pt, after step 6\n" in run.output, f"it said {run.output}")
    text = "out/checkpoint.pt is damaged or missing: going on from out/checkpoint.previous.pt, the one before it"
    expect(run.errors == f"warning: {text}\n", f"not one warning: {run.errors}")
    expect([row["text"] for row in rows(run.out, "event")] == [text], "no event in the metrics")
    expect_same_end(run.out, reference)


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.makedirs, (str(self.folder), 0o777, True)


def untrusted_checkpoint(plan: Plan) -> Row:
    row = Row("a checkpoint that holds code", "0 executions, status 2")
    writers: dict[str, Callable[[object, Path], object]] = {
        "as torch.save writes it": torch.save,  # type: ignore[dict-item]
        "a bare pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        "with a right checksum": lambda content, path: checkpoint.save(path, content),
    }
    executions = 0
    for number, (name, write) in enumerate(writers.items()):
        sprung, path = plan.folder / f"sprung-{number}", plan.folder / f"{number}.pt"
        write(dict.fromkeys(checkpoint.PARTS, 1) | {"model": Trap(sprung)}, path)
        with row.injection(name):
            run = plan.nursery.start(plan.folder / "run", *DIGITS, path)
            run.wait()
            executions += sprung.exists()
            expect(not sprung.exists(), "the code was run")
            run.fail(2, rf"--resume {path}: not a readable checkpoint")
        with row.check(f"{name}, the trap"):
            pickle.loads(path.read_bytes()) if path.name == "1.pt" else torch.load(path, weights_only=False)
            expect(sprung.exists(), "it does not work, so that it proves nothing")
    row.measure("executions", executions)
    return row


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system of some bytes, or tell that this user may not."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(plan: Plan) -> Row:
    row = Row("a full disk", "status 1, one line that names the file; the old checkpoint is whole; 0 differing bits")
    reference = plan.references.of(1)
    # It goes on from step 10; at step 11, where the epoch ends, it saves and draws.
    flags = (*DIGITS, "--probe-every", 1)
    stopped = plan.nursery.start(plan.folder / "stopped", *flags, "--limit-steps", EPOCH - 1).succeed().out
    (stopped / "checkpoint.previous.pt").unlink()
    checkpoint_size = (stopped / "checkpoint.pt").stat().st_size
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = sum(len(line) for line in lines if '"report"' not in line)  # with the settings, which are written anew
    limits = {"metrics.jsonl": kept, "checkpoint.pt": checkpoint_size // 2}
    for name, size in limits.items():
        with row.injection(f"{name}, at the limit of a file's size"):
            folder = plan.folder / f"limited-{name}"
            shutil.copytree(stopped, folder / "out")
            run = plan.nursery.start(folder, *flags, changes=[["quick"], ["small_files", size]])
            run.fail(1, rf"cannot write out/{name}: (.*)File too large")
            _expect_whole(run, EPOCH - 1)
            expect_same_end(plan.nursery.start(folder, *flags).succeed().out, reference)
    room = {"cross_correlation.png": checkpoint_size + 2**15}
    room |= {} if plan.short else {"checkpoint.pt": checkpoint_size // 2, "settings.yaml": 0}
    for name, size in room.items():
        folder = plan.folder / f"full-{name}"
        with tmpfs(folder / "out", 4 * checkpoint_size) as mounted:
            if not mounted:
                row.note("no tmpfs: this user may not mount one")
                break
            with row.injection(f"{name}, on a file system without space"):
                shutil.copytree(stopped, folder / "out", dirs_exist_ok=True)
                ballast = _fill(folder / "out", size)
                run = plan.nursery.start(folder, *flags, changes=[["quick", "png" in name]])
                run.fail(1, rf"cannot write out/{name}: (.*)No space left on device")
                _expect_whole(run, EPOCH if "png" in name else EPOCH - 1)
                ballast.unlink()
                expect_same_end(plan.nursery.start(folder, *flags).succeed().out, reference)
    return row


def _fill(folder: Path, room: int) -> Path:
    """Leave so many bytes free."""
    system = os.statvfs(folder)
    path = folder / "ballast"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, system.f_bavail * system.f_frsize - room)
    return path


def _expect_whole(run: Training, step: int) -> None:
    """The checkpoint is there, and nothing half written beside it."""
    found = checkpoint.read(run.out / "checkpoint.pt")["step"]
    expect(found == step, f"the checkpoint is of step {found}, not {step}")
    left = sorted(path.name for path in run.out.glob(".*.*"))
    expect(not left, f"{left} are left")


def corrupt_images(plan: Plan) -> Row:
    row = Row("damaged images", "0 crashes; counted; the same replacements in every run; too many: status 1")
    damages: dict[str, Callable[[bytes], bytes]] = {
        "cut off": lambda data: data[: len(data) // 3],
        "zeroed": lambda data: bytes(len(data)),
        "empty": lambda data: b"",
        "text": lambda data: b"<html>404 Not Found</html>\n",
        "noise": lambda data: bytes(byte ^ (plan.random.random() < 0.1) for byte in data),
    }
    data, repaired = plan.jpegs(), plan.jpegs("repaired")
    broken = 0
    for damage, number in zip(damages.values(), range(1, JPEGS, 7), strict=False):  # no two of them neighbours
        path = data / "all" / f"{number:02}.jpg"
        path.write_bytes(damage(path.read_bytes()))
        broken += not _is_readable(path)
        substitute = path if _is_readable(path) else path.with_name(f"{number + 1:02}.jpg")
        shutil.copy(substitute, repaired / "all" / path.name)
    runs = {workers: plan.nursery.start(plan.folder / f"{workers}", *on_jpegs(data, workers)) for workers in (0, 2)}
    reference = plan.nursery.start(plan.folder / "reference", *on_jpegs(repaired, workers=0)).succeed().out
    for workers, run in runs.items():
        with row.injection(f"{len(damages)} images, {workers} workers"):
            run.succeed()
            counted = [epoch["unreadable"] for epoch in rows(run.out, "epoch")]
            expect(counted == [broken] * 3, f"counted {counted}, and {broken} are unreadable in each of 3 epochs")
            expect_same_end(run.out, reference)
        row.injected += len(damages) - 1
        row.survived += (len(damages) - 1) * (not row.failures)
    row.note(f"{broken} unreadable, replaced as in a run on a copy of the folder in which they are replaced")
    with row.injection("more than the 5 that are tolerated"):
        for number in (3, 17):
            (data / "all" / f"{number:02}.jpg").write_bytes(b"")
        run = plan.nursery.start(plan.folder / "too many", *on_jpegs(data, 2))
        run.fail(1, r"6 images of epoch 1 could not be read, 5 are tolerated", re.escape(str(data)))
    return row


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except OSError:
        return False
    return True


def _expect_told(plan: Plan, row: Row, run: Training, began: float, what: str, limit: float) -> None:
    workers = run.workers(2) if what == "hung" else []
    until(lambda: run.told or run.ended(), "an error")
    seconds = time.monotonic() - began
    row.measure(f"s to the error, {what}", seconds)
    expect(seconds <= limit, f"the error came after {seconds:.2f} s: {run.told}")
    run.fail(1, "has died" if what == "killed" else "no image has come", seconds=plan.at_most(5))
    row.measure("s to the end", time.monotonic() - began - seconds)
    left = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    expect(not left, f"{len(left)} loaders are left")


def lost_loader(plan: Plan) -> Row:
    timeout, soon = 3, plan.at_most(1)  # seconds
    row = Row(
        "a loader process killed, or hung",
        f"error ≤ {soon:g} s after it, or ≤ --loader-timeout ({timeout}) + {soon:g} s; "
        f"ended {plan.at_most(5):g} s later; status 1, one line",
    )
    flags = (*on_jpegs(plan.jpegs(images=400), workers=2, epochs=50), "--loader-timeout", timeout)
    for number in range(plan.count(4, 1)):
        with row.injection(f"killed, {number + 1}"):
            run = plan.nursery.start(plan.folder / f"killed-{number}", *flags)
            run.reach(plan.random.randint(3, 20))
            began = send(plan.random.choice(run.workers(2)), signal.SIGKILL)
            _expect_told(plan, row, run, began, "killed", soon)
        with row.injection(f"hung, {number + 1}"):
            data = plan.jpegs(f"hung-{number}", images=400)
            run = plan.nursery.start(
                plan.folder / f"hung-{number}-run", *on_jpegs(data, 2, 50), "--loader-timeout", timeout
            )
            run.reach(plan.random.randint(3, 20))
            began = time.monotonic()
            for path in data.rglob("*.jpg"):  # to open a pipe that nobody writes to takes for ever
                path.unlink()
                os.mkfifo(path)
            _expect_told(plan, row, run, began, "hung", timeout + soon)
    return row
