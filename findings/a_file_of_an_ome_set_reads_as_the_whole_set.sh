#!/usr/bin/env bash
# An image of two channels as a set of OME-TIFF files, a channel in each, read file by file: tifffile 2026.3.3,
# scikit-image 0.26.0, imageio 2.38.1, bioio 3.6.0 with bioio-ome-tiff 1.4.0, Pillow 13.0.0,
# opencv-python-headless 5.0.0.93.
#
# Guess: a file gives the pixels that are in it. Of libraries that know OME, tifffile and bioio, those of the whole set if
# all its files are there, and an error if they are not.
# Seen: tifffile.imread, skimage.io.imread, imageio.v2 and v3 and bioio give both channels from either file: a folder of N
# files is the same image N times. Where the other file is not beside it, or the content is read from memory (a shard), its
# channel is all zeros, of which tifffile's logger alone tells. (bioio then reads the first file so, and raises for the
# second.) Pillow, cv2 and imageio's plugin "pillow" give the file's own channel, and so does skimage.io.ImageCollection,
# where skimage.io.imread of the same path does not.
# So before a random split by files, a copy of some of them or a shard, look at SizeC and the TiffData of the description.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet numpy==2.4.6 tifffile==2026.3.3 scikit-image==0.26.0 imageio==2.38.1 \
    pillow==13.0.0 opencv-python-headless==5.0.0.93 bioio==3.6.0 bioio-ome-tiff==1.4.0
"$scratch/venv/bin/python" - "$scratch" <<'PYTHON'
import io
import logging
import shutil
import sys
import warnings
from pathlib import Path
from uuid import UUID

import cv2
import imageio.v2
import imageio.v3
import numpy as np
import skimage.io
import tifffile
from bioio import BioImage
from PIL import Image

warnings.simplefilter("ignore")
logging.disable()
together, alone = (Path(sys.argv[1], name) for name in ("together", "alone"))
together.mkdir()
alone.mkdir()
channels = np.random.default_rng(0).integers(1, 60_000, (2, 40, 50), dtype=np.uint16)
names = [f"channel{c}.ome.tif" for c in (0, 1)]
for c, name in enumerate(names):
    places = "".join(
        f'<TiffData FirstC="{k}" IFD="0" PlaneCount="1"><UUID FileName="{other}">urn:uuid:{UUID(int=k)}</UUID></TiffData>'
        for k, other in enumerate(names)
    )
    described = (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{UUID(int=c)}">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="50" SizeY="40" SizeC="2" '
        'SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/><Channel ID="Channel:0:1" SamplesPerPixel="1"/>'
        f"{places}</Pixels></Image></OME>"
    )
    tifffile.imwrite(together / name, channels[c], description=described, photometric="minisblack", metadata=None)


def seen(read, path):
    """Which channels an array has, in its order; 0 where it is all zeros."""
    try:
        found = np.asarray(read(path)).squeeze()
    except AttributeError as error:
        return type(error).__name__
    known = {channels[0].tobytes(): "A", channels[1].tobytes(): "B", bytes(channels[0].nbytes): "0"}
    return "".join(known[plane.tobytes()] for plane in found.reshape(-1, *found.shape[-2:]))


readers = {
    "tifffile.imread": tifffile.imread,
    "tifffile.imread, from memory": lambda path: tifffile.imread(io.BytesIO(path.read_bytes())),
    "skimage.io.imread": skimage.io.imread,
    "imageio.v2.imread": imageio.v2.imread,
    "imageio.v3.imread": imageio.v3.imread,
    "bioio": lambda path: BioImage(path).data,
    "imageio.v3.imread, pillow": lambda path: imageio.v3.imread(path, plugin="pillow"),
    "Pillow": Image.open,
    "cv2.imread": lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED),
    "skimage.io.ImageCollection": lambda path: skimage.io.ImageCollection(str(path))[0],
}
found = {}
for reader, read in readers.items():
    found[reader] = [seen(read, together / name) for name in names]
    for name in names:
        shutil.copy(together / name, alone)
        found[reader].append(seen(read, alone / name))
        (alone / name).unlink()
    print(f"{reader}: {', '.join(found[reader])}")
expected = dict.fromkeys(readers, ["AB", "AB", "A0", "0B"])
expected |= {"tifffile.imread, from memory": ["A0", "0B"] * 2, "bioio": ["AB", "AB", "A0", "AttributeError"]}
expected |= dict.fromkeys([*readers][6:], ["A", "B"] * 2)
assert found == expected, found
PYTHON
