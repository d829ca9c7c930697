#!/usr/bin/env bash
# torch 2.13.0 and 2.14.1: torch.compile of torch.func.grad(f), where f asks its argument for requires_grad.
#
# Guess: f sees in the graph what it sees without one: inside of torch.func.grad its argument requires a gradient.
# Seen: without compilation x.requires_grad is True, in the graph it is False, with every backend, under fullgraph=True
# too, and whether or not the tensor that was passed requires one. So it is for vjp, jacrev and vmap of grad. A function
# that takes a cheaper way where no gradient is asked for takes that way, and its gradient is another one, without a word.
# Whatever an operation has made of the argument says True, as it should.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch
from torch.func import grad, jacrev, vjp, vmap


def of_argument(x):
    return (x * (3 if x.requires_grad else 2)).sum()


def of_result(x):
    y = x * 1
    return (y * (3 if y.requires_grad else 2)).sum()


def compiled(function, backend="eager"):
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


ones, three, two = torch.ones(4), torch.full((4,), 3.0), torch.full((4,), 2.0)
assert torch.equal(grad(of_argument)(ones), three)
for backend in ("eager", "aot_eager", "inductor"):
    assert torch.equal(compiled(grad(of_argument), backend)(ones), two), backend
assert torch.equal(compiled(grad(of_argument))(ones.clone().requires_grad_()), two)
for transformed in (jacrev(of_argument), lambda x: vjp(of_argument, x)[1](torch.tensor(1.0))[0]):
    assert torch.equal(transformed(ones), three)
    assert torch.equal(compiled(transformed)(ones), two)
pair = torch.ones(2, 4)
assert torch.equal(vmap(grad(of_argument))(pair), torch.full((2, 4), 3.0))
assert torch.equal(compiled(vmap(grad(of_argument)))(pair), torch.full((2, 4), 2.0))
assert torch.equal(grad(of_result)(ones), three)
assert torch.equal(compiled(grad(of_result))(ones), three)
print("as described")
PYTHON
