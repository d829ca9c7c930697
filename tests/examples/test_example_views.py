"""Views: the published probabilities and strengths, torchvision's operations, each row in its own way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from barlow_recipes import views
from barlow_recipes.pixels import MEAN, STD, PixelSettings, as_float
from barlow_recipes.views import (
    ORDERS,
    PAPER,
    Decisions,
    PartialView,
    View,
    ViewRecipe,
    colored,
    completed,
    crop_small,
    draw,
    image_without_augmentation,
    small_views,
)


def torchvisions_blur(image: Tensor, sigma: float) -> Tensor:
    padded = F.pad(image, [6] * 4, padding_mode="edge")
    return F.gaussian_blur(padded, [13, 13], [sigma] * 2)[:, 6:-6, 6:-6]


MANY = 40_000
CPU = torch.device("cpu")
NOTHING = ViewRecipe(flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
JITTER = (views.brightness, views.contrast, views.saturation, views.hue)
OPERATIONS = {
    views.brightness: (F.adjust_brightness, 0.6, 1.4),
    views.contrast: (F.adjust_contrast, 0.6, 1.4),
    views.saturation: (F.adjust_saturation, 0.8, 1.2),
    views.hue: (F.adjust_hue, -0.5, 0.5),
    views.grayscale: (lambda image, _: F.rgb_to_grayscale(image, 3), 0, 0),
    views.blur: (torchvisions_blur, 0.1, 2),
    views.solarize: (lambda image, _: F.solarize(image, 0.5), 0, 0),
}

recipes = pytest.mark.parametrize("recipe", PAPER, ids=["view 1", "view 2"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(view: View, image: Tensor, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return view(image)


def images(n: int = 12, size: int = 32) -> Tensor:
    """Noise; the last one is grey, and the one before has the eight corners of the colour cube alone."""
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=generator(), dtype=torch.uint8)
    pixels[-1] = pixels[-1, :1]
    pixels[-2] = pixels[-2] // 128 * 255
    return pixels


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_an_operation_is_torchvisions_with_a_strength_for_each_image(operation) -> None:
    theirs, low, high = OPERATIONS[operation]
    pixels = as_float(images())
    strengths = torch.linspace(low, high, len(pixels))
    expected = torch.stack([theirs(image, s) for image, s in zip(pixels, strengths.tolist(), strict=True)])
    # Grey is 0.2989 of red there, 0.299 here and in Pillow.
    changed = operation(pixels.clone(), strengths[:, None, None, None])
    torch.testing.assert_close(changed, expected, rtol=0, atol=1.1e-4)


def chain(image: Tensor, row: Decisions) -> Tensor:
    """The same decisions, by torchvision's functions and one image at a time."""
    for number in ORDERS[int(row.order)].tolist():
        if number >= 0:
            operation = JITTER[number]
            image = OPERATIONS[operation][0](image, getattr(row, operation.__name__))
    image = F.rgb_to_grayscale(image, 3) if row.grayscale else image
    image = OPERATIONS[views.blur][0](image, row.sigma) if row.sigma else image
    return F.solarize(image, 0.5) if row.solarize else image


@recipes
def test_a_batch_gets_what_each_of_its_rows_says(recipe: ViewRecipe) -> None:
    """Also in its own order of the jitter: 200 rows have all 24."""
    pixels = as_float(images(200, size=16))
    decisions = draw(recipe, 200, generator())
    rows = [Decisions(*row) for row in decisions.tolist()]
    expected = torch.stack([chain(image, row) for image, row in zip(pixels, rows, strict=True)])
    result = colored(pixels.clone(), decisions)
    torch.testing.assert_close(result, expected, rtol=0, atol=1 / 255)  # torchvision's grey, up to four times
    assert (result - expected).abs().mean() < 1e-4


@recipes
def test_a_view_depends_on_its_own_row_alone(recipe: ViewRecipe) -> None:
    pixels, decisions = images(40), draw(recipe, 40, generator())
    together = small_views(pixels, decisions)
    alone = torch.cat([small_views(p, row) for p, row in zip(pixels.split(1), decisions.split(1), strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # a mean and products may sum in another order
    assert torch.equal(pixels, images(40))  # not overwritten


@pytest.mark.parametrize(("recipe", "blur", "solarize"), [(PAPER[0], 1.0, 0.0), (PAPER[1], 0.1, 0.2)])
def test_the_decisions_are_the_published_ones(recipe: ViewRecipe, blur: float, solarize: float) -> None:
    drawn = Decisions(*draw(recipe, MANY, generator()).T)
    jittered = drawn.order < len(ORDERS) - 1
    rates = [(drawn.flip, 0.5), (jittered, 0.8), (drawn.grayscale, 0.2), (drawn.sigma > 0, blur)]
    rates += [(drawn.solarize, solarize)]
    for found, expected in rates:
        assert found.float().mean().item() == pytest.approx(expected, abs=3.5 * 0.5 / MANY**0.5)
    assert torch.bincount(drawn.order[jittered].long()).tolist() == pytest.approx([0.8 * MANY / 24] * 24, rel=0.12)
    strengths = [(drawn.brightness, 0.6, 1.4), (drawn.contrast, 0.6, 1.4), (drawn.saturation, 0.8, 1.2)]
    strengths += [(drawn.hue, -0.1, 0.1), (drawn.sigma[drawn.sigma > 0], 0.1, 2.0)]
    for found, low, high in strengths:
        assert low <= found.min() < found.max() <= high + 1e-6
        even = (found - low) / (high - low)
        assert kolmogorov(even, torch.linspace(0, 1, MANY)) < 1.95 * (2 / len(found)) ** 0.5
    state = torch.get_rng_state()
    assert torch.equal(torch.stack(drawn, dim=1), draw(recipe, MANY, generator()))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(draw(recipe, 9, generator(3)), draw(recipe, 9, generator(4)))


@recipes
def test_what_is_decided_does_not_depend_on_who_crops(recipe: ViewRecipe) -> None:
    states = generator(), generator()
    ours, theirs = draw(recipe, 9, states[0]), draw(recipe, 9, states[1], crops=False)
    assert torch.equal(ours[:, 2:], theirs[:, 2:])
    assert theirs[:, :2].eq(1).all()
    assert torch.equal(*(state.get_state() for state in states))


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.5, 0.99])
def test_a_narrow_blur_leaves_out_what_weighs_nothing(sigma: float) -> None:
    """Beside a wide one, it is done with all taps."""
    pixels = as_float(images(2, size=32))
    sigmas = torch.tensor([sigma, 2.0]).view(2, 1, 1, 1)
    alone, beside = views.blur(pixels[:1], sigmas[:1]), views.blur(pixels, sigmas)[:1]
    torch.testing.assert_close(alone, beside, rtol=0, atol=2e-7)


def kolmogorov(one: Tensor, other: Tensor) -> float:
    """The greatest distance of two samples' distribution functions."""
    places = torch.cat([one, other]).sort().values
    shares = [torch.searchsorted(sample.sort().values, places, right=True) / len(sample) for sample in (one, other)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 0.6), (1.0, 1.0)])  # of the last hardly a try fits
def test_crops_are_those_of_torchvision(scale: tuple[float, float]) -> None:
    recipe, n, size = ViewRecipe(crop_scale=scale, blur=0, solarize=0), 10_000, 1000
    box = Decisions(*draw(recipe, n, generator()).T)
    torch.manual_seed(0)
    crop = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([crop(torch.empty(1, size, size), list(scale), [3 / 4, 4 / 3]) for _ in range(n)]) / size
    top, left, height, width = theirs.T
    compared = [(box.width * box.height, width * height), (box.width / box.height, width / height)]
    compared += [(box.left * (1 - box.width), left), (box.top * (1 - box.height), top)]
    for ours, expected in compared:
        assert kolmogorov(ours, expected) < 1.95 * (2 / n) ** 0.5 + 2 / size  # theirs are whole thousandths


def test_a_small_crop_is_where_it_was_decided() -> None:
    """Ramps, x in red and y in green, tell where each pixel of a view was."""
    size, n = 28, 50
    x, y = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="xy")
    decisions = draw(replace(NOTHING, flip=0.5, crop_scale=(0.3, 0.9)), n, generator())
    box = Decisions(*decisions[..., None].unbind(1))
    cropped = crop_small(torch.stack([x, y, y]).expand(n, 3, size, size).contiguous(), decisions)
    places = (torch.arange(size) + 0.5) / size
    across, down = (
        (start * (1 - side) + side * places) - 0.5 / size
        for start, side in ((box.left, box.width), (box.top, box.height))
    )
    across = torch.where(box.flip > 0, across.flip(1), across)
    inner = (across[:, None, :] > 2 / size) & (across[:, None, :] < 1 - 3 / size)  # where a cubic sees no border
    apart = (cropped[:, 0] - across[:, None, :]).abs()[inner.expand(n, size, size)]
    assert apart.max() < 0.01
    assert (cropped[:, 1, 8:20, 14] - down[:, 8:20]).abs().max() < 0.03
    whole = torch.tensor([[1.0, 1, 0.5, 0.5, 0, len(ORDERS) - 1, 1, 1, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(crop_small(as_float(images(3)[:1]), whole), as_float(images(3)[:1]), rtol=0, atol=1e-5)


def rgb(view: Tensor) -> Tensor:
    """Undo the normalisation: values in [0, 1]."""
    return view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_a_workers_crop_and_flip_are_those_of_the_recipe() -> None:
    """Ramps, x in red and y in green, tell where a crop was."""
    x, y = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="xy")
    ramps = torch.stack([x, y, y]).to(torch.uint8)
    worker = View(replace(NOTHING, flip=0.5, crop_scale=(0.2, 0.3)), 32)
    halves = torch.stack([rgb(seeded(worker, ramps, seed))[:2, [8, 24], [8, 24]] for seed in range(400)]) * 255
    width, height = (2 * (halves[..., 1] - halves[..., 0])).T
    assert (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.08)
    area, ratio = width.abs() * height / 256**2, width.abs() / height
    assert 0.18 < area.min() < 0.22 < 0.28 < area.max() < 0.32
    assert 0.7 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.43


@recipes
def test_a_worker_and_the_device_make_the_same_view(recipe: ViewRecipe) -> None:
    """From the same seed: the decisions are drawn in the same order."""
    photos = torch.randint(0, 256, (6, 3, 60, 50), generator=generator(), dtype=torch.uint8)
    halves, wholes = [], []
    before = photos.clone()
    for number, photo in enumerate(photos):
        halves.append(seeded(View(recipe, 32, left=torch.uint8), photo, number))
        wholes.append(seeded(View(recipe, 32), photo, number))
        assert torch.equal(wholes[-1], seeded(View(recipe, 32), photo, number))
    assert torch.equal(photos, before)  # which make the other view, too
    batch, whole = default_collate(halves), torch.stack(wholes)
    assert isinstance(batch, PartialView)
    assert batch.pixels.dtype == torch.uint8
    assert len(whole.flatten(1).unique(dim=0)) == 6
    torch.testing.assert_close(completed(batch, CPU), whole, rtol=0, atol=1e-5)
    assert completed(whole, CPU) is whole


def test_views_are_normalised_crops_of_the_right_size() -> None:
    image = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    plain = image_without_augmentation(32)(image)
    assert (plain.shape, plain.dtype) == ((3, 32, 32), torch.float32)
    torch.testing.assert_close(rgb(plain), torch.full((3, 32, 32), 128 / 255))
    assert View(PAPER[0], 32)(image).shape == (3, 32, 32)


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_views_of_any_number_of_channels(channels: int, kind: torch.dtype) -> None:
    """What mixes colours is left out; the others change them, and floats stay between black and white."""
    pixels = PixelSettings(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    noise = torch.rand(channels, 40, 50, generator=generator())
    image = noise if kind == torch.float32 else (255 * noise).to(kind)
    for recipe in PAPER:
        whole = torch.stack([seeded(View(recipe, 32, pixels), image, seed) for seed in range(40)])
        worker = View(recipe, 32, pixels, kind)
        half = default_collate([seeded(worker, image, seed) for seed in range(40)])
        assert half.pixels.dtype == kind
        torch.testing.assert_close(completed(half, CPU, pixels), whole, rtol=0, atol=1e-5)
        assert whole.shape == (40, channels, 32, 32)
        assert 0 <= whole.min() < 0.2 < 0.8 < whole.max() <= 1 + 1e-6
    turned = replace(NOTHING, color_jitter=(0.0, 0.0, 0.2, 0.5), jitter=1.0, grayscale=1.0)
    kept = colored(noise[None].clone(), draw(turned, 1, generator()))
    torch.testing.assert_close(kept, noise[None], rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@recipes
def test_a_gpu_makes_the_same_views(recipe: ViewRecipe) -> None:
    view = PartialView(images(64), draw(recipe, 64, generator()))
    torch.testing.assert_close(completed(view, torch.device("cuda")).cpu(), completed(view, CPU), rtol=0, atol=1e-4)
