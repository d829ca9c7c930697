"""Barlow Twins as a LightningModule, with the collapse report in the Trainer's logs and a gate that can end the run.

Several devices need no change: Trainer(devices=4, strategy="ddp"). Leave sync_batchnorm off, which would replace
DistributedBatchNorm.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from barlow_loss import BarlowTwinsLoss, CollapseGate, DistributedBatchNorm, Projector
from barlow_loss.lightning import CollapseCallback

digits = torch.from_numpy(load_digits().data).float() / 16


class BarlowTwins(LightningModule):
    """An encoder of the digits' pixels, and the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.projector = Projector(256, hidden_features=512, out_features=512)
        DistributedBatchNorm.convert(self)
        self.loss_fn = BarlowTwinsLoss(lambd=0.0051)

    def training_step(self, batch, batch_idx):
        z1, z2 = (self.projector(self.encoder(batch + 0.2 * torch.randn_like(batch))) for _ in range(2))
        loss = self.loss_fn(z1, z2)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(epochs: int = 2, **settings) -> Trainer:
    """Pretrain; the Trainer's ``logged_metrics`` has the last loss and the last report."""
    seed_everything(0)
    watch = CollapseCallback(every=10, gate=CollapseGate(after=10))
    trainer = Trainer(max_epochs=epochs, callbacks=[watch], log_every_n_steps=1, **settings)
    trainer.fit(BarlowTwins(), DataLoader(digits, batch_size=128, shuffle=True, drop_last=True))
    return trainer


if __name__ == "__main__":
    main()
