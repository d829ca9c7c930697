"""Barlow Twins in a few lines and a few seconds, with nothing but torch.

    python examples/quickstart.py

Everything observed has a content, which both views share, and a style, which every view draws anew. The two are mixed
by a fixed random network. Without being told, the encoder must find what the views have in common: the content.
"""

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, CollapseGate, CollapseMonitor, Projector, collapse_report

CONTENT, STYLE, OBSERVED, FEATURES = 4, 24, 64, 16


def observe(world: nn.Module, content: Tensor) -> Tensor:
    """One view, (N, 64), of the contents (N, 4)."""
    return world(torch.cat([content, torch.randn(len(content), STYLE)], dim=1))


@torch.no_grad()
def explained(features: Tensor, content: Tensor) -> float:
    """R² of a linear map from features to content, fitted on one half of the samples and measured on the other."""
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    (fit, test), (known, truth) = inputs.chunk(2), content.chunk(2)
    errors = truth - test @ torch.linalg.lstsq(fit, known).solution
    return 1 - float(errors.square().mean() / truth.var())


def main() -> None:
    """Train for a few seconds, then look at the embeddings and ask the encoder for the content."""
    torch.manual_seed(0)
    world = nn.Sequential(nn.Linear(CONTENT + STYLE, 128), nn.Tanh(), nn.Linear(128, OBSERVED)).requires_grad_(False)
    content = torch.randn(4096, CONTENT)
    observed = observe(world, content)
    encoder = nn.Sequential(nn.Linear(OBSERVED, 256), nn.ReLU(), nn.Linear(256, FEATURES))
    before = explained(encoder(observed), content)

    projector = Projector(FEATURES, hidden_features=256, out_features=512, num_layers=2)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    monitor = CollapseMonitor(every=100, gate=CollapseGate())  # a line every 100 steps, and an end if all collapses
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=2e-3)
    for step in range(301):
        batch = torch.randn(256, CONTENT)
        z1, z2 = (projector(encoder(observe(world, batch))) for _ in range(2))
        loss = loss_fn(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor(step, z1, z2)

    print(f"\n{collapse_report(z1, z2)}\n")
    after = explained(encoder(observed), content)
    print(f"Content that a linear map finds in the features: {before:.0%} untrained, {after:.0%} trained.")


if __name__ == "__main__":
    main()
