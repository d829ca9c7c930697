"""A ViT of timm: pooled features go into the projector, as many as the model says."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from barlow_loss import BarlowTwinsLoss, Projector

digits = (torch.from_numpy(load_digits().images).float() / 16)[:, None]


def main(steps: int = 30) -> list[float]:
    """Pretrain; returns the loss of every step."""
    images = functional.interpolate(digits, size=32)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, num_classes=0, depth=4, global_pool="avg"
    )
    model = nn.Sequential(encoder, Projector(encoder.num_features, hidden_features=512, out_features=512))
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(steps):
        x = images[torch.randperm(len(images))[:128]]
        loss = loss_fn(*(model(x + 0.2 * torch.randn_like(x)) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.1f} → {losses[-1]:.1f}")
    return losses


if __name__ == "__main__":
    main()
