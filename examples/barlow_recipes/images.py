"""Pairs of views of images from any source, read by worker processes that may die or hang."""

import math
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow_recipes.data import WHOLE, Batch, EpochBatches, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.datasets import Items, from_callable, from_hugging_face
from barlow_recipes.decoding import SIXTEEN_BITS, UnfitError, decode
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.files import CAN_READ, LISTS, Catalogue, files_below, index_folder, index_list, is_image, kinds
from barlow_recipes.pixels import USUAL, PixelSettings
from barlow_recipes.shards import choose_shards, index_shards
from barlow_recipes.signals import leave_stopping_to_parent
from barlow_recipes.views import UnfinishedView, ViewRecipe, image_view, image_without_augmentation, unfinished_view

View = Callable[[Tensor], Tensor | UnfinishedView]
Images = Catalogue | Items

HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 5  # to query the nearest neighbours, not pretrained on
MOST_NEIGHBOURS_PER_CLASS = 20
SPLIT_SEED = 0  # what is held out is the same for every --seed, so that runs can be compared
PROBED_TOGETHER = 256  # at most: the probes run on one process, in float32
DEATH = "a process that reads images has died: is there memory for --workers?"
TOLERATED_UNREADABLE = 5, 1 / 1000  # images per epoch: the larger of a handful and a thousandth
LOOKED_AT = 16  # images, before a run begins
DARK = 1 / 16  # of the range of values: 12 bits in 16


class TwoViews(Dataset[tuple[Any, Any, int, str]]):
    """Two views of an image, a pure function of (seed, epoch, index); how many could not be read before it, and why."""

    def __init__(
        self, images: Images, views: Sequence[View], seed: int, tolerated: int, pixels: PixelSettings = USUAL
    ) -> None:
        self.images, self.views, self.seed, self.tolerated, self.pixels = images, views, seed, tolerated, pixels

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int, str]:
        epoch, index = key
        image, failures, reason = self._read(index)
        view1, view2 = (self._view(number, image, epoch, index) for number in (1, 2))
        return view1, view2, failures, reason

    def _read(self, index: int) -> tuple[Tensor, int, str]:
        """The image, or the next readable one. After more failures than a whole epoch may have, a black one."""
        reason = ""
        for failures in range(self.tolerated + 1):
            try:
                return decode(*self.images.read((index + failures) % len(self.images)), self.pixels), failures, reason
            except OSError as error:
                reason = reason or str(error)
        return _black(self.pixels), self.tolerated + 1, reason

    def _view(self, number: int, image: Tensor, epoch: int, index: int) -> Tensor | UnfinishedView:
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(
                seed_of(self.seed, epoch, index, number)
            )  # not torch's: 258 µs, not 1.3
            return self.views[number - 1](image)


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images without augmentation, and their labels: −1 where the image cannot be read."""

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor], pixels: PixelSettings = USUAL) -> None:
        self.images, self.transform, self.pixels = images, transform, pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(decode(*self.images.read(index), self.pixels)), int(self.images.labels[index])
        except OSError:
            return self.transform(_black(self.pixels)), -1


def _black(pixels: PixelSettings) -> Tensor:
    return torch.zeros(pixels.channels, 8, 8, dtype=torch.uint8)


class Loader(DataLoader[Any]):
    """A DataLoader that ends the run when a worker dies, or when nothing has come for ``patience`` seconds.

    DataLoader's own timeout does not see every hang: of a worker that is stopped after it has announced a batch, this
    process waits for the tensors. Workers that hang are killed, or this process could not exit: it waits for them, and
    what is stopped does not heed SIGTERM.
    """

    def __init__(self, dataset: Dataset[Any], patience: float, **settings: Any) -> None:
        own = torch.Generator()  # not torch's, from which the run draws
        super().__init__(dataset, generator=own, worker_init_fn=leave_stopping_to_parent, **settings)
        self.patience = patience

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A new epoch first takes what was fetched ahead of the last one: up to as many batches, one after the other.
        with self._in_time(1 + (self.prefetch_factor or 0), _workers(self._iterator)):
            batches = super().__iter__()
        _hear_of_deaths()
        while True:
            with self._in_time(1, _workers(batches)):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _in_time(self, batches: int, workers: list[Any]) -> Iterator[None]:
        """What is done within needs the workers; if it fails or takes too long, every worker there is is killed.

        Raises:
            Aborted: a worker has died, or nothing has come from them in time.
        """
        done, late = threading.Event(), threading.Event()

        def watch() -> None:
            for _ in range(math.ceil(batches * self.patience)):  # while the whole job is suspended, no second passes
                if done.wait(1):
                    return
            late.set()
            for worker in workers:
                worker.kill()

        try:
            if workers:
                threading.Thread(target=watch, daemon=True).start()
            yield
        except BaseException as error:
            if isinstance(error, (OSError, EOFError)):  # a dying process closes its pipes before it is known dead
                for worker in workers:
                    worker.join(1 if worker.sentinel in connection.wait([worker.sentinel], timeout=0.1) else 0)
            died = isinstance(error, Exception) and any(worker.exitcode for worker in workers)
            if workers:
                kill_workers()
            if late.is_set():
                raise Aborted(
                    f"no image has come from the workers for {self.patience:g} seconds: does the storage of --data "
                    "answer? If it is only slow, give a longer --loader-timeout"
                ) from None
            if died:
                raise Aborted(DEATH) from None
            raise
        finally:
            done.set()


def _workers(iterator: object) -> list[Any]:
    return getattr(iterator, "_workers", [])


def _hear_of_deaths() -> None:
    """Torch tells of a worker's death wherever this process is then, by a RuntimeError: let it be an Aborted."""
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    tell = signal.getsignal(number) if number else None
    if number is None or not callable(tell) or getattr(tell, "__name__", "") == "abort":
        return  # also in another thread than the main one: there torch itself sets none

    def abort(signum: int, frame: FrameType | None) -> None:
        try:
            tell(signum, frame)
        except RuntimeError:
            kill_workers()
            raise Aborted(DEATH) from None

    with suppress(ValueError):  # in another thread than the main one
        signal.signal(number, abort)


def kill_workers() -> None:
    """The run ends: no loader's workers are needed any more, nor to be heard of."""
    number = getattr(signal, "SIGCHLD", None)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(number, signal.SIG_DFL) if number and main else None
    for child in multiprocessing.active_children():
        child.kill()
        child.join(1)
    if number and before is not None:
        signal.signal(number, before)


class ImagePairs:
    """Two views of every image, in batches, from worker processes that live as long as the run."""

    first_unreadable = ""

    def __init__(
        self, dataset: TwoViews, batch_size: int, rows: slice, workers: int, timeout: float, pin_memory: bool
    ) -> None:
        self.tolerated = dataset.tolerated
        self.order = EpochBatches(len(dataset.images), batch_size, dataset.seed, rows)
        self.loader = Loader(
            dataset,
            timeout,
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.first_step = epoch, first_step
        for view1, view2, failures, reasons in self.loader:
            self.first_unreadable = self.first_unreadable or next(filter(None, reasons), "")
            unreadable = int((failures > 0).sum())
            if failures.max() > self.tolerated:  # in a row: there are as many, though not all in this batch
                unreadable = max(unreadable, self.tolerated + 1)
            yield Batch((view1, view2), unreadable)


def find_images(source: str) -> tuple[Images, tuple[str, ...]]:
    """The images of --data, in ``source/train`` if there is one, and in words what is left out.

    Raises:
        UsageError: there is nothing that can be read, or there are several kinds of it; it says what there is.
    """
    path = Path(source)
    if not path.exists():
        if re.fullmatch(r"[\w.]+:\w+", source):
            return from_callable(source), ()
        raise UsageError(f"--data {path}: no such file or folder")
    if path.is_file():
        return _index_file(path), ()
    root = path / "train" if (path / "train").is_dir() else path
    if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return from_hugging_face(root), ()
    files = [*files_below(root)]
    images, archives, tables = (
        [name for name in files if is_kind(name)]
        for is_kind in (is_image, lambda name: name.lower().endswith(".tar"), lambda name: name.endswith(".parquet"))
    )
    shards, parquet = (choose_shards([root / name for name in names]) for names in (archives, tables))
    if sum(map(bool, (images, shards, parquet))) > 1:
        raise UsageError(
            f"--data {root}: found {kinds(files)}; expected images, .tar or .parquet alone: give one of them"
        )
    taken = {*images, *(str(path.relative_to(root)) for path in (*shards, *parquet))}
    others = [name for name in files if name not in taken]
    notes = (f"left out of {root}: {kinds(others)}",) if others else ()
    if shards:
        return index_shards(root, shards), notes
    return from_hugging_face(root, parquet) if parquet else index_folder(root, files, labelled=False), notes


def _index_file(path: Path) -> Images:
    suffix = path.suffix.lower()
    if suffix in LISTS:
        return index_list(path)
    if suffix == ".tar":
        return index_shards(path.parent, [path])
    if suffix == ".parquet":
        return from_hugging_face(path, [path])
    raise UsageError(f"--data {path}: a file that cannot be read; {CAN_READ}")


def name_of(source: str) -> str:
    """What to call the data of --data."""
    path = Path(source).absolute()
    if not path.exists():
        return source.rpartition(":")[2]
    return path.parent.name if path.name == "train" else path.stem if path.is_file() else path.name


def look_at_some(images: Images, source: str, pixels: PixelSettings) -> bool:
    """Decode some images before time is spent on all; whether they have eight bits.

    Raises:
        UsageError: the flags do not describe them, none can be read, or all of more than eight bits are dark.
    """
    numbers = torch.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).long().tolist()
    decoded: list[Tensor] = []
    unreadable = ""
    for number in numbers:
        try:
            decoded.append(decode(*images.read(number), pixels))
        except UnfitError as error:
            raise UsageError(f"--data {error}") from None
        except OSError as error:
            unreadable = unreadable or str(error)
    if not decoded:
        raise UsageError(f"--data {source}: of {len(numbers)} images that were tried, none can be read: {unreadable}")
    deep = [image for image in decoded if image.is_floating_point()]
    brightest = max((image.max().item() for image in deep), default=1.0)
    if deep and brightest < DARK and pixels.value_range is None:
        least = min(image.min().item() for image in deep)
        words = " or ".join(f"{scale * least:g} to {scale * brightest:g} of {scale}" for scale in (1, SIXTEEN_BITS))
        raise UsageError(f"--data {source}: nearly black, the values are {words}: give --value-range LOW HIGH")
    return not deep


def load_images(
    source: str,
    *,
    recipes: tuple[ViewRecipe, ViewRecipe],
    pixels: PixelSettings = USUAL,
    image_size: int,
    batch_size: int,
    seed: int,
    workers: int,
    timeout: float,
    monitor: bool,
    pin_memory: bool,
    augment_on: Literal["workers", "device"] = "workers",
    rows: slice = WHOLE,
) -> PretrainingData:
    """Index the images of --data as :func:`find_images` does, look at some, and hold some out.

    ``batch_size`` is that of all processes together, and ``rows`` of every batch are this process's. Views are
    (N, C, H, W) float32; of ``augment_on`` "device" they are cropped and flipped, to be finished by
    :func:`~barlow_recipes.views.finished`. ``pixels`` are the programs' settings, ``timeout`` the seconds without an
    image that end the run, and ``monitor`` holds images out of every class, for the probe.

    Raises:
        UsageError: nothing to read, an empty class, a damaged shard, images that ``pixels`` does not describe, or fewer
            than a batch.
    """
    pixels = PixelSettings(**{field.name: getattr(pixels, field.name) for field in fields(PixelSettings)})
    pixels.check_pixels()
    images, notes = find_images(source)
    fraction = HELD_OUT if monitor and images.labels.any() else 0  # of one class there is nothing to learn
    held_out = hold_out(images.labels, fraction, SPLIT_SEED, MOST_HELD_OUT_PER_CLASS)
    pretraining = images.subset((~held_out).nonzero()[:, 0])
    if len(pretraining) < batch_size:
        raise UsageError(f"--data {source}: {len(pretraining)} images to pretrain on, but --batch-size is {batch_size}")
    eight_bits = look_at_some(images, source, pixels)
    tolerated = max(TOLERATED_UNREADABLE[0], int(len(pretraining) * TOLERATED_UNREADABLE[1]))
    views = [
        image_view(recipe, image_size, pixels)
        if augment_on == "workers"
        else unfinished_view(recipe, image_size, eight_bits)
        for recipe in recipes
    ]
    probe = None
    if held_out.any():
        transform = image_without_augmentation(image_size, pixels)
        neighbours = hold_out(pretraining.labels, 1, SPLIT_SEED, MOST_NEIGHBOURS_PER_CLASS)
        bank, queries = (
            Loader(
                Labelled(part.subset(chosen.nonzero()[:, 0]), transform, pixels),
                timeout,
                batch_size=min(batch_size, PROBED_TOGETHER),
                num_workers=workers,
                pin_memory=pin_memory,
            )
            for part, chosen in ((pretraining, neighbours), (images, held_out))
        )
        probe = Probe(bank, queries, linear=True, labels_per_class=())
    if monitor and probe is None:
        notes += ("no probe: it needs labels of two classes, and ten images in a class to hold one out",)
    dataset = TwoViews(pretraining, views, seed, tolerated, pixels)
    return PretrainingData(
        name=name_of(source),
        images=len(pretraining),
        pairs=ImagePairs(dataset, batch_size, rows, workers, timeout, pin_memory),
        monitor=probe,
        final=probe,
        notes=notes,
        pixels=pixels,
        tolerated_unreadable=tolerated,
        fingerprint=pretraining.fingerprint(),
    )
