#!/usr/bin/env bash
# monai 1.6.1, torch 2.14.1: monai.data.DataLoader over a Dataset that keeps one random pipeline for each view in a
# list.
#
# Guess: each pipeline has draws of its own, so the two views of an image differ.
# Seen: the loader gives each pipeline of a list or a tuple the same seed, and the two views of all 64 images are the
# same to the bit, flips, zooms and noise, with workers and without. As two attributes of the Dataset or in a dict they
# differ, and with torch's own DataLoader, too. A self-supervised run then learns from pairs without a difference, and
# its loss is the lower for it.
# A transform of a monai.data.Dataset that holds such a pipeline (and calls it twice, say) is not found at all: two
# workers draw the same.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet monai==1.6.1 torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import monai.data
import torch
from monai.transforms import Compose, RandFlip, RandGaussianNoise, RandZoom

IMAGE = torch.rand(1, 16, 16)


def pipeline():
    return Compose([RandFlip(prob=0.5), RandZoom(prob=1, min_zoom=0.7, max_zoom=1.3), RandGaussianNoise(prob=1)])


class Pairs(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind
        if kind is None:
            self.first, self.second = pipeline(), pipeline()
        else:
            self.views = kind((pipeline(), pipeline()))

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if self.kind is None:
            first, second = self.first, self.second
        else:
            first, second = self.views.values() if self.kind is by_name else self.views
        return torch.as_tensor(first(IMAGE)), torch.as_tensor(second(IMAGE))


def by_name(pipelines):
    return dict(zip("ab", pipelines))


class Twice:
    def __init__(self):
        self.transform = pipeline()

    def __call__(self, image):
        return torch.stack([torch.as_tensor(self.transform(image)) for _ in range(2)])


def equal_views(loader, kind, workers):
    batches = loader(Pairs(kind), batch_size=8, num_workers=workers)
    return sum(int((a == b).all()) for first, second in batches for a, b in zip(first, second))


for workers in (0, 2):
    for kind, equal in ((list, 64), (tuple, 64), (by_name, 0), (None, 0)):
        assert equal_views(monai.data.DataLoader, kind, workers) == equal, (kind, workers)
        assert equal_views(torch.utils.data.DataLoader, kind, workers) == 0, (kind, workers)

for transform, different in ((Twice(), 16), (pipeline(), 32)):
    loader = monai.data.DataLoader(monai.data.Dataset([IMAGE] * 32, transform), batch_size=1, num_workers=2)
    assert len({float(batch.double().sum()) for batch in loader}) == different, transform
print("as described")
PYTHON
