"""Times what a loader's worker does to an image: decode it, make two random views of it. One thread.

The official pipeline is that of facebookresearch/barlowtwins: Pillow decodes, torchvision's transforms work on Pillow's
images. Ours is ``examples/barlow_recipes``. They take turns; the clock is the thread's own. Before anything is timed,
both must agree pixel by pixel after the same decisions; that the decisions are drawn alike is a test of the examples.

The images are made here, 500×375 like ImageNet's usual ones: noise with a spectrum that falls as that of photographs
does, three colours that vary mostly together, saved as JPEG of quality 85.

    python benches/loader.py                                      about three minutes
    python benches/loader.py --rounds 60 --images 8 --out /tmp    half a minute
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as F

import measure
from barlow_recipes.pixels import MEAN, STD, as_float, decode
from barlow_recipes.views import ORDERS, PAPER, Decisions, View, ViewRecipe, colored, draw
from measure import Record, Turn
from render import paragraphs, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OFFICIAL, OURS = "official", "ours"
SIZE = 224
GOAL = 1.3  # times the views per second
DRAWS = 4  # views of each image
MOST_DISTANCE = 1.5  # grey levels, the mean over pixels and views: Pillow cuts off decimals up to six times in a row
COLUMNS = (("view", "view", str), ("distance", "distance", 1.0), ("largest distance", "largest_distance", 1.0))
ADJUSTMENTS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def photo(number: int) -> bytes:
    """A JPEG file that takes the time and the bytes of a photograph."""
    generator = torch.Generator().manual_seed(number)
    height, width = 375, 500
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    spectrum = torch.fft.rfft2(torch.randn(3, height, width, generator=generator))
    noise = torch.fft.irfft2(spectrum * frequency.clamp(min=1 / width) ** -1.35, s=(height, width))
    noise = noise / noise.std(dim=(1, 2), keepdim=True)
    mixture = torch.tensor([[1.0, 0.3, 0.2], [1.0, 0.0, -0.3], [1.0, -0.3, 0.3]])
    pixels = (torch.einsum("ij,jhw->hwi", mixture, noise) * 50 + 120).clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=85)
    return file.getvalue()


def official_decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def official_view(recipe: ViewRecipe) -> transforms.Compose:
    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item()))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=F.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(*recipe.color_jitter)], p=recipe.jitter),
            transforms.RandomGrayscale(recipe.grayscale),
            transforms.RandomApply([blur], p=recipe.blur),
            transforms.RandomApply([partial(ImageOps.solarize, threshold=128)], p=recipe.solarize),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def distance(content: bytes, recipe: ViewRecipe) -> float:
    """Grey levels between a view by Pillow and by ours after the same decisions, the mean over the pixels."""
    image = official_decode(content)
    box = transforms.RandomResizedCrop.get_params(image, list(recipe.crop_scale), [3 / 4, 4 / 3])
    decisions = draw(recipe, 1)
    cut = partial(F.resized_crop, size=[SIZE, SIZE], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    ours = 255 * colored(as_float(cut(decode(content, "photo"), *box)[None]), decisions)[0]
    view = cut(image, *box)
    row = Decisions(*decisions[0].tolist())
    strengths = (row.brightness, row.contrast, row.saturation, row.hue)
    for number in ORDERS[int(row.order)].tolist():
        view = ADJUSTMENTS[number](view, strengths[number]) if number >= 0 else view
    if row.grayscale:
        view = F.to_grayscale(view, 3)
    if row.sigma:
        view = view.filter(ImageFilter.GaussianBlur(row.sigma))
    if row.solarize:
        view = ImageOps.solarize(view)
    return float((ours - F.pil_to_tensor(view).float()).abs().mean())


def agreement(photos: list[bytes]) -> list[Record]:
    """How far the two pipelines are from each other, view by view; raises where they are farther than they may be."""
    torch.manual_seed(0)
    records = []
    for number, recipe in enumerate(PAPER, start=1):
        apart = [distance(content, recipe) for content in photos for _ in range(DRAWS)]
        records.append({"view": number, "distance": statistics.mean(apart), "largest_distance": max(apart)})
        if statistics.mean(apart) > MOST_DISTANCE:
            raise AssertionError(f"expected at most {MOST_DISTANCE} grey levels between the pipelines: {records}")
    return records


def timed(photos: list[bytes], rounds: int) -> Record:
    def both_views(read: Callable[[bytes], Any], views: list[Any], files: Iterator[bytes]) -> None:
        image = read(next(files))
        for view in views:
            view(image)

    theirs, ours = ([make(recipe) for recipe in PAPER] for make in (official_view, partial(View, size=SIZE)))
    turns: dict[str, Turn] = {
        OFFICIAL: partial(both_views, official_decode, theirs, cycle(photos)),
        OURS: partial(both_views, partial(decode, name="photo"), ours, cycle(photos)),
    }
    times = measure.interleave(turns, rounds, math.inf, measure.processor)
    over = measure.ratios(times, OURS)[OFFICIAL]
    whole = {"seconds": {name: measure.spread(own) for name, own in times.items()}, "official_over_ours": over}
    return {"rounds": rounds, "images": len(photos), "mean_bytes": statistics.mean(map(len, photos)), "whole": whole}


def markdown(results: Record) -> str:
    machine, whole = results["environment"], results["whole"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = (f"{2 / whole['seconds'][name]['median']:,.0f} views/s of a core: {name}" for name in (OFFICIAL, OURS))
    return paragraphs(
        "# The views of the loader, one thread",
        f"{machine['cpu']}, {machine['system']}, Python {machine['python']}, {versions}. {results['images']} made JPEG "
        f"files of 500×375 pixels and {results['mean_bytes'] / 1e3:.0f} kB on average, {results['rounds']} rounds. "
        "Official: torchvision's transforms on Pillow. Both views of an image, decoded once:",
        f"{', '.join(rates)}. The official one takes {spread(whole['official_over_ours'])} times the CPU time of ours.",
        "After the same decisions: distances of pixels in grey levels. Pillow cuts to 8 bits after every operation, "
        "six times within a blur, which leaves noise.",
        table(results["agreement"]["same_decisions"], COLUMNS) + "\n",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the loader's views; see the head of this file.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder for loader.json and loader.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__}
    machine = measure.environment() | {"versions": versions}
    photos = list(map(photo, range(arguments.images)))
    agreed = {"same_decisions": agreement(photos)}
    results = {"environment": machine, "agreement": agreed, **timed(photos, arguments.rounds)}
    measure.store(results, arguments.out / "loader.json")
    text = markdown(results)
    (arguments.out / "loader.md").write_text(text, encoding="utf-8")
    print(f"{text}\nWritten to {arguments.out / 'loader.json'} and .md")
    if results["whole"]["official_over_ours"]["median"] < GOAL:
        raise SystemExit(f"expected at least {GOAL} times the views per second")


if __name__ == "__main__":
    main()
