"""Whole batches augmented at once: the operations of torchvision and kornia, the published rates, row by row."""

from math import pi

import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from barlow_recipes import colors
from barlow_recipes.augmentations import ORDERS, PAPER, Colors, ViewRecipe, as_float, colored, draw_colors, image_view
from barlow_recipes.batched_views import (
    Boxes,
    UnfinishedView,
    crop_boxes,
    crop_small,
    draw,
    finished,
    small_views,
    unfinished_view,
)

CPU = torch.device("cpu")
DRAWS = 40_000
NOTHING = ViewRecipe(flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)

OPERATIONS = {
    colors.brightness: (F.adjust_brightness, 0.6, 1.4),
    colors.contrast: (F.adjust_contrast, 0.6, 1.4),
    colors.saturation: (F.adjust_saturation, 0.8, 1.2),
    colors.hue: (F.adjust_hue, -0.5, 0.5),
    colors.grayscale: (lambda image, _: F.rgb_to_grayscale(image, 3), 0, 0),
    colors.solarize: (lambda image, _: F.solarize(image, 0.5), 0, 0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    torch.testing.assert_close(operation(pixels.clone(), strengths), expected, rtol=0, atol=1.1e-4)


@pytest.mark.parametrize(
    ("operation", "name", "unit", "low", "high"),
    [
        (colors.brightness, "adjust_brightness_accumulative", 1, 0.6, 1.4),
        (colors.contrast, "adjust_contrast_with_mean_subtraction", 1, 0.6, 1.4),
        (colors.saturation, "adjust_saturation_with_gray_subtraction", 1, 0.8, 1.2),
        (colors.hue, "adjust_hue", 2 * pi, -0.5, 0.5),
    ],
)
def test_an_operation_is_kornias(operation, name: str, unit: float, low: float, high: float) -> None:
    kornia = pytest.importorskip("kornia")
    pixels = as_float(images())
    strengths = torch.linspace(low, high, len(pixels))
    expected = getattr(kornia.enhance, name)(pixels, strengths * unit)
    torch.testing.assert_close(operation(pixels.clone(), strengths), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sigma", "most"), [(0.1, 1.5), (0.5, 0.7), (1.0, 0.7), (1.4, 0.7), (1.42, 0.7), (2.0, 0.7)])
def test_the_blur_is_pillows(sigma: float, most: float) -> None:
    """With σ as its radius, in grey levels. Pillow rounds after each pass, and what σ = 0.1 changes it rounds away."""
    noise = images(3, size=64)[0] // 2 + 64
    pillow = Image.fromarray(noise.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    blur = colors.narrow_blur if sigma <= colors.NARROW else colors.blur
    ours = 255 * blur(as_float(noise[None]), torch.tensor([sigma]))[0]
    apart = (ours - F.pil_to_tensor(pillow))[:, 8:-8, 8:-8].abs()  # Pillow continues the edge anew for each pass
    assert apart.mean() < most
    assert apart.mean() < 0.05 * (255 * as_float(noise) - ours).abs().mean() or sigma == 0.1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.4, 1.42, 2.0])
def test_the_blur_has_its_variance(sigma: float) -> None:
    weights = colors.blur_weights(torch.tensor([sigma]))[0].double()
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    offsets = torch.arange(-6, 7)
    assert (weights * offsets**2).sum().item() == pytest.approx(sigma**2, abs=2e-5)  # float32, and 6² as a factor
    assert bool(weights[:3].sum() > 1e-6) == (sigma > colors.NARROW)


def chain(image: Tensor, row: Colors) -> Tensor:
    """The same decisions, by torchvision's functions and one image at a time."""
    for operation in ORDERS[int(row.order)]:
        image = OPERATIONS[operation][0](image, getattr(row, operation.__name__))
    if row.grayscale:
        image = F.rgb_to_grayscale(image, 3)
    if row.sigma:
        image = colors.blur(image[None], torch.tensor([row.sigma]))[0]
    return F.solarize(image, 0.5) if row.solarize else image


@pytest.mark.parametrize("recipe", PAPER, ids=["view 1", "view 2"])
def test_a_batch_gets_what_each_of_its_rows_says(recipe: ViewRecipe) -> None:
    """Also in its own order of the jitter: 200 rows have all 24."""
    pixels = as_float(images(200, size=16))
    decisions = draw_colors(recipe, 200, generator())
    expected = torch.stack([chain(image, Colors(*row)) for image, row in zip(pixels, decisions.tolist(), strict=True)])
    result = colored(pixels.clone(), decisions)
    torch.testing.assert_close(result, expected, rtol=0, atol=1 / 255)  # torchvision's grey, up to four times
    assert (result - expected).abs().mean() < 1e-4


@pytest.mark.parametrize("recipe", PAPER, ids=["view 1", "view 2"])
def test_a_view_depends_on_its_own_row_alone(recipe: ViewRecipe) -> None:
    pixels, parameters = images(40), draw(recipe, 40, generator())
    together = small_views(pixels, parameters)
    alone = torch.cat([small_views(p, row) for p, row in zip(pixels.split(1), parameters.split(1), strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # a mean and products may sum in another order
    unfinished = finished(UnfinishedView(pixels, parameters), CPU)
    for i in (0, 7, 39):
        own = finished(UnfinishedView(pixels[i : i + 1], parameters[i : i + 1]), CPU)
        torch.testing.assert_close(unfinished[i : i + 1], own, rtol=0, atol=1e-5)
    assert torch.equal(pixels, images(40))  # not overwritten


@pytest.mark.parametrize(("recipe", "blur", "solarize"), [(PAPER[0], 1.0, 0.0), (PAPER[1], 0.1, 0.2)])
def test_the_rates_are_the_published_ones(recipe: ViewRecipe, blur: float, solarize: float) -> None:
    parameters = draw(recipe, DRAWS, generator())
    box, color = Boxes(*parameters[:, :5].T), Colors(*parameters[:, 5:].T)
    rates = {
        "flip": (box.flip, 0.5),
        "jitter": (color.order >= 0, 0.8),
        "grayscale": (color.grayscale, 0.2),
        "blur": (color.sigma > 0, blur),
        "solarize": (color.solarize, solarize),
    }
    for name, (happened, expected) in rates.items():
        error = 4 * (expected * (1 - expected) / DRAWS) ** 0.5
        assert happened.float().mean().item() == pytest.approx(expected, abs=error), name


def test_strengths_and_orders_are_uniform() -> None:
    color = Colors(*draw_colors(PAPER[0], DRAWS, generator()).T)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in (ranges | {"sigma": (0.1, 2.0)}).items():
        values = getattr(color, name).sort().values
        assert low <= values[0], name
        assert values[-1] <= high, name
        assert kolmogorov((values - low) / (high - low), torch.linspace(0, 1, DRAWS)) < 0.0098, name
    orders = color.order[color.order >= 0].long().bincount()
    assert len(orders) == 24
    assert (orders / orders.sum() - 1 / 24).abs().max() < 5 * (1 / 24 / orders.sum()) ** 0.5


def kolmogorov(a: Tensor, b: Tensor) -> float:
    """The largest distance between two distributions; 1.95/√n of one is exceeded once in a thousand times."""
    points = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(values.sort().values, points, right=True) / len(values) for values in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 0.6), (1.0, 1.0)])  # of the last hardly a try fits
def test_crops_are_those_of_torchvision(scale: tuple[float, float]) -> None:
    recipe, n, size = ViewRecipe(crop_scale=scale, blur=0, solarize=0), 10_000, 1000
    box = Boxes(*crop_boxes(recipe, n, generator()).T)
    torch.manual_seed(0)
    crop = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([crop(torch.empty(1, size, size), list(scale), [3 / 4, 4 / 3]) for _ in range(n)]) / size
    top, left, height, width = theirs.T
    ours_and_theirs = [
        (box.width * box.height, width * height),
        (box.width / box.height, width / height),
        (box.left * (1 - box.width), left),
        (box.top * (1 - box.height), top),
    ]
    for ours, expected in ours_and_theirs:
        assert kolmogorov(ours, expected) < 1.95 * (2 / n) ** 0.5 + 2 / size  # theirs are whole thousandths


def test_a_small_crop_is_torchvisions() -> None:
    pixels = as_float(images(50, size=28))
    parameters = draw(NOTHING, 50, generator())
    parameters[0, :4] = torch.tensor([1.0, 1.0, 0.5, 0.5])
    expected = []
    for image, row in zip(pixels, parameters[:, :5].tolist(), strict=True):
        box = Boxes(*row)
        height, width = round(box.height * 28), round(box.width * 28)
        top, left = int(box.top * (29 - height)), int(box.left * (29 - width))
        bicubic = F.InterpolationMode.BICUBIC
        expected.append(F.resized_crop(image, top, left, height, width, [28, 28], bicubic).clamp(0, 1))
    cropped = crop_small(pixels, parameters)
    torch.testing.assert_close(cropped, torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(cropped[0], pixels[0])
    parameters[:, Boxes._fields.index("flip")] = 1
    torch.testing.assert_close(crop_small(pixels, parameters), cropped.flip(3))


def test_a_worker_and_the_device_make_the_same_view() -> None:
    """As image_view makes, from the same seed: the decisions are drawn in the same order."""
    photos = torch.randint(0, 256, (6, 3, 60, 50), generator=generator(), dtype=torch.uint8)
    for recipe in PAPER:
        halves, wholes = [], []
        for number, photo in enumerate(photos):
            torch.manual_seed(number)
            halves.append(unfinished_view(recipe, 32)(photo))
            torch.manual_seed(number)
            wholes.append(image_view(recipe, 32)(photo))
        batch = default_collate(halves)
        assert isinstance(batch, UnfinishedView)
        assert batch.pixels.dtype == torch.uint8
        torch.testing.assert_close(finished(batch, CPU), torch.stack(wholes), rtol=0, atol=1e-5)
    whole = torch.stack(wholes)
    assert finished(whole, CPU) is whole


def test_decisions_depend_on_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(draw(PAPER[1], 9, generator(3)), draw(PAPER[1], 9, generator(3)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(draw(PAPER[1], 9, generator(3)), draw(PAPER[1], 9, generator(4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", PAPER, ids=["view 1", "view 2"])
def test_a_gpu_makes_the_same_views(recipe: ViewRecipe) -> None:
    view = UnfinishedView(images(64), draw(recipe, 64, generator()))
    torch.testing.assert_close(finished(view, torch.device("cuda")).cpu(), finished(view, CPU), rtol=0, atol=1e-4)
