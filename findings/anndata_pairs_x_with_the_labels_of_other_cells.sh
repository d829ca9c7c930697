#!/usr/bin/env bash
# anndata 0.12.19, torch 2.14.1: AnnCollection and AnnLoader over several AnnData objects. X, layers, obsm and obs of each
# cell hold the cell's number.
#
# Guess: with indices_strict=False the rows of a batch come in an order of their own, the same for all that belongs to a
# cell.
# Seen: X and layers come in the order of the objects, obs and obsm in that of the shuffled indices. Of 4,000 cells in
# four objects, in batches of 256, 3,977 have the label and the obsm of another cell. So an encoder of X beside one of
# obsm (RNA and protein, say) learns from pairs that are none, and a probe from labels that are others'. The docstring
# names stochastic gradient descent as the use. With the default, True, all belong together, and with one object, too.
# A boolean mask, as in collection[collection.obs["split"] == "train"], is taken for numbers by X and layers: X has the
# rows of cells 1 and 0 in turn, as many as the mask is long, and obs the right ones. An AnnLoader over such a view is
# right.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet anndata==0.12.19 torch==2.14.1 scipy==1.17.1 pandas==2.3.3 numpy==2.4.6
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import anndata
import numpy as np
import pandas as pd
from anndata.experimental import AnnCollection, AnnLoader
from scipy import sparse


def objects(count, cells, matrix):
    found = []
    for start in range(0, count * cells, cells):
        numbers = np.arange(start, start + cells)
        column = matrix(numbers[:, None].astype(np.float32))
        obs = pd.DataFrame({"number": numbers}, index=numbers.astype(str))
        found.append(anndata.AnnData(column, obs, layers={"copy": column}, obsm={"other": numbers[:, None].copy()}))
    return found


def column(values):
    return (values.toarray() if sparse.issparse(values) else np.asarray(values))[:, 0].astype(int).tolist()


def four(view):
    parts = view.X, view.layers["copy"], view.obsm["other"]
    return [*map(column, parts), [int(number) for number in view.obs["number"]]]


for matrix in (np.asarray, sparse.csr_matrix):
    for count in (1, 2):
        asked = [13, 2, 17, 5] if count == 2 else [7, 2, 9, 5]
        for strict in (True, False):
            view = AnnCollection(objects(count, 10, matrix), join_obsm="inner", indices_strict=strict)[asked]
            rows = sorted(asked) if count == 2 and not strict else asked
            assert four(view) == [rows, rows, asked, asked], four(view)

    for count, strict, different in ((4, False, 3977), (4, True, 0), (1, False, 0)):
        np.random.seed(0)
        settings = {"join_obsm": "inner", "indices_strict": strict}
        loader = AnnLoader(objects(count, 1000, matrix), batch_size=256, shuffle=True, **settings)
        x, layer, other, number = (np.concatenate(part) for part in zip(*map(four, loader)))
        assert sorted(x) == sorted(number) == list(range(count * 1000))
        assert (x == layer).all() and (other == number).all()
        assert (x != number).sum() == different, (x != number).sum()

    collection = AnnCollection(objects(2, 10, matrix), join_obsm="inner")
    third = collection.obs["number"] % 3 == 0
    rows, right = third.astype(int).tolist(), [0, 3, 6, 9, 12, 15, 18]
    assert four(collection[third]) == [rows, rows, right, right], four(collection[third])
    assert [four(batch) for batch in AnnLoader(collection[third], batch_size=9)] == [[right] * 4]
    (one,) = objects(1, 20, matrix)
    assert column(one[third.to_numpy()].X) == right
print("as described")
PYTHON
