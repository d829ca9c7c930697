#!/usr/bin/env bash
# Pillow 13.0.0 and JPEG 2000 in colour with more than 8 bits, as written by imagecodecs 2026.3.6 (OpenJPEG 2.5.4).
#
# Guess: Pillow, which has 8 bits a channel, keeps the upper 8, as it does of a PNG or a TIFF of 16 bits.
# Seen: it rounds, and lets the sum run over: what rounds to 256 becomes 0. White is black, of 16 bits all from 65,408
# on, of 12 bits from 4,088 on, in .jp2 and in .j2k, in RGB and RGBA, where alpha 1 becomes 0, too. Nothing is raised.
# Saturated pixels become black holes. Grey, which has 16 bits in Pillow, is right.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet pillow==13.0.0 imagecodecs==2026.3.6 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
from imagecodecs import jpeg2k_decode, jpeg2k_encode
from PIL import Image


def through_pillow(image, bits, kind):
    encoded = jpeg2k_encode(image, codecformat=kind, bitspersample=bits)
    assert (jpeg2k_decode(encoded) == image).all()
    return Image.open(io.BytesIO(encoded))


for kind in ("jp2", "j2k"):
    for bits in (10, 12, 16):
        step = 2 ** (bits - 8)  # values to one of the 8 bits
        ramp = np.linspace(0, 2**bits - 1, 64 * 64).round().astype("u2").reshape(64, 64)
        expected = (ramp.astype(int) + step // 2) // step
        for channels, mode in ((3, "RGB"), (4, "RGBA")):
            opened = through_pillow(np.stack([ramp] * channels, axis=2), bits, kind)
            assert opened.mode == mode, (kind, bits, opened.mode)
            found = np.asarray(opened).astype(int)
            black = ramp >= 2**bits - step // 2
            assert (found[black] == 0).all() and black[-1, -1], (kind, bits, mode)
            assert (found[~black] == expected[~black][:, None]).all(), (kind, bits, mode)
        grey = np.asarray(through_pillow(ramp, bits, kind))
        assert grey.dtype == np.uint16 and (grey == ramp.astype(int) * 2 ** (16 - bits)).all(), (kind, bits)
print("as described")
PYTHON
