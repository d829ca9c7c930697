"""The nodes of a graph: views by dropped edges and masked features, as Graph Barlow Twins does (arXiv 2106.02466).

The graph is made here: communities whose members are linked more often to each other, and a few features of each node
that hint at its community, among many that do not. The matrix of edges is dense, so no library of graphs is needed;
with one, only ``Encoder`` changes. A sample is a node, so N is the number of nodes.
"""

import torch
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, Projector

NODES, COMMUNITIES, FEATURES, TELLING = 600, 5, 200, 10


def communities() -> tuple[Tensor, Tensor, Tensor]:
    """Edges (NODES, NODES), features (NODES, FEATURES) and the number of the community of each node."""
    community = torch.arange(NODES) % COMMUNITIES
    likely = torch.where(community[:, None] == community, 0.05, 0.01)
    upper = (torch.rand(NODES, NODES) < likely).float().triu(1)
    features = torch.randn(NODES, FEATURES)
    features[:, :TELLING] += torch.randn(COMMUNITIES, TELLING)[community]
    return upper + upper.mT, features, community


def view(edges: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Without three tenths of the edges, and of the features."""
    kept = (torch.rand(edges.shape) > 0.3).float().triu(1)
    return edges * (kept + kept.mT), features * (torch.rand(FEATURES) > 0.3)


class Encoder(nn.Module):
    """Two graph convolutions (Kipf & Welling, arXiv 1609.02907), to (NODES, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 128), nn.Linear(128, 64)
        self.norm = nn.BatchNorm1d(128)

    def forward(self, edges: Tensor, features: Tensor) -> Tensor:
        linked = edges + torch.eye(NODES)
        scale = linked.sum(1).rsqrt()
        mean = scale[:, None] * linked * scale
        return mean @ self.second(self.norm(mean @ self.first(features)).relu())


def nearest_neighbours(features: Tensor, labels: Tensor) -> float:
    """Leave-one-out accuracy of the ten nearest by cosine."""
    features = nn.functional.normalize(features - features.mean(0), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-2)
    return (labels[similarity.topk(10).indices].mode(dim=1).values == labels).float().mean().item()


def main(steps: int = 200) -> tuple[float, float]:
    """Accuracy by nearest neighbours, of the untrained and of the trained encoder."""
    torch.manual_seed(0)
    edges, features, community = communities()
    encoder, projector = Encoder(), Projector(64, hidden_features=128, out_features=256, num_layers=2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=1e-3)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)
    with torch.no_grad():
        before = nearest_neighbours(encoder(edges, features), community)
    for _ in range(steps):
        loss = loss_fn(*(projector(encoder(*view(edges, features))) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = nearest_neighbours(encoder.eval()(edges, features), community)
    plain = nearest_neighbours(features, community)
    print(f"The community of a node: {plain:.0%} by its features, {before:.0%} untrained, {after:.0%} trained.")
    return before, after


if __name__ == "__main__":
    main()
