"""Results that nobody measured, with round figures, in the form of those that benches/bench.py writes."""

import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

Record = dict[str, Any]

PAPER_ERRORS = {"definition": "paper", "loss_error": 1e-7, "gradient_error": 2e-7}
# Seconds per contender at D = 1000 and N = 100; those linear in D, and in D².
LINEAR = {"barlow_loss": 0.010, "FFT relaxation": 0.005}
SQUARE = {"textbook": 0.050, "lightly": 0.060, "solo-learn": 0.200, "barlow_loss, primal": 0.040}


def spread(median: float) -> Record:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def results() -> Record:
    """All sections, new at every call."""
    return {
        "date": "2001-01-01",
        "environment": {
            "cpu": "Fictitious 9000",
            "instructions": "AVX9",
            "cores": 3,
            "system": "Nowhere",
            "python": "3.99.0",
            "versions": {"barlow-loss": "0.0.0", "torch": "9.9.9", "lightly": None},
        },
        "cells": [cell(100, 1000), cell(100, 2000), cell(200, 1000), cell(100, 4000, but=("lightly", "solo-learn"))],
        "growth": growth(),
        "limits": [limit(100, 1000, 1.25, (0.006, 0.003, 0.001)), limit(200, 1000, 3, (0.002, 0.007, 0.001))],
        "host": host(),
        "distributed": {"cells": [distributed(100, 1000, 2)], "exactness": exactness()},
        "training": [training("ResNet-50 and projector", 64, 224), training("projector alone", 256, None)],
        "seconds": {"cells": 1.0},
    }


def cell(n: int, d: int, threads: int = 1, but: tuple[str, ...] = ()) -> Record:
    seconds = {name: s * d / 1000 * n / 100 for name, s in LINEAR.items()}
    seconds |= {name: s * (d / 1000) ** 2 * n / 100 for name, s in SQUARE.items()}
    contenders = {name: contender(name, s, s / seconds["barlow_loss"], n, d) for name, s in seconds.items()}
    kept = {name: found for name, found in contenders.items() if name not in but}
    return {"n": n, "d": d, "threads": threads, "algorithm": "dual", "rounds": 7, "contenders": kept}


def contender(name: str, seconds: float, times_ours: float, n: int, d: int) -> Record:
    errors: Record = PAPER_ERRORS
    if name == "FFT relaxation":
        errors = {"definition": "relaxed", "loss_error": 0.02 * d / 1000, "gradient_error": 2.5}
    return {
        **errors,
        "error_of_own": {"loss": 1e-7, "gradient": 2e-7},
        "working_bytes": 20 * n * d if name in LINEAR else 16 * d * d,
        "seconds": spread(seconds),
        "times_ours": spread(times_ours),
    }


def growth() -> Record:
    features = {
        "barlow_loss": {"d": [1000, 2000, 4000], "seconds": [0.01, 0.02, 0.04], "exponent": 1.0},
        "textbook": {"d": [1000, 2000], "seconds": [0.05, 0.2], "exponent": 2.0},
        "FFT relaxation": {"d": [1000, 2000, 4000], "seconds": [0.005, 0.01, 0.02], "exponent": 1.0},
    }
    samples = {"barlow_loss": {"n": [100, 200], "seconds": [0.01, 0.02], "exponent": 1.0}}
    largest = {
        "barlow_loss": {"features": 800_000, "working_bytes": 1.9e9, "measured": True, "features_in_all": 300_000},
        "textbook": {"features": 11_000, "working_bytes": 1.9e9, "measured": False, "features_in_all": 10_900},
    }
    return {
        "features": {"n": 100, "contenders": features},
        "samples": {"d": 1000, "contenders": samples},
        "budget": {"n": 100, "bytes": 2_000_000_000, "contenders": largest},
    }


def limit(n: int, d: int, over_gemms: float, parts: tuple[float, float, float]) -> Record:
    return {
        "n": n,
        "d": d,
        "threads": 1,
        "algorithm": "dual",
        "rounds": 7,
        "seconds": spread(0.010),
        "gemms": {"shapes": ["(1×2)·(2×1)"], "seconds": spread(0.010 / over_gemms)},
        "ours_over_gemms": spread(over_gemms),
        "ceilings": {"flops_per_second": 50e9, "square_flops_per_second": 60e9, "bytes_per_second": 10e9},
        "flops": 250_000_000,
        "bytes": 30_000_000,
        "model_seconds": 0.008,
        "parts": dict(zip(("products", "elementwise", "rest"), parts, strict=True)),
    }


def host() -> Record:
    steps = [
        host_step("eager", 4, 16, "float32", "textbook", 1e-4, 1.25e-4),
        {
            **host_step("Triton on a pretended GPU", 16, 32, "bfloat16", "an empty autograd.Function", 9e-5, 3e-5),
            "launches": ["one_kernel", "another_kernel", "a_third_kernel"],
        },
    ]
    counts = [{"n": 4, "d": 16, "operations": 50}, {"n": 64, "d": 2048, "operations": 60}]
    return {"steps": steps, "left_out": {}, "operations": counts}


def host_step(what: str, n: int, d: int, dtype: str, reference: str, own: float, other: float) -> Record:
    return {
        "what": what,
        "n": n,
        "d": d,
        "dtype": dtype,
        "reference": reference,
        "rounds": 7,
        "seconds": spread(own),
        "reference_seconds": spread(other),
        "over_reference": spread(own / other),
    }


def distributed(n: int, d: int, processes: int) -> Record:
    def one(times_ours: float, sent: float, factor: float) -> Record:
        return {
            "loss_error": 1e-8,
            "gradient_error": 2e-7,
            "gradient_factor": factor,
            "sent": {"collectives": sent, "loopback": 1.5 * sent},
            "seconds": spread(0.02 * times_ours),
            "times_ours": spread(times_ours),
        }

    return {
        "n": n,
        "d": d,
        "processes": processes,
        "rounds": 5,
        "contenders": {"barlow_loss": one(1, 4e6, 1), "textbook": one(16, 64e6, 1 / processes)},
        "floor": {"seconds": spread(0.1), "times_ours": spread(5)},
        "header": {"seconds": spread(0.0005)},
    }


def exactness() -> list[Record]:
    def found(loss: float, gradient: float, cosine: float) -> Record:
        return {"loss_error": loss, "gradient_error": gradient, "gradient_cosine": cosine}

    even = {"barlow_loss": found(1e-7, 3e-7, 1.0), "textbook": found(1e-7, 0.5, 1.0), "lightly": found(0.3, 0.4, 0.9)}
    uneven = {**even, "textbook": found(0.1, 0.6, 0.95), "lightly": {"refused": "shards must be\neven | or else"}}
    return [
        {"processes": 2, "rows": [50, 50], "d": 512, "contenders": even},
        {"processes": 2, "rows": [40, 60], "d": 512, "contenders": uneven},
    ]


def training(what: str, batch_size: int, image_size: int | None) -> Record:
    """Nine seconds, and a second of the textbook's loss, or a fifth of a second of ours."""
    losses = {"barlow_loss": 0.2, "textbook": 1.0}
    return {
        "what": what,
        "batch_size": batch_size,
        "image_size": image_size,
        "projector": 8192,
        "threads": 3,
        "rounds": 3,
        "parts": {"backbone": 6.0, "projector": 2.5, "optimizer": 0.5},
        "chunks": [8, 16],
        "losses": {name: spread(seconds) for name, seconds in losses.items()},
        "steps": {name: 9 + seconds for name, seconds in losses.items()},
        "shares": {name: seconds / (9 + seconds) for name, seconds in losses.items()},
        "textbook_over_ours": spread(5),
        "speed_up": 10 / 9.2,
    }


def png(keyword: str, text: str) -> bytes:
    """A picture of one grey pixel that keeps a text."""
    content, info = io.BytesIO(), PngInfo()
    info.add_text(keyword, text)
    Image.new("L", (1, 1)).save(content, "PNG", pnginfo=info)
    return content.getvalue()
