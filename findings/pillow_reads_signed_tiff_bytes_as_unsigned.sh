#!/usr/bin/env bash
# Pillow 13.0.0 and TIFF files of one band, as written by tifffile 2026.3.3: what comes of each type of number.
#
# Guess: an image that opens has the numbers of its file, and what Pillow has no mode for does not open.
# Seen: int8 opens in mode L, and −128 and −1 become 128 and 255, without a warning (the tag SampleFormat says "signed").
# uint32 opens in mode I, which is signed: 3,000,000,000 becomes −1,294,967,296. float16 and float64 do not open
# ("cannot identify image file"), although they are valid. int16, uint16, int32 and float32 are right.
# So bands of differences, elevations or counts must be read by tifffile, or their tags looked at first.
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
from PIL import Image, UnidentifiedImageError

path = f"{sys.argv[1]}/band.tif"
values = {
    "int8": [-128, -1, 0, 127],
    "uint32": [0, 1, 2**31 - 1, 3_000_000_000],
    "float16": [-0.5, 0, 0.25, 1],
    "float64": [-0.5, 0, 0.25, 1],
    "int16": [-32768, -1, 0, 32767],
    "uint16": [0, 1, 32768, 65535],
    "int32": [-(2**31), -1, 0, 2**31 - 1],
    "float32": [-0.5, 0, 0.25, 1],
}
found = {}
for kind, numbers in values.items():
    tifffile.imwrite(path, np.array([numbers], dtype=kind))
    assert tifffile.imread(path).tolist() == [numbers], f"tifffile does not read its own {kind}"
    try:
        with Image.open(path) as image:
            found[kind] = image.mode, np.array(image).tolist()[0]
    except UnidentifiedImageError:
        found[kind] = "does not open", None
    print(kind, numbers, "→", *found[kind])
right = [kind for kind in values if found[kind][1] == values[kind]]
assert right == ["int16", "uint16", "int32", "float32"], right
assert found["int8"] == ("L", [128, 255, 0, 127])
assert found["uint32"] == ("I", [0, 1, 2**31 - 1, 3_000_000_000 - 2**32])
assert found["float16"][0] == found["float64"][0] == "does not open"
PYTHON
