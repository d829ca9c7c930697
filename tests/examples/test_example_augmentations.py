"""Two random views: the published probabilities and strengths, and digits that stay digits."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from torchvision import transforms

from barlow_recipes.augmentations import (
    MEAN,
    PAPER,
    STD,
    ViewRecipe,
    augment_digits,
    image_view,
    image_without_augmentation,
)

DRAWS = 400
views = pytest.mark.parametrize("recipe", PAPER, ids=["view 1", "view 2"])


def rgb(view: Tensor) -> Tensor:
    """Undo the normalisation: values in [0, 1]."""
    return view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def draws(recipe: ViewRecipe, image: Tensor) -> Iterator[Tensor]:
    transform = image_view(recipe, 32)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        yield rgb(transform(image))


def share(conditions: list[bool]) -> float:
    return sum(conditions) / len(conditions)


def plain(red: int, green: int, blue: int) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40)


@views
def test_a_fifth_of_the_views_is_grey(recipe: ViewRecipe) -> None:
    grey = [bool((pixels.amax(0) - pixels.amin(0)).max() < 0.02) for pixels in draws(recipe, plain(200, 120, 60))]
    assert share(grey) == pytest.approx(0.2, abs=0.06)  # three standard deviations of 400 draws


@views
def test_four_fifths_of_the_views_are_jittered(recipe: ViewRecipe) -> None:
    """The others are the image, its grey, or what solarization makes of these."""
    untouched = torch.tensor([[200, 120, 60], [137, 137, 137], [55, 120, 60], [118, 118, 118]]) / 255
    means = [pixels.mean(dim=(1, 2)) for pixels in draws(recipe, plain(200, 120, 60))]
    jittered = [bool(((mean - untouched).abs() > 0.004).any(dim=1).all()) for mean in means]
    assert share(jittered) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(("recipe", "expected"), [(PAPER[0], 0.0), (PAPER[1], 0.2)], ids=["view 1", "view 2"])
def test_only_view_2_is_solarized(recipe: ViewRecipe, expected: float) -> None:
    white = plain(255, 255, 255)  # jitter leaves at least 0.6 · 255 = 153, above 128
    dark = [pixels.mean().item() < 0.45 for pixels in draws(recipe, white)]
    assert share(dark) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("recipe", "expected"), [(PAPER[0], 1.0), (PAPER[1], 0.1)], ids=["view 1", "view 2"])
def test_view_1_is_always_blurred_and_view_2_in_a_tenth(recipe: ViewRecipe, expected: float) -> None:
    """Next to the views without blur from the same seeds."""
    noise = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sharp = draws(replace(recipe, blur=0.0), noise)
    changed = [not torch.equal(a, b) for a, b in zip(draws(recipe, noise), sharp, strict=True)]
    assert share(changed) == pytest.approx(expected, abs=0.05)


@views
def test_crops_are_torchvisions_and_half_of_them_flipped(recipe: ViewRecipe) -> None:
    """Ramps, x in red and y in green, tell where a crop was."""
    x, y = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="xy")
    ramps = torch.stack([x, y, y]).to(torch.uint8)
    crop_alone = replace(recipe, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    halves = torch.stack([pixels[:2, [8, 24], [8, 24]] for pixels in draws(crop_alone, ramps)]) * 255
    width, height = (2 * (halves[..., 1] - halves[..., 0])).T
    assert share((width < 0).tolist()) == pytest.approx(0.5, abs=0.08)
    torch.manual_seed(0)
    crop = transforms.RandomResizedCrop.get_params
    published = torch.tensor([crop(ramps, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(20 * DRAWS)]) / 256
    levels = torch.linspace(0.05, 0.95, 10)
    ours = (width.abs() * height / 256**2).quantile(levels)
    assert (ours - published.prod(dim=1).quantile(levels)).abs().max() < 0.07  # 3·0.92·√(¼/400)
    ours = (width.abs() / height).log().quantile(levels)
    assert (ours - (published[:, 1] / published[:, 0]).log().quantile(levels)).abs().max() < 0.045  # the same of 0.58


@views
def test_a_view_is_a_function_of_its_seed(recipe: ViewRecipe) -> None:
    noise = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    before = noise.clone()
    first, second = (list(islice(draws(recipe, noise), 20)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(noise, before)  # which makes the other view, too


def test_views_are_normalised_crops_of_the_right_size() -> None:
    image = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    plain = image_without_augmentation(32)(image)
    assert plain.shape == (3, 32, 32)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(rgb(plain), torch.full((3, 32, 32), 128 / 255))
    assert image_view(PAPER[0], 32)(image).shape == (3, 32, 32)


def test_digits_depend_on_the_generator_alone() -> None:
    images = torch.rand(16, 1, 8, 8)
    views = []
    for _ in range(2):
        state = torch.get_rng_state()
        views.append(augment_digits(images, torch.Generator().manual_seed(7)))
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(3)
    assert torch.equal(*views)
    assert not torch.equal(views[0], augment_digits(images, torch.Generator().manual_seed(8)))


def test_every_digit_is_moved_in_its_own_way_and_stays_in_sight() -> None:
    ring = torch.zeros(500, 1, 8, 8)
    ring[:, :, 2:6, 2:6] = 1
    views = augment_digits(ring, torch.Generator().manual_seed(0))
    assert views.shape == ring.shape
    assert len({view.numpy().tobytes() for view in views}) == 500
    ink = views.clamp(0, 1).sum(dim=(1, 2, 3))
    assert (ink > 5).all()  # of 16
    assert views.mean(0)[0, 3:5, 3:5].min() > 0.7  # centred on average
