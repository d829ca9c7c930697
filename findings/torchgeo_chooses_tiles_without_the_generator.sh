#!/usr/bin/env bash
# torchgeo 0.8.1, torch 2.14.1: RandomGeoSampler(generator=…) over a dataset of several tiles.
#
# Guess: two samplers with generators of one seed draw the same places. So a place in spring and the same in autumn, or
# by two sensors, are two views, and two runs see the same chips.
# Seen: the generator decides where in a tile a chip lies, and torch's global state which tile it is. Of 200 pairs from
# two datasets of the same four tiles 48 are of the same tile, the others of places that have nothing in common. Two
# passes of one program differ, too. RandomBatchGeoSampler is alike. With one tile all 200 are pairs, and so they are
# after torch.manual_seed before each pass. An intersection of the two datasets (&) with one sampler gives pairs.
# Beside that, no chip ever reaches the last column or the first row of its tile: of the 49 places for 16 pixels in 64
# the last is not drawn.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torchgeo==0.8.1 torch==2.14.1 rasterio==1.4.4 requests==2.34.2 numpy==2.4.6
"$scratch/venv/bin/python" -W ignore - "$scratch" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torchgeo.datasets import RasterDataset
from torchgeo.samplers import RandomBatchGeoSampler, RandomGeoSampler

SIDE, LEFT, TOP = 64, 500_000, 4_000_000
columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))


class Tiles(RasterDataset):
    filename_glob = "*.tif"


def dataset(season, tiles):
    """Of each pixel the number of its tile, its column and its row."""
    folder = Path(sys.argv[1], f"{season}-{tiles}")
    folder.mkdir()
    form = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    for tile in range(tiles):
        place = from_origin(LEFT + 10 * SIDE * tile, TOP, 10, 10)
        with rasterio.open(folder / f"{tile}.tif", "w", transform=place, **form) as file:
            file.write(np.stack([np.full_like(rows, tile), columns, rows]).astype(np.uint8))
    return Tiles(folder)


def chips(data, sampler=RandomGeoSampler, length=200, **settings):
    generator = torch.Generator().manual_seed(1)
    places = sampler(data, 16, length=length, generator=generator, **settings)
    batches = places if settings else [places]
    return [data[place]["image"] for batch in batches for place in batch]


def of_one_tile(pairs):
    return sum(float(first[0, 0, 0]) == float(second[0, 0, 0]) for first, second in pairs)


torch.manual_seed(0)
spring, autumn, alone = dataset("spring", 4), dataset("autumn", 4), dataset("spring", 1)
first, second = chips(spring), chips(autumn)
assert of_one_tile(zip(first, second)) == 48
assert all(torch.equal(one[1:, 0, 0], other[1:, 0, 0]) for one, other in zip(first, second))
assert of_one_tile(zip(chips(spring), chips(spring))) == 42
assert of_one_tile(zip(*(chips(data, RandomBatchGeoSampler, batch_size=1) for data in (spring, autumn)))) == 52
assert of_one_tile(zip(chips(alone), chips(alone))) == 200

seeded = []
for data in (spring, autumn):
    torch.manual_seed(2)
    seeded.append(chips(data))
assert of_one_tile(zip(*seeded)) == 200
both = chips(spring & autumn)
assert all(torch.equal(chip[:3], chip[3:]) for chip in both)

many = chips(alone, length=2000)
assert {int(chip[1, 0, 0]) for chip in many} == set(range(48))  # the first column of each
assert {int(chip[2, 0, 0]) for chip in many} == set(range(1, 49))  # the first row
print("as described")
PYTHON
