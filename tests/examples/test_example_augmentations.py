"""Two random views: the published probabilities and strengths, and digits that stay digits."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from pretraining.augmentations import MEAN, STD, augment_digits, image_view, image_without_augmentation

DRAWS = 400


def rgb(view: Tensor) -> Tensor:
    """Undo the normalisation: values in [0, 1]."""
    return view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def draws(view: int, image: Tensor) -> Iterator[Tensor]:
    transform = image_view(view, 32)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        yield rgb(transform(image))


def share(conditions: list[bool]) -> float:
    return sum(conditions) / len(conditions)


@pytest.mark.parametrize("view", [1, 2])
def test_a_fifth_of_the_views_is_grey(view: int) -> None:
    image = torch.tensor([200, 120, 60], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40)
    grey = [bool((pixels.amax(0) - pixels.amin(0)).max() < 0.02) for pixels in draws(view, image)]
    assert share(grey) == pytest.approx(0.2, abs=0.06)  # three standard deviations of 400 draws


@pytest.mark.parametrize(("view", "expected"), [(1, 0.0), (2, 0.2)])
def test_only_view_2_is_solarized(view: int, expected: float) -> None:
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)  # jitter leaves at least 0.6 · 255 = 153, above 128
    dark = [pixels.mean().item() < 0.45 for pixels in draws(view, white)]
    assert share(dark) == pytest.approx(expected, abs=0.06)


def gaussian_blur(view: int) -> v2.RandomApply:
    """The only part whose probability cannot be read off a view, since the crop smooths as well."""
    (blur,) = (
        t for t in image_view(view, 32).transforms if isinstance(getattr(t, "transforms", [None])[0], v2.GaussianBlur)
    )
    return blur


@pytest.mark.parametrize(("view", "probability"), [(1, 1.0), (2, 0.1)])
def test_view_1_is_always_blurred_and_view_2_in_a_tenth(view: int, probability: float) -> None:
    """A blur of σ < 0.283 changes no byte of an image: exp(−1/2σ²)·255 < 0.5."""
    noticed = probability * (2 - 0.283) / (2 - 0.1)
    stripes = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stripes[:, ::2] = 255
    blur = gaussian_blur(view)
    torch.manual_seed(0)
    changed = [not torch.equal(blur(stripes), stripes) for _ in range(DRAWS)]
    assert share(changed) == pytest.approx(noticed, abs=0.05)


def test_the_blur_is_as_strong_as_the_published_one() -> None:
    """Which is Pillow's, with σ as its radius."""
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    strongest = v2.GaussianBlur(gaussian_blur(1).transforms[0].kernel_size, sigma=(2.0, 2.0))
    ours = strongest(pil_to_tensor(noise)).float()
    published = pil_to_tensor(noise.filter(ImageFilter.GaussianBlur(2.0))).float()
    assert (ours - published)[:, 8:-8, 8:-8].abs().mean() < 0.05 * (
        pil_to_tensor(noise).float() - published
    ).abs().mean()


def test_views_are_normalised_crops_of_the_right_size() -> None:
    image = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    plain = image_without_augmentation(32)(image)
    assert plain.shape == (3, 32, 32)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(rgb(plain), torch.full((3, 32, 32), 128 / 255))
    assert image_view(1, 32)(image).shape == (3, 32, 32)


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
