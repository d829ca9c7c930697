#!/usr/bin/env bash
# Pillow 13.0.0 and grey TIFF files in big-endian order, as written by tifffile 2026.3.3, with compression and without.
#
# Guess: how a lossless file is compressed says nothing about its numbers.
# Seen: int16, int32 and float32 are right without compression, and with deflate each number comes with its bytes in
# reverse, without a warning: 1 of int16 becomes 256, 1.0 of float32 becomes 4.6e-41. uint8 and uint16 are right in both.
# So is everything in little-endian order. (libtiff gives the numbers in the machine's order, and Pillow swaps again: it
# makes an exception for the raw modes of uint16 alone.)
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
"$scratch/venv/bin/python" - "$scratch" <<'PYTHON'
import sys

import numpy as np
import tifffile
from PIL import Image

assert sys.byteorder == "little", "of a machine in big-endian order nothing was seen"
path, numbers = f"{sys.argv[1]}/band.tif", [[0, 1, 2, 100]]
wrong = []
for order in "<>":
    for compression in (None, "deflate"):
        for kind in ("u1", "u2", "i2", "i4", "f4"):
            written = np.array(numbers, dtype=order + kind)
            tifffile.imwrite(path, written, byteorder=order, compression=compression, photometric="minisblack")
            assert tifffile.imread(path).tolist() == numbers, f"tifffile does not read its own {kind}"
            with Image.open(path) as image:
                read = np.asarray(image)
            print(order, compression, kind, image.mode, read.tolist()[0])
            if read.tolist() != numbers:
                wrong.append((order, compression, kind))
                size = written.dtype.itemsize
                reverse = written.view("u1").reshape(-1, size)[:, ::-1].copy().view(order + kind).reshape(1, -1)
                assert read.astype(order + kind).tobytes() == reverse.tobytes()
assert wrong == [(">", "deflate", "i2"), (">", "deflate", "i4"), (">", "deflate", "f4")], wrong
PYTHON
