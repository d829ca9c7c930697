"""Barlow Twins with Hugging Face Accelerate.

    accelerate launch --num_processes 2 examples/integrations/with_accelerate.py

Call the loss on this process's rows, never on what accelerator.gather() returns: it gathers by itself.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm, Projector

digits = torch.from_numpy(load_digits().data).float() / 16


def main(epochs: int = 2) -> list[float]:
    """Pretrain; returns the loss of every step."""
    accelerator = Accelerator()
    encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
    model = DistributedBatchNorm.convert(nn.Sequential(encoder, Projector(256, hidden_features=512, out_features=512)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(digits, batch_size=128, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    losses = []
    for epoch in range(epochs):
        for x in loader:
            z1, z2 = (model(x + 0.2 * torch.randn_like(x)) for _ in range(2))
            loss = loss_fn(z1, z2)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.1f}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
