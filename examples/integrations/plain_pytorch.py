"""Barlow Twins in a plain loop: a torchvision ResNet-18 on scikit-learn's digits, on the CPU or a GPU."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import v2

from barlow_loss import BarlowTwinsLoss, Projector, collapse_report

augment = v2.Compose([v2.Resize(32), v2.RandomResizedCrop(32, scale=(0.4, 1.0)), v2.ColorJitter(0.5, 0.5)])
digits = (torch.from_numpy(load_digits().images).float() / 16)[:, None].repeat(1, 3, 1, 1)


def two_views(images):
    images = torch.stack(images)
    return tuple(torch.stack([augment(image) for image in images]) for _ in range(2))


def main(epochs: int = 2) -> list[float]:
    """Pretrain; returns the loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(digits, batch_size=128, shuffle=True, drop_last=True, collate_fn=two_views)
    encoder = resnet18()
    encoder.fc = nn.Identity()
    model = nn.Sequential(encoder, Projector(512, hidden_features=512, out_features=512)).to(device)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for x1, x2 in loader:
            z1, z2 = model(x1.to(device)), model(x2.to(device))
            loss = loss_fn(z1, z2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.1f}")
    print(collapse_report(z1, z2))
    return losses


if __name__ == "__main__":
    main()
