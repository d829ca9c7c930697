"""Views of images from any source, read by worker processes that may die or hang."""

import atexit
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow_recipes.data import WHOLE, Batch, EpochBatches, PairLoader, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.errors import LOST_WORKER, Aborted, UsageError
from barlow_recipes.files import ImageIndex, find_images
from barlow_recipes.pixels import SIXTEEN_BITS, USUAL, PixelSettings, UnfitError, decode
from barlow_recipes.program import leave_stopping_to_parent
from barlow_recipes.settings import Settings
from barlow_recipes.views import View, image_without_augmentation

HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 5  # to query the nearest neighbours, not pretrained on
MOST_NEIGHBOURS_PER_CLASS = 20
PROBED_TOGETHER = 256  # at most: the probes run on one process, in float32
TOLERATED_UNREADABLE = 5, 1 / 1000  # images per epoch: the larger of a handful and a thousandth
LOOKED_AT = 16  # images, before a run begins
WORKERS: WeakSet[Any] = WeakSet()  # the processes of all loaders
CLOSED = ConnectionError, EOFError  # so ends the pipe of a worker that dies while it sends a batch
DARK = 1 / 16  # of the range of values: 12 bits in 16


class Augmented(Dataset[tuple[Any, ...]]):
    """The views of an image, a pure function of (seed, epoch, index); how many could not be read before it, and why."""

    def __init__(
        self, images: ImageIndex, views: Sequence[Any], seed: int, tolerated: int, pixels: PixelSettings = USUAL
    ) -> None:
        self.images, self.views, self.seed, self.tolerated, self.pixels = images, views, seed, tolerated, pixels

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        epoch, index = key
        image, failures, reason = self._read(index)
        views = []
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            for number, view in enumerate(self.views, start=1):
                # A microsecond; torch.manual_seed takes a hundred.
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index, number))
                views.append(view(image))
        return *views, failures, reason

    def _read(self, index: int) -> tuple[Tensor, int, str]:
        """The image, or the next readable one. After more failures than a whole epoch may have, a black one."""
        reason = ""
        for failures in range(self.tolerated + 1):
            try:
                return decode(*self.images.read((index + failures) % len(self.images)), self.pixels), failures, reason
            except OSError as error:
                reason = reason or str(error)
        return torch.zeros(self.pixels.channels, 8, 8, dtype=torch.uint8), self.tolerated + 1, reason


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images without augmentation, and their labels: −1 where the image cannot be read."""

    def __init__(self, images: ImageIndex, transform: Callable[[Tensor], Tensor], pixels: PixelSettings) -> None:
        self.images, self.transform, self.pixels = images, transform, pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(decode(*self.images.read(index), self.pixels)), int(self.images.labels[index])
        except OSError:
            return self.transform(torch.zeros(self.pixels.channels, 8, 8, dtype=torch.uint8)), -1


class Loader(DataLoader[Any]):
    """A DataLoader that ends the run when a worker dies, or when nothing has come for ``patience`` seconds."""

    def __init__(self, dataset: Dataset[Any], patience: float, num_workers: int = 0, **settings: Any) -> None:
        settings |= {"num_workers": num_workers, "timeout": patience if num_workers else 0}
        generator = torch.Generator()  # not the one from which the run draws
        super().__init__(dataset, generator=generator, worker_init_fn=leave_stopping_to_parent, **settings)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            batches = super().__iter__()
            WORKERS.update(getattr(batches, "_workers", []))
            yield from batches
        except Exception as error:
            kill_workers()
            if "timed out" in str(error):
                late = f"no image has come from the workers for {self.timeout:g} seconds"
                remedy = "does the storage of --data answer? If it is only slow, give a longer --loader-timeout"
                raise Aborted(f"{late}: {remedy}") from None
            own = isinstance(error, CLOSED) and "in DataLoader worker process" not in str(error)
            if own or "DataLoader worker (pid" in str(error):
                raise Aborted(LOST_WORKER) from None
            raise


@atexit.register
def kill_workers() -> None:
    """This process would wait at its exit for one that hangs."""
    for worker in WORKERS:
        with suppress(RuntimeError):  # by which torch tells of its death
            worker.kill()
            worker.join(1)


class ImagePairs(PairLoader):
    """The views of every image, in batches, from worker processes that live as long as the run."""

    def __init__(self, dataset: Augmented, order: EpochBatches, **loading: Any) -> None:
        self.tolerated, self.order = dataset.tolerated, order
        persistent = loading["num_workers"] > 0
        self.loader = Loader(dataset, batch_sampler=order, persistent_workers=persistent, **loading)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.first_step = epoch, first_step
        for *views, failures, reasons in self.loader:
            self.first_unreadable = self.first_unreadable or next(filter(None, reasons), "")
            unreadable = int((failures > 0).sum())
            if failures.max() > self.tolerated:  # in a row: there are as many, though not all in this batch
                unreadable = max(unreadable, self.tolerated + 1)
            yield Batch(tuple(views), unreadable)


def look_at_some(images: ImageIndex, source: str, pixels: PixelSettings) -> bool:
    """Before time is spent on all, see whether the flags describe them, or are dark; whether they have eight bits."""
    decoded, unreadable = list[Tensor](), list[str]()
    for number in range(0, len(images), math.ceil(len(images) / LOOKED_AT)):
        try:
            decoded.append(decode(*images.read(number), pixels))
        except UnfitError as error:
            raise UsageError(f"--data {error}") from None
        except OSError as error:
            unreadable.append(str(error))
    if not decoded:
        tried = f"of {len(unreadable)} images that were tried"
        raise UsageError(f"--data {source}: {tried}, none can be read: {unreadable[0]}")
    deep = [image for image in decoded if image.is_floating_point()]
    brightest = max((image.max().item() for image in deep), default=1)
    if brightest < DARK and pixels.value_range is None:
        most = f"the largest value is {brightest:g} of 1, or {SIXTEEN_BITS * brightest:g} of {SIXTEEN_BITS}"
        raise UsageError(f"--data {source}: nearly black, {most}: give --value-range LOW HIGH")
    return not deep


def load_images(settings: Settings, rows: slice = WHOLE) -> PretrainingData:
    """Index the images of --data, look at some, and hold some out for the probe; ``rows`` of every batch are ours."""
    source, size, seed = settings.data or "", settings.image_size, settings.seed
    images, notes = find_images(source)
    eight_bits = look_at_some(images, source, settings)
    fraction = HELD_OUT if settings.probe and images.labels.any() else 0  # of one class there is nothing to learn
    held_out = hold_out(images.labels, fraction, at_most=MOST_HELD_OUT_PER_CLASS)
    pretraining = images.subset((~held_out).nonzero()[:, 0])
    tolerated = max(TOLERATED_UNREADABLE[0], int(len(pretraining) * TOLERATED_UNREADABLE[1]))
    on_gpu = settings.device is not None and settings.device.type == "cuda"
    loading = {"patience": settings.loader_timeout, "num_workers": settings.workers, "pin_memory": on_gpu}

    def plain(part: ImageIndex, chosen: Tensor) -> Loader:
        dataset = Labelled(part.subset(chosen.nonzero()[:, 0]), image_without_augmentation(size, settings), settings)
        return Loader(dataset, batch_size=min(settings.micro_batch_size, PROBED_TOGETHER), **loading)

    probe = None
    if held_out.any():
        neighbours = hold_out(pretraining.labels, 1, at_most=MOST_NEIGHBOURS_PER_CLASS)
        bank, queries = plain(pretraining, neighbours), plain(images, held_out)
        probe = Probe(bank, queries, linear=True, labels_per_class=())
    elif settings.probe:
        notes += ("no probe: it needs labels of two classes, and ten images in a class to hold one out",)
    left = {"workers": None, "device": torch.uint8 if eight_bits else torch.float32}[settings.augment_on]
    views = [View(recipe, size, settings, left) for recipe in settings.recipes()]
    dataset = Augmented(pretraining, views, seed, tolerated, settings)
    order = EpochBatches(len(pretraining), settings.micro_batch_size, seed, rows)
    pairs, fingerprint = ImagePairs(dataset, order, **loading), pretraining.fingerprint()
    path = Path(source).absolute()
    name = path.parent.name if path.name == "train" else path.stem if path.is_file() else path.name
    name = name if path.exists() else source.rpartition(":")[2]
    return PretrainingData(name, len(pretraining), pairs, probe, probe, notes, settings, tolerated, fingerprint)
