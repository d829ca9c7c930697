"""Two encoders, one for each modality: here the upper and the lower half of scikit-learn's digits.

The views need nothing in common but their samples: image and text, two sensors, two assays. Each view is standardised
by itself, so encoders may differ in kind and scale; only D must be the same.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, Projector

PIXELS = 32  # of a half
digits = torch.from_numpy(load_digits().images).float().flatten(1) / 16


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 128), nn.BatchNorm1d(128), nn.ReLU(), Projector(128, 256, 256, num_layers=2))


def found(upper: Tensor, lower: Tensor) -> float:
    """How often the lower half of the same digit is among the ten nearest to an upper half, by cosine."""
    upper, lower = (nn.functional.normalize(z - z.mean(0), dim=1) for z in (upper, lower))
    nearest = (upper @ lower.T).topk(10).indices
    return (nearest == torch.arange(len(upper))[:, None]).any(1).float().mean().item()


def main(steps: int = 300) -> tuple[float, float]:
    """How often the other half is found among 360 that were not trained on, before and after."""
    torch.manual_seed(0)
    train, test = digits[:1437], digits[1437:]
    encoders = nn.ModuleList([encoder(), encoder()])
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-3)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)

    def embedded(batch: Tensor) -> list[Tensor]:
        return [encode(half) for encode, half in zip(encoders, batch.split(PIXELS, dim=1), strict=True)]

    with torch.no_grad():
        before = found(*embedded(test))
    for _ in range(steps):
        loss = loss_fn(*embedded(train[torch.randint(len(train), (256,))]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = found(*embedded(test))
    print(f"The other half of a digit, among the ten nearest of {len(test)}: {before:.0%} before, {after:.0%} after.")
    return before, after


if __name__ == "__main__":
    main()
