"""A program of lightly's parts, with this loss in place of lightly.loss.BarlowTwinsLoss; the numbers stay the same."""

import torch
from lightly.loss import BarlowTwinsLoss as LightlysLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from sklearn.datasets import load_digits
from torch import nn

from barlow_loss import BarlowTwinsLoss

digits = torch.from_numpy(load_digits().data).float() / 16


def main(steps: int = 30) -> list[float]:
    """Pretrain; returns the loss of every step."""
    encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
    model = nn.Sequential(encoder, BarlowTwinsProjectionHead(256, 512, 512))
    loss_fn = BarlowTwinsLoss(lambd=0.005)  # lightly: BarlowTwinsLoss(lambda_param=5e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        x = digits[torch.randperm(len(digits))[:128]]
        z1, z2 = (model(x + 0.2 * torch.randn_like(x)) for _ in range(2))
        loss = loss_fn(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.1f} → {losses[-1]:.1f}; lightly's of the last step: {LightlysLoss()(z1, z2).item():.4f}")
    return losses


if __name__ == "__main__":
    main()
