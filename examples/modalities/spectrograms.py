"""Sounds: views of a spectrogram, and what an encoder learns of the instrument, without a label.

An instrument is a pattern of overtones. Each note has a pitch, a length and a noise of its own. The views play it at
another speed, so at another pitch, from another start and louder or softer, and blank out a band of frequencies, as
SpecAugment does (arXiv 1904.08779).
"""

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, Projector

RATE, SAMPLES, INSTRUMENTS, OVERTONES = 8000, 4096, 6, 8


def notes(n: int) -> tuple[Tensor, Tensor]:
    """n notes (n, SAMPLES) of random pitch, and the number of the instrument of each."""
    spectra = torch.rand(INSTRUMENTS, OVERTONES, generator=torch.Generator().manual_seed(0)) ** 3
    instrument = torch.randint(INSTRUMENTS, (n,))
    time, pitch = torch.arange(SAMPLES) / RATE, 110 * 2 ** (torch.rand(n, 1, 1) * 1.5)
    overtones = torch.arange(1, OVERTONES + 1)[:, None]
    phases = 2 * torch.pi * torch.rand(n, OVERTONES, 1)
    waves = torch.sin(2 * torch.pi * pitch * overtones * time + phases)
    sound = (spectra[instrument][:, :, None] * waves).sum(1) * torch.exp(-time * 8 * torch.rand(n, 1))
    return sound + 0.05 * torch.randn(n, SAMPLES), instrument


def spectrogram(sound: Tensor) -> Tensor:
    """Log power, (n, 1, frequencies, times)."""
    power = torch.stft(sound, 256, 128, window=torch.hann_window(256), return_complex=True).abs().square()
    return (power + 1e-3).log()[:, None]


def view(sound: Tensor) -> Tensor:
    """Another speed, start and loudness, and a band of eight frequencies blanked out."""
    n = len(sound)
    speed, start = 1.5 ** (2 * torch.rand(n, 1) - 1), torch.randint(SAMPLES, (n, 1))
    places = (speed * torch.arange(SAMPLES)).long() + start
    image = spectrogram(sound.gather(1, places % SAMPLES) * (0.5 + torch.rand(n, 1)))
    band = torch.randint(image.shape[2] - 8, (n, 1)) + torch.arange(8)
    return image.scatter(2, band[:, None, :, None].expand(-1, 1, -1, image.shape[3]), image.mean().item())


def nearest_neighbours(features: Tensor, labels: Tensor) -> float:
    """Leave-one-out accuracy of the five nearest by cosine."""
    features = nn.functional.normalize(features - features.mean(0), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-2)
    return (labels[similarity.topk(5).indices].mode(dim=1).values == labels).float().mean().item()


def main(steps: int = 150) -> tuple[float, float]:
    """Accuracy by nearest neighbours, of the untrained and of the trained encoder."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(),
    )  # fmt: skip
    projector = Projector(128, hidden_features=256, out_features=256, num_layers=2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=2e-3)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    sounds, instrument = notes(1000)
    before = nearest_neighbours(encoder(spectrogram(sounds)).detach(), instrument)
    for _ in range(steps):
        batch, _ = notes(128)
        loss = loss_fn(projector(encoder(view(batch))), projector(encoder(view(batch))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = nearest_neighbours(encoder.eval()(spectrogram(sounds)).detach(), instrument)
    print(f"The instrument of a note, by its nearest neighbours: {before:.0%} untrained, {after:.0%} trained.")
    return before, after


if __name__ == "__main__":
    main()
