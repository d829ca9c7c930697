"""Pairs of views of images from any source, read by worker processes that may die or hang."""

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow_recipes.data import WHOLE, Batch, EpochBatches, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.datasets import Items, from_callable, from_hugging_face
from barlow_recipes.decoding import SIXTEEN_BITS, UnfitError, decode
from barlow_recipes.errors import LOST_WORKER, Aborted, UsageError
from barlow_recipes.files import CAN_READ, LISTS, Catalogue, files_below, index_folder, index_list, is_image, kinds
from barlow_recipes.pixels import USUAL, PixelSettings
from barlow_recipes.shards import choose_shards, index_shards
from barlow_recipes.signals import leave_stopping_to_parent
from barlow_recipes.views import View, ViewRecipe, image_without_augmentation

Images = Catalogue | Items
Transform = Callable[[Tensor], Any]

HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 5  # to query the nearest neighbours, not pretrained on
MOST_NEIGHBOURS_PER_CLASS = 20
PROBED_TOGETHER = 256  # at most: the probes run on one process, in float32
TOLERATED_UNREADABLE = 5, 1 / 1000  # images per epoch: the larger of a handful and a thousandth
LOOKED_AT = 16  # images, before a run begins
DARK = 1 / 16  # of the range of values: 12 bits in 16


class TwoViews(Dataset[tuple[Any, Any, int, str]]):
    """Two views of an image, a pure function of (seed, epoch, index); how many could not be read before it, and why."""

    def __init__(
        self, images: Images, views: Sequence[Transform], seed: int, tolerated: int, pixels: PixelSettings = USUAL
    ) -> None:
        self.images, self.views, self.seed, self.tolerated, self.pixels = images, views, seed, tolerated, pixels

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int, str]:
        epoch, index = key
        image, failures, reason = self._read(index)
        views = []
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            for number, view in enumerate(self.views, start=1):
                seed = seed_of(self.seed, epoch, index, number)
                torch.default_generator.manual_seed(seed)  # a microsecond; torch.manual_seed takes a hundred
                views.append(view(image))
        return views[0], views[1], failures, reason

    def _read(self, index: int) -> tuple[Tensor, int, str]:
        """The image, or the next readable one. After more failures than a whole epoch may have, a black one."""
        reason = ""
        for failures in range(self.tolerated + 1):
            try:
                return decode(*self.images.read((index + failures) % len(self.images)), self.pixels), failures, reason
            except OSError as error:
                reason = reason or str(error)
        return _black(self.pixels), self.tolerated + 1, reason


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images without augmentation, and their labels: −1 where the image cannot be read."""

    def __init__(self, images: Images, transform: Transform, pixels: PixelSettings) -> None:
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

    DataLoader's own timeout does not see a worker that is stopped after it has announced a batch: this process waits
    for the tensors. Workers that hang are killed, as this process waits for them at its exit, too.
    """

    def __init__(self, dataset: Dataset[Any], patience: float, **settings: Any) -> None:
        own = torch.Generator()  # not torch's, from which the run draws
        super().__init__(dataset, generator=own, worker_init_fn=leave_stopping_to_parent, **settings)
        self.patience = patience

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A new epoch first takes what was fetched ahead of the last one: up to as many batches, one after the other.
        with self._in_time(1 + (self.prefetch_factor or 0), self._iterator):
            batches = super().__iter__()
            _all_workers.update(getattr(batches, "_workers", []))
        while True:
            with self._in_time(1, batches):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _in_time(self, batches: int, iterator: object) -> Iterator[None]:
        """Aborted if a worker dies within, or it takes too long; whatever fails, every worker there is is killed."""
        workers = getattr(iterator, "_workers", [])
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
            died = isinstance(error, Exception) and _dead(workers)
            for worker in [*filter(BaseProcess.is_alive, _all_workers)] if workers else []:  # of other loaders, too
                with suppress(RuntimeError):
                    worker.kill()
                    worker.join(1)
            if late.is_set():
                raise Aborted(
                    f"no image has come from the workers for {self.patience:g} seconds: does the storage of --data "
                    "answer? If it is only slow, give a longer --loader-timeout"
                ) from None
            if died:
                raise Aborted(LOST_WORKER) from None
            raise
        finally:
            done.set()


_all_workers: "WeakSet[BaseProcess]" = WeakSet()  # and no other child of this process, which may be the user's


def _dead(workers: list[Any]) -> bool:
    """Whether one has died; it closes its pipes before it is known dead, so wait a moment."""
    try:
        return any(worker.join(0.1) or worker.exitcode for worker in workers)
    except RuntimeError:  # by which torch tells of a death
        return True


class ImagePairs:
    """Two views of every image, in batches, from worker processes that live as long as the run."""

    first_unreadable = ""

    def __init__(self, dataset: TwoViews, order: EpochBatches, patience: float, **loading: Any) -> None:
        self.tolerated, self.order = dataset.tolerated, order
        persistent = loading["num_workers"] > 0
        self.loader = Loader(dataset, patience, batch_sampler=order, persistent_workers=persistent, **loading)

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
    path, suffix = Path(source), Path(source).suffix.lower()
    if not path.exists():
        if re.fullmatch(r"[\w.]+:\w+", source):
            return from_callable(source), ()
        raise UsageError(f"--data {path}: no such file or folder")
    if path.is_file():
        if suffix in LISTS:
            return index_list(path), ()
        if suffix not in (".tar", ".parquet"):
            raise UsageError(f"--data {path}: a file that cannot be read; {CAN_READ}")
        return index_shards(path.parent, [path]) if suffix == ".tar" else from_hugging_face(path, [path]), ()
    root = path / "train" if (path / "train").is_dir() else path
    if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return from_hugging_face(root), ()
    files = [*files_below(root)]
    images = [name for name in files if is_image(name)]
    shards, parquet = (
        choose_shards([root / name for name in files if name.lower().endswith(ending)])
        for ending in (".tar", ".parquet")
    )
    if sum(map(bool, (images, shards, parquet))) > 1:
        raise UsageError(f"--data {root}: found {kinds(files)}; expected images, .tar or .parquet alone: give one kind")
    others = sorted({*files} - {*images, *(str(path.relative_to(root)) for path in (*shards, *parquet))})
    notes = (f"left out of {root}: {kinds(others)}",) if others else ()
    if shards:
        return index_shards(root, shards), notes
    return from_hugging_face(root, parquet) if parquet else index_folder(root, files, labelled=False), notes


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
    decoded: list[Tensor] = []
    unreadable: list[str] = []
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
    deep = [image.aminmax() for image in decoded if image.is_floating_point()]
    least, brightest = (min(low.item() for low, _ in deep), max(high.item() for _, high in deep)) if deep else (0, 1)
    if brightest < DARK and pixels.value_range is None:
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
    :func:`~barlow_recipes.views.finished`. ``timeout`` is in seconds without an image, and ``monitor`` holds images out
    of every class, for the probe.

    Raises:
        UsageError: nothing to read, an empty class, a damaged shard, images that ``pixels`` does not describe, or fewer
            than a batch.
    """
    images, notes = find_images(source)
    eight_bits = look_at_some(images, source, pixels)
    fraction = HELD_OUT if monitor and images.labels.any() else 0  # of one class there is nothing to learn
    held_out = hold_out(images.labels, fraction, at_most=MOST_HELD_OUT_PER_CLASS)
    pretraining = images.subset((~held_out).nonzero()[:, 0])
    tolerated = max(TOLERATED_UNREADABLE[0], int(len(pretraining) * TOLERATED_UNREADABLE[1]))
    left = {"workers": None, "device": torch.uint8 if eight_bits else torch.float32}[augment_on]
    views = [View(recipe, image_size, pixels, left) for recipe in recipes]
    loading = {"num_workers": workers, "pin_memory": pin_memory}

    def plain(part: Images, chosen: Tensor) -> Loader:
        transform = image_without_augmentation(image_size, pixels)
        dataset = Labelled(part.subset(chosen.nonzero()[:, 0]), transform, pixels)
        return Loader(dataset, timeout, batch_size=min(batch_size, PROBED_TOGETHER), **loading)

    probe = None
    if held_out.any():
        neighbours = hold_out(pretraining.labels, 1, at_most=MOST_NEIGHBOURS_PER_CLASS)
        bank, queries = plain(pretraining, neighbours), plain(images, held_out)
        probe = Probe(bank, queries, linear=True, labels_per_class=())
    elif monitor:
        notes += ("no probe: it needs labels of two classes, and ten images in a class to hold one out",)
    dataset = TwoViews(pretraining, views, seed, tolerated, pixels)
    order = EpochBatches(len(pretraining), batch_size, seed, rows)
    return PretrainingData(
        name=name_of(source),
        images=len(pretraining),
        pairs=ImagePairs(dataset, order, timeout, **loading),
        monitor=probe,
        final=probe,
        notes=notes,
        pixels=pixels,
        tolerated_unreadable=tolerated,
        fingerprint=pretraining.fingerprint(),
    )
