#!/usr/bin/env bash
# imagecodecs 2026.3.6 (OpenJPEG 2.5.4) and tifffile 2026.3.3: lossless JPEG 2000 of integers of 32 bits.
#
# Guess: what is compressed without loss comes back, or is refused.
# Seen: a mask of labels 0 to 8 in uint32, 128 × 128 pixels, written by tifffile with compression="jpeg2000" and read
# again: 14,502 of the 16,384 pixels differ. Of the background, 14,904 pixels, most are 1 now, others are as large as
# 67,108,863. In an image of zeros and ones all are 1. uint8, uint16 and int32 are right. Beyond 24 bits int32 and
# uint32 are off by millions. With reversible=True, level=0 and the bits told it is the same, and nothing is raised.
# htj2k_encode is right. imagecodecs 2026.10.10, which needs Python 3.12, gives the same mask.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet imagecodecs==2026.3.6 tifffile==2026.3.3 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import tifffile
from imagecodecs import htj2k_decode, htj2k_encode, jpeg2k_decode, jpeg2k_encode

y, x = np.mgrid[:128, :128]
labels = np.zeros((128, 128), np.int64)
for label in range(1, 9):
    labels[(y - 16 * label + 8) ** 2 + (x - 64) ** 2 < 60] = label


def through_tiff(image):
    file = io.BytesIO()
    tifffile.imwrite(file, image, compression="jpeg2000")
    file.seek(0)
    return tifffile.imread(file)


for dtype, different in (("uint8", 0), ("uint16", 0), ("int32", 0), ("uint32", 14502)):
    image = labels.astype(dtype)
    found = through_tiff(image)
    assert found.dtype == image.dtype
    assert (found != image).sum() == different, (dtype, (found != image).sum())
    assert (htj2k_decode(htj2k_encode(image)) == image).all()
values, counts = np.unique(through_tiff(labels.astype(np.uint32)), return_counts=True)
assert values[counts.argmax()] == 1 and values.max() > 67e6, (values, counts)

half = np.zeros((64, 48), np.uint32)
half[32:] = 1
exactly = {"reversible": True, "level": 0, "bitspersample": 1}
for settings in ({}, {"reversible": True}, exactly):
    assert (jpeg2k_decode(jpeg2k_encode(half, **settings)) == 1).all(), settings

for dtype in (np.int32, np.uint32):
    for bits, right in ((24, True), (26, False), (28, False), (30, False)):
        low = -(2 ** (bits - 1)) if dtype is np.int32 else 0
        image = np.random.default_rng(0).integers(low, low + 2**bits, (64, 48)).astype(dtype)
        difference = np.abs(jpeg2k_decode(jpeg2k_encode(image)).astype(np.int64) - image).max()
        assert difference == 0 if right else difference > 1e6, (dtype, bits, difference)
print("as described")
PYTHON
