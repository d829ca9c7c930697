"""Any tree of image files with one folder per class, as torchvision's ImageFolder reads it; ImageNet is one."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augmentations import image_view, image_without_augmentation
from .data import WHOLE, Batch, EpochBatches, PretrainingData, Probe, hold_out, seed_of
from .decoding import decode
from .errors import Aborted, UsageError, require

View = Callable[[Tensor], Tensor]
Sample = tuple[str, int]  # path, label

HELD_OUT, MOST_HELD_OUT_PER_CLASS = 1 / 10, 5  # to query the nearest neighbours, not pretrained on
MOST_NEIGHBOURS_PER_CLASS = 20
TOLERATED_UNREADABLE = 5, 1 / 1000  # images per epoch: the larger of a handful and a thousandth


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of an image, a pure function of (seed, epoch, index); with them, how many files could not be read."""

    def __init__(self, paths: Sequence[str], views: Sequence[View], seed: int, tolerated: int) -> None:
        self.paths, self.views, self.seed, self.tolerated = paths, views, seed, tolerated

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        image, unreadable = self._read(index)
        view1, view2 = (self._view(number, image, epoch, index) for number in (1, 2))
        return view1, view2, unreadable

    def _read(self, index: int) -> tuple[Tensor, int]:
        """The image, or the next readable one. After more failures than a whole epoch may have, a black one."""
        for failures in range(self.tolerated + 1):
            try:
                path = self.paths[(index + failures) % len(self.paths)]
                return decode(Path(path).read_bytes(), path), failures
            except OSError:
                pass
        return torch.zeros(3, 8, 8, dtype=torch.uint8), self.tolerated + 1

    def _view(self, number: int, image: Tensor, epoch: int, index: int) -> Tensor:
        seed = seed_of(self.seed, epoch, index, number)
        torch.default_generator.manual_seed(seed)  # 1.3 µs; torch.manual_seed takes 258
        random.seed(seed)
        return self.views[number - 1](image)


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images without augmentation, and their labels: −1 where the image cannot be read."""

    def __init__(self, samples: Sequence[Sample], transform: View) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            return self.transform(decode(Path(path).read_bytes(), path)), label
        except OSError:
            return self.transform(torch.zeros(3, 8, 8, dtype=torch.uint8)), -1


class ImagePairs:
    """Two views of every image, in batches, from worker processes that live as long as the run."""

    def __init__(self, dataset: TwoViews, batch_size: int, rows: slice, workers: int, pin_memory: bool) -> None:
        self.order = EpochBatches(len(dataset.paths), batch_size, dataset.seed, rows)
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # not torch's own, whose state a checkpoint keeps
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.first_step = epoch, first_step
        try:
            for view1, view2, unreadable in self.loader:
                yield Batch((view1, view2), int(unreadable.sum()))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise Aborted("a process that reads images has died: is there memory for --workers?") from None


def load_folder(
    root: Path,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    workers: int,
    monitor: bool,
    pin_memory: bool,
    rows: slice = WHOLE,
) -> PretrainingData:
    """Index ``root/train`` if there is one, else ``root``, and hold some images of every class out.

    Raises:
        UsageError: no such folder, no class folders, an empty class, or fewer images than a batch.
    """
    root = root / "train" if (root / "train").is_dir() else root
    samples = _index(root)
    labels = torch.tensor([label for _, label in samples])
    held_out = hold_out(labels, HELD_OUT if monitor else 0, seed, MOST_HELD_OUT_PER_CLASS)
    pretraining = [samples[i] for i in (~held_out).nonzero().flatten().tolist()]
    if len(pretraining) < batch_size:
        raise UsageError(f"--data {root}: {len(pretraining)} images to pretrain on, but --batch-size is {batch_size}")
    tolerated = max(TOLERATED_UNREADABLE[0], int(len(pretraining) * TOLERATED_UNREADABLE[1]))
    views = [image_view(1, image_size), image_view(2, image_size)]
    dataset = TwoViews([path for path, _ in pretraining], views, seed, tolerated)
    probe = None
    if held_out.any() and len(labels.unique()) > 1:
        neighbours = hold_out(labels[~held_out], 1, seed, MOST_NEIGHBOURS_PER_CLASS)
        transform = image_without_augmentation(image_size)
        parts = (
            [pretraining[i] for i in neighbours.nonzero().flatten().tolist()],
            [samples[i] for i in held_out.nonzero().flatten().tolist()],
        )
        bank, queries = (
            DataLoader(
                Labelled(part, transform),
                batch_size,
                num_workers=workers,
                pin_memory=pin_memory,
                generator=torch.Generator(),
            )
            for part in parts
        )
        probe = Probe(bank, queries, labels_per_class=())
    without_probe = "no nearest neighbours: they need two classes, and ten images in a class to hold one out"
    return PretrainingData(
        name=root.parent.name if root.name == "train" else root.name,
        images=len(pretraining),
        pairs=ImagePairs(dataset, batch_size, rows, workers, pin_memory),
        monitor=probe,
        final=probe,
        notes=(without_probe,) if monitor and probe is None else (),
        tolerated_unreadable=tolerated,
    )


def _index(root: Path) -> list[Sample]:
    """The image files of every class folder, as torchvision finds them."""
    datasets = require("torchvision.datasets.folder", "--data")
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise UsageError(
            f"--data {root}: no class folders. Put the images into one folder per class, or all into {root / 'all'}"
        )
    samples = datasets.make_dataset(
        str(root), {name: label for label, name in enumerate(classes)}, datasets.IMG_EXTENSIONS, allow_empty=True
    )
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        raise UsageError(
            f"--data {root}: no image in {len(empty)} of {len(classes)} class folders, the first is "
            f"{classes[empty[0]]}. Remove it or fill it ({', '.join(datasets.IMG_EXTENSIONS)})"
        )
    return samples
