#!/usr/bin/env bash
# torch 2.14.1: torch.compile(dynamic=True) of a function that writes into the parts of a buffer with out=.
#
# Guess: x[0] and x[1] are what x.unbind() returns, and one graph serves all sizes with either.
# Seen: with x[0], x[1] one graph is compiled for two sizes; with x.unbind() each size has a graph of its own, and under
# torch.compiler.set_stance("fail_on_recompile") the second size raises.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch
from torch._dynamo.testing import CompileCounterWithBackend


def parts_by_unbind(x):
    return x.unbind()


def parts_by_index(x):
    return x[0], x[1]


def graphs(parts):
    def centred(z):
        x = z.new_empty((2, *z.shape))
        for part, row in zip(parts(x), (z[:1], z[-1:])):
            torch.sub(z, row, out=part)
        return x

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(centred, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((40, 90), (50, 80)):
            z = torch.randn(shape)
            assert torch.equal(compiled(z), centred(z))
    return counter.frame_count


counts = {parts.__name__: graphs(parts) for parts in (parts_by_index, parts_by_unbind)}
print(counts)
assert counts == {"parts_by_index": 1, "parts_by_unbind": 2}
PYTHON
