"""Start the program with something changed in it: python start.py '[["quick"], ["small_files", 4096]]' FLAGS.

The changes make runs cheap, watch them, injure them from within, or put a bug into the program that the faults must
find. They replace names in the modules of `pretraining`; the program itself is then run as ever.
"""

import atexit
import dataclasses
import hashlib
import json
import os
import random
import resource
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = EXAMPLES / "imagenet_pretrain.py"
TESTS = EXAMPLES.parent / "tests"
sys.path[:0] = [str(EXAMPLES), str(TESTS / "examples"), str(TESTS)]

from barlow_recipes import checkpoint, digits, distributed, images, models, reporting, steps  # noqa: E402
from barlow_recipes.data import EpochBatches  # noqa: E402

FEW = 176  # digits
Change = Sequence[Any]  # the name of a function below, and its arguments


def begin(changes: Sequence[Change], flags: Sequence[str]) -> None:
    """Change the program, and run it as the interpreter does."""
    for name, *arguments in changes:
        CHANGES[name](*arguments)
    sys.argv = [str(PROGRAM), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


# To make runs cheap, or comparable.


def quick(pictures: bool = False) -> None:
    """A few of the digits, no probes of them, and no pictures: a run of 22 steps in a second."""
    load = digits.load_digits

    def load_few(batch_size: int, seed: int, **options: Any) -> Any:
        data = load(batch_size, seed, **options)
        data.pairs.order = EpochBatches(FEW, batch_size, seed)
        return dataclasses.replace(data, images=FEW, monitor=None, final=None)

    digits.load_digits = load_few
    if not pictures:
        reporting.draw_curves = reporting.draw_cross_correlation = lambda *args, **kwargs: None
    reporting.PICTURED_PAIRS = 64


def in_float64() -> None:
    """In float32 two exact runs part company within ten steps, since AdamW divides tiny gradients by their own size."""
    augment, build = digits.augment_digits, models.build_model
    digits.augment_digits = lambda images, generator: augment(images, generator).double()
    models.build_model = lambda *args: build(*args).double()


# To watch them. Each rank appends to a file of its own.


def saves() -> None:
    """Tell of every file that is saved."""
    save = checkpoint.save

    def save_and_tell(path: Path, content: object, **options: bool) -> None:
        save(path, content, **options)
        print(f"saved {path.name}", file=sys.stderr)

    checkpoint.save = save_and_tell


def threads() -> None:
    """At the end, tell of gloo's threads: one that is left may abort the process when the interpreter ends."""

    def tell() -> None:
        for path in Path("/proc/self/task").glob("*/comm"):  # on Linux
            if "gloo" in (name := path.read_text()):
                print(f"left {name}", file=sys.stderr)

    atexit.register(tell)


def samples(folder: str) -> None:
    """Write down, step by step, the hash of every image that this rank trains on."""
    gradients = steps.gradients

    def watched(now: Any, batches: Iterator[Any]) -> Any:
        def noted() -> Iterator[Any]:
            for batch in batches:
                hashes = [[_digest([image]) for image in view] for view in batch.views]
                _note(folder, "samples", now.state.step + 1, hashes)
                yield batch

        return gradients(now, noted())

    steps.gradients = watched


def weights(folder: str) -> None:
    """Write down the hash of all parameters after every step, and whether all buffers are finite."""
    apply = steps.apply

    def watched(now: Any, **options: Any) -> None:
        apply(now, **options)
        model = now.state.model
        finite = all(bool(buffer.isfinite().all()) for buffer in model.buffers())
        _note(folder, "weights", now.state.step, [_digest(model.parameters()), finite])

    steps.apply = watched


def _digest(tensors: Any) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().float().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _note(folder: str, what: str, step: int, value: object) -> None:
    with Path(folder, f"{what}-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        file.write(json.dumps([step, value]) + "\n")


# To injure them from within.


def fails(rank: int, numbers: dict[str, list[int]]) -> None:
    """On one rank, in these steps: the loss alone is NaN, or its gradient as well, or already the images are."""
    loss_class, gradients, now_at = steps.BarlowTwinsLoss, steps.gradients, [0]

    def here(way: str) -> bool:
        return distributed.rank() == rank and now_at[0] in numbers.get(way, ())

    class Loss(loss_class):  # type: ignore[misc, valid-type]
        def forward(self, *views: Any, **options: Any) -> Any:
            terms = super().forward(*views, **options)
            terms = terms._replace(loss=terms.loss + torch.nan) if here("loss") else terms
            return terms._replace(loss=terms.loss * torch.nan) if here("gradient") else terms

    def counted(now: Any, batches: Any) -> Any:
        now_at[0] = now.state.step + 1
        factor = torch.nan if here("images") else 1
        return gradients(now, (batch._replace(views=[view * factor for view in batch.views]) for batch in batches))

    steps.BarlowTwinsLoss = Loss
    steps.gradients = counted


def small_files(size: int) -> None:
    """A disk that is full after so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def save_forever(path: str) -> None:
    """Save larger and larger steps, and say so before and after."""
    number = 0
    while True:
        number += 1
        os.write(1, f"saving {number}\n".encode())
        checkpoint.save(Path(path), state_of(number), keep_previous=True)
        os.write(1, f"saved {number}\n".encode())


def state_of(step: int) -> dict[str, object]:
    """A checkpoint of 2 MB in which everything is the step."""
    return dict.fromkeys(checkpoint.PARTS, step) | {"model": torch.full((500_000,), float(step))}


# Bugs, for the proof that the faults find them.


def saves_in_place() -> None:
    def save(path: Path, content: object, **_: bool) -> None:
        with path.open("wb") as file:
            checkpoint._write(file, content)

    checkpoint.save = save


def reads_without_checksum() -> None:
    checkpoint.read = lambda path: _read(path, weights_only=True)


def trusts_a_checkpoint() -> None:
    checkpoint.read = lambda path: _read(path, weights_only=False)


def _read(path: Path, weights_only: bool) -> Any:
    if not path.exists():
        raise FileNotFoundError
    try:
        return torch.load(path, weights_only=weights_only)
    except Exception as error:
        raise ValueError(str(error)) from None


def forgets_the_optimizer() -> None:
    load = checkpoint.TrainingState.load_state_dict

    def load_the_rest(self: Any, state: dict[str, Any]) -> None:
        load(self, state | {"optimizer": self.optimizer.state_dict()})

    checkpoint.TrainingState.load_state_dict = load_the_rest


def judges_alone() -> None:
    """Each rank looks at its own loss."""
    all_reduce = distributed.all_reduce
    distributed.all_reduce = lambda numbers: [numbers[0], *all_reduce(numbers)[1:]]


def waits_for_ever() -> None:
    begin = images.Loader.__init__
    images.Loader.__init__ = lambda self, dataset, patience, **settings: begin(self, dataset, 10**6, **settings)


def replaces_at_random() -> None:
    read = images.Augmented._read

    def read_any(self: Any, index: int) -> Any:
        image, *failures = read(self, index)
        return (read(self, random.SystemRandom().randrange(40))[0] if failures[0] else image), *failures

    images.Augmented._read = read_any


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__.replace("_", "-"): bug
    for bug in (
        saves_in_place, reads_without_checksum, trusts_a_checkpoint, forgets_the_optimizer, judges_alone,
        waits_for_ever, replaces_at_random,
    )
}  # fmt: skip
CHANGES: dict[str, Callable[..., None]] = BUGS | {
    change.__name__: change
    for change in (quick, in_float64, saves, threads, samples, weights, fails, small_files, save_forever)
}


if __name__ == "__main__":
    begin(json.loads(sys.argv[1]), sys.argv[2:])
