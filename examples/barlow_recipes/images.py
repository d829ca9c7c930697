"""Pairs of views of encoded images, in folders or in shards, read by worker processes that may die or hang."""

import math
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow_recipes.augmentations import ViewRecipe, image_view, image_without_augmentation
from barlow_recipes.batched_views import UnfinishedView, unfinished_view
from barlow_recipes.catalogue import Catalogue
from barlow_recipes.data import WHOLE, Batch, EpochBatches, PretrainingData, Probe, hold_out, seed_of
from barlow_recipes.decoding import decode
from barlow_recipes.errors import Aborted, UsageError
from barlow_recipes.folder import index_folder
from barlow_recipes.shards import find_shards, index_shards
from barlow_recipes.signals import leave_stopping_to_parent

T = TypeVar("T")
View = Callable[[Tensor], Tensor | UnfinishedView]

HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 5  # to query the nearest neighbours, not pretrained on
MOST_NEIGHBOURS_PER_CLASS = 20
SPLIT_SEED = 0  # what is held out is the same for every --seed, so that runs can be compared
PROBED_TOGETHER = 256  # at most: the probes run on one process, in float32
DEATH = "a process that reads images has died: is there memory for --workers?"
TOLERATED_UNREADABLE = 5, 1 / 1000  # images per epoch: the larger of a handful and a thousandth


class TwoViews(Dataset[tuple[Any, Any, int]]):
    """Two views of an image, a pure function of (seed, epoch, index); with them, how many images could not be read."""

    def __init__(self, catalogue: Catalogue, views: Sequence[View], seed: int, tolerated: int) -> None:
        self.catalogue, self.views, self.seed, self.tolerated = catalogue, views, seed, tolerated

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int]:
        epoch, index = key
        image, unreadable = self._read(index)
        view1, view2 = (self._view(number, image, epoch, index) for number in (1, 2))
        return view1, view2, unreadable

    def _read(self, index: int) -> tuple[Tensor, int]:
        """The image, or the next readable one. After more failures than a whole epoch may have, a black one."""
        for failures in range(self.tolerated + 1):
            try:
                return decode(*self.catalogue.read((index + failures) % len(self.catalogue))), failures
            except OSError:
                pass
        return torch.zeros(3, 8, 8, dtype=torch.uint8), self.tolerated + 1

    def _view(self, number: int, image: Tensor, epoch: int, index: int) -> Tensor | UnfinishedView:
        seed = seed_of(self.seed, epoch, index, number)
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(seed)  # 1.3 µs; torch.manual_seed takes 258
            random.seed(seed)
            return self.views[number - 1](image)


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images without augmentation, and their labels: −1 where the image cannot be read."""

    def __init__(self, catalogue: Catalogue, transform: Callable[[Tensor], Tensor]) -> None:
        self.catalogue, self.transform = catalogue, transform

    def __len__(self) -> int:
        return len(self.catalogue)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(decode(*self.catalogue.read(index))), int(self.catalogue.labels[index])
        except OSError:
            return self.transform(torch.zeros(3, 8, 8, dtype=torch.uint8)), -1


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
        ahead = 1 + (self.prefetch_factor or 0)
        batches = _in_time(super().__iter__, ahead * self.patience, _workers(self._iterator))
        _all_workers.update(_workers(batches))
        _hear_of_deaths()
        while (batch := _in_time(partial(next, batches, None), self.patience, _workers(batches))) is not None:
            yield batch


def _hear_of_deaths() -> None:
    """Be told of a worker's death wherever this process is then, as torch sees to it, but by Aborted, and once."""
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, partial):  # torch sets it once, from the main thread alone
        _hearing.append(partial(_abort, handler))
    if _hearing:
        signal.signal(signal.SIGCHLD, _hearing[-1])


_all_workers: "WeakSet[BaseProcess]" = WeakSet()
_hearing: list[Callable[[int, FrameType | None], None]] = []  # torch's handler with ours around it, once there is one


def _abort(handler: Callable[[int, FrameType | None], Any], signum: int, frame: FrameType | None) -> None:
    try:
        handler(signum, frame)
    except RuntimeError:
        _hear_of_no_more_deaths()
        raise Aborted(DEATH) from None


def _hear_of_no_more_deaths() -> None:
    """The others are about to be killed, and the run ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _workers(iterator: object) -> list[BaseProcess]:
    return getattr(iterator, "_workers", [])


def _in_time(step: Callable[[], T], seconds: float, workers: Sequence[BaseProcess]) -> T:
    """Take a step for which workers are needed; if it fails or takes too long, kill every worker there is.

    Raises:
        Aborted: a worker has died, or nothing has come from them in time.
    """
    done, late = threading.Event(), threading.Event()

    def watch() -> None:
        for _ in range(math.ceil(seconds)):  # one by one: while the whole job is suspended, no second passes
            if done.wait(1):
                return
        late.set()
        for worker in workers:
            worker.kill()

    if workers:
        threading.Thread(target=watch, daemon=True).start()
    try:
        return step()
    except BaseException as error:
        if workers:
            _hear_of_no_more_deaths()
        if isinstance(error, (OSError, EOFError)):  # a dying process closes even its sentinel before it is known dead
            closed = connection.wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                worker.join(1 if worker.sentinel in closed else 0)
        died = isinstance(error, Exception) and any(worker.exitcode for worker in workers)
        for worker in [*filter(BaseProcess.is_alive, _all_workers)]:  # of other loaders, too: the run ends
            with suppress(Aborted, RuntimeError):  # of its death this process shall hear here, and no more
                worker.kill()
                worker.join(1)
        if late.is_set():
            raise Aborted(
                f"no image has come from the workers for {seconds:g} seconds: does the storage of --data answer? "
                "If it is only slow, give a longer --loader-timeout"
            ) from None
        if died:
            raise Aborted(DEATH) from None
        raise
    finally:
        done.set()


class ImagePairs:
    """Two views of every image, in batches, from worker processes that live as long as the run."""

    def __init__(
        self, dataset: TwoViews, batch_size: int, rows: slice, workers: int, timeout: float, pin_memory: bool
    ) -> None:
        self.order = EpochBatches(len(dataset.catalogue), batch_size, dataset.seed, rows)
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
        for view1, view2, unreadable in self.loader:
            yield Batch((view1, view2), int(unreadable.sum()))


def load_images(
    root: Path,
    *,
    recipes: tuple[ViewRecipe, ViewRecipe],
    image_size: int,
    batch_size: int,
    seed: int,
    workers: int,
    timeout: float,
    monitor: bool,
    pin_memory: bool,
    augment_on: Literal["workers", "device"],
    rows: slice = WHOLE,
) -> PretrainingData:
    """Index the shards or the class folders in ``root/train`` if there is one, else in ``root``; hold some images out.

    Args:
        root: the folder of --data.
        recipes: of the two views.
        image_size: side of a view, in pixels.
        batch_size: of all processes together.
        seed: of order and views.
        workers: processes that read, beside this one; 0 for none.
        timeout: seconds without an image from the workers that end the run.
        monitor: whether to hold images out of every class, for the probe.
        pin_memory: as the DataLoader's.
        augment_on: "workers" for whole views, (N, 3, H, W) float32; "device" for views that are cropped and flipped,
            to be finished by :func:`~barlow_recipes.batched_views.finished`.
        rows: of every batch, this process's.

    Raises:
        UsageError: no such folder, nothing to read in it, an empty class, a damaged shard, or fewer images than a
            batch.
    """
    root = root / "train" if (root / "train").is_dir() else root
    shards = find_shards(root)
    catalogue = index_shards(shards) if shards else index_folder(root)
    fraction = HELD_OUT if monitor and catalogue.labels.any() else 0  # of one class there is nothing to learn
    held_out = hold_out(catalogue.labels, fraction, SPLIT_SEED, MOST_HELD_OUT_PER_CLASS)
    pretraining = catalogue.subset(~held_out)
    if len(pretraining) < batch_size:
        raise UsageError(f"--data {root}: {len(pretraining)} images to pretrain on, but --batch-size is {batch_size}")
    make_view = image_view if augment_on == "workers" else unfinished_view
    tolerated = max(TOLERATED_UNREADABLE[0], int(len(pretraining) * TOLERATED_UNREADABLE[1]))
    dataset = TwoViews(pretraining, [make_view(recipe, image_size) for recipe in recipes], seed, tolerated)
    probe = None
    if held_out.any():
        transform = image_without_augmentation(image_size)
        neighbours = hold_out(pretraining.labels, 1, SPLIT_SEED, MOST_NEIGHBOURS_PER_CLASS)
        bank, queries = (
            Loader(
                Labelled(part, transform),
                timeout,
                batch_size=min(batch_size, PROBED_TOGETHER),
                num_workers=workers,
                pin_memory=pin_memory,
            )
            for part in (pretraining.subset(neighbours), catalogue.subset(held_out))
        )
        probe = Probe(bank, queries, linear=True, labels_per_class=())
    without_probe = "no probe: it needs labels of two classes, and ten images in a class to hold one out"
    return PretrainingData(
        name=root.parent.name if root.name == "train" else root.name,
        images=len(pretraining),
        pairs=ImagePairs(dataset, batch_size, rows, workers, timeout, pin_memory),
        monitor=probe,
        final=probe,
        notes=(without_probe,) if monitor and probe is None else (),
        tolerated_unreadable=tolerated,
        fingerprint=pretraining.fingerprint(),
    )
