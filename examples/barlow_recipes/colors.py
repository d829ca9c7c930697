"""What a recipe does to the colours of a batch of images, to each with its own strength.

The operations are Pillow's, in float32 instead of 8 bits. All take images (n, 3, H, W) in [0, 1], which they may
overwrite, and strengths (n,). None selects pixels by a mask: on a CPU ``torch.where`` takes ten times an addition.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
TAPS = 13  # of a blur with σ up to 2
NARROW = 2**0.5  # up to this σ the outer six are 0


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(_per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean grey."""
    mean = _grey(images.mean(dim=(-2, -1), keepdim=True))
    return images.mul_(_per_image(factor)).add_(mean * _per_image(1 - factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the pixel's own grey: 0 leaves only that."""
    grey = _grey(images)
    return images.mul_(_per_image(factor)).add_(grey.mul_(_per_image(1 - factor))).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue h of HSV, keep the saturation and the value.

    With h in sixths of a turn from −3 to 3, red at 0, the largest channel M, the smallest m and C = M − m:

        |h| = 1 + (g + b − r − m) / C, and h has the sign of g − b;
        a channel whose own hue is at distance d from h has the value M + C − C·min(max(d, 1), 2).
    """
    red, green, blue = images.unbind(-3)
    largest, smallest = images.amax(-3), images.amin(-3)
    c = largest - smallest
    h = (green + blue).sub_(red).sub_(smallest).div_(c.clamp(min=1e-8)).add_(1).copysign_(green - blue)
    # A channel's place on the circle, from 0 to 6. The distance of h + place from 0 or 6 is ||h + place − 3| − 3|.
    place = (6 * turns[:, None] - 2 * torch.arange(3, device=turns.device)) % 6
    d = (h[:, None] + (place - 3)[:, :, None, None]).abs_().sub_(3).abs_()
    return d.clamp_(1, 2).mul_(c.neg()[:, None]).add_(largest.add_(c)[:, None])


def grayscale(images: Tensor, _: Tensor) -> Tensor:
    return _grey(images).expand_as(images).contiguous()


def narrow_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """:func:`blur` for σ up to √2, in half the time."""
    return _filtered(images, blur_weights(sigma)[:, 3:-3])


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur like a Gaussian with σ up to 2: as three box filters, of any width, one after the other."""
    return _filtered(images, blur_weights(sigma))


def blur_weights(sigma: Tensor) -> Tensor:
    """Three box filters in one: (n, 13).

    A box filter with the variance σ²/3: 1 up to l pixels from its centre, then a fraction.

    Source: Gwosdek et al. (2011), "Theoretical foundations of Gaussian convolution by extended box filtering", and
    Pillow's BoxBlur.c.
    """
    variance = sigma[:, None] ** 2 / 3
    l = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # noqa: E741
    fraction = (2 * l + 1) * (l * (l + 1) - 3 * variance) / (6 * (variance - (l + 1) ** 2))
    box = (l + 1 + fraction - torch.arange(-2, 3, device=sigma.device).abs()).clamp(0, 1)
    box = box / box.sum(dim=1, keepdim=True)
    return torch.fft.irfft(torch.fft.rfft(box, n=TAPS) ** 3, n=TAPS)


def solarize(images: Tensor, _: Tensor) -> Tensor:
    """Invert what is brighter than the middle."""
    return torch.minimum(images, 1 - images)


def _filtered(images: Tensor, weights: Tensor) -> Tensor:
    """Every image filtered by its row of ``weights`` (n, taps), down and across."""
    sizes, taps = images.shape[-2:], weights.shape[1]
    images = F.pad(images, [taps // 2] * 4, mode="replicate")
    for dim in (-2, -1):
        shifted = [images.narrow(dim, tap, sizes[dim]) for tap in range(taps)]
        images = shifted[0] * _per_image(weights[:, 0])
        for tap in range(1, taps):
            images.addcmul_(shifted[tap], _per_image(weights[:, tap]))
    return images


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=-3)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
