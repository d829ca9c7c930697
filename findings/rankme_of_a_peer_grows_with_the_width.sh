#!/usr/bin/env bash
# stable-pretraining 0.1.8, torch 2.14.1, CPU: its callback RankMe on embeddings of which each is a multiple of one
# vector.
#
# Guess: 1, the only direction there is, whatever the width; with the paper's 1e-7 beside each share of the spectrum
# 1.003 for 2,048 samples of 2,048 features (Garrido et al., arXiv 2210.02885, equation 1).
# Seen: 1.03 for 256 of 256, 1.27 for 2,048 of 2,048: the callback adds 1e-5, to the shares that are 0, too, and each of
# them brings 1.15e-4 of entropy. 8,192 of 8,192, the paper's projector, have 2.57. So a collapsed run seems to use more
# directions the wider it is, every other value is too high by about as much, and values of two widths do not compare.
# The port for JAX in the same package adds 1e-7.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet stable-pretraining==0.1.8 lightning==2.6.6 torch==2.14.1 numpy==2.4.6
HOME="$scratch" "$scratch/venv/bin/python" - <<'PYTHON'
import math

import lightning.pytorch as pl
import stable_pretraining as spt
import torch
from stable_pretraining.callbacks import RankMe
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, z):
        self.z = z

    def __len__(self):
        return len(self.z)

    def __getitem__(self, index):
        return {"embedding": self.z[index]}


def rankme(z):
    """What the callback logs after one epoch in which it has seen every row."""

    def forward(self, batch, stage):
        return batch | {"loss": self.weight.sum()}

    module = spt.Module(forward=forward, optim={"optimizer": {"type": "SGD", "lr": 0.1}})
    module.weight = torch.nn.Parameter(torch.zeros(1))
    without = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = RankMe("rankme", "embedding", len(z), z.shape[1])
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **without)
    trainer.fit(module, DataLoader(Rows(z), batch_size=len(z)), DataLoader(Rows(z[:2]), batch_size=2))
    return float(trainer.callback_metrics["rankme"])


def of_shares(z, added):
    singular_values = torch.linalg.svdvals(z.double())
    shares = singular_values / singular_values.sum() + added
    return math.exp(-float((shares * shares.log()).sum()))


generator = torch.Generator().manual_seed(0)
for width, seen, papers in ((256, 1.03, 1.0004), (2048, 1.266, 1.0033)):
    z = torch.outer(torch.randn(width, generator=generator), torch.randn(width, generator=generator))
    assert abs(of_shares(z, 1e-7) - papers) < 2e-4, of_shares(z, 1e-7)
    assert abs(of_shares(z, 1e-5) - seen) < 2e-3, of_shares(z, 1e-5)
    found = rankme(z)
    assert abs(found - seen) < 5e-3, found
print("as described")
PYTHON
