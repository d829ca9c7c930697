"""Rows of a table: views by features taken from other rows, as SCARF does (arXiv 2106.15147).

The table is scikit-learn's digits, 1,797 rows of 64 columns; that these are pixels, nothing here knows. The labels
serve the evaluation alone.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from barlow_loss import BarlowTwinsLoss, Projector, standardize

CHANGED = 0.3  # share of a row's features that come from other rows


def view(rows: Tensor, table: Tensor) -> Tensor:
    """Rows (n, features), of which some values are those of random rows of the table, feature by feature."""
    others = table.gather(0, torch.randint(len(table), rows.shape))
    return torch.where(torch.rand(rows.shape) < CHANGED, others, rows)


def few_labels(features: Tensor, labels: Tensor, per_class: int = 2, draws: int = 10) -> float:
    """Mean accuracy of a linear classifier on the rest, trained on so many rows of each class."""
    accuracies = []
    for draw in range(draws):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
        train = torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])
        test = order[~torch.isin(order, train)]
        classifier = LogisticRegression(max_iter=1000).fit(features[train].numpy(), labels[train].numpy())
        accuracies.append(classifier.score(features[test].numpy(), labels[test].numpy()))
    return sum(accuracies) / draws


def main(steps: int = 400) -> tuple[float, float]:
    """Accuracy with two labels a class, of the untrained and of the trained encoder."""
    torch.manual_seed(0)
    data = load_digits()
    table, labels = standardize(torch.from_numpy(data.data).float()), torch.from_numpy(data.target)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
    projector = Projector(64, hidden_features=256, out_features=512, num_layers=2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=1e-3)
    loss_fn = BarlowTwinsLoss(lambd=0.0051)

    def features() -> Tensor:
        with torch.no_grad():
            return standardize(encoder.eval()(table))

    before = few_labels(features(), labels)
    encoder.train()
    for _ in range(steps):
        rows = table[torch.randint(len(table), (256,))]
        loss = loss_fn(*(projector(encoder(view(rows, table))) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after, plain = few_labels(features(), labels), few_labels(table, labels)
    print(f"The class, two labels of each: {plain:.0%} by the table, {before:.0%} untrained, {after:.0%} trained.")
    return before, after


if __name__ == "__main__":
    main()
