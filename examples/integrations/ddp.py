"""The plain loop on several processes: torchrun --nproc-per-node 2 examples/integrations/ddp.py."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from barlow_loss import BarlowTwinsLoss, DistributedBatchNorm, Projector

digits = torch.from_numpy(load_digits().data).float() / 16


def noisy(x):
    return x + 0.2 * torch.randn_like(x)


def main(epochs: int = 2) -> list[float]:
    """Pretrain; returns the loss of every step, which every rank has alike."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")  # the checks go over the CPU
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    torch.manual_seed(dist.get_rank())
    sampler = DistributedSampler(digits)
    loader = DataLoader(digits, batch_size=128 // dist.get_world_size(), sampler=sampler, drop_last=True)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
    model = nn.Sequential(encoder, Projector(256, hidden_features=512, out_features=512))
    model = DistributedDataParallel(DistributedBatchNorm.convert(model).to(device))
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x in loader:
            loss = loss_fn(model(noisy(x.to(device))), model(noisy(x.to(device))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.1f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
