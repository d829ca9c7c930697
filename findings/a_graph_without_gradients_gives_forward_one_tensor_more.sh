#!/usr/bin/env bash
# torch 2.14.1: torch.compile of a torch.autograd.Function whose forward takes any number of tensors.
#
# Guess: forward(factor, *views) with setup_context sees in a graph the arguments that it sees in eager mode.
# Seen: it does where a tensor needs a gradient. Where none does, Dynamo gives a forward with *args the context as one
# argument more, at the front. Nothing is raised: a Function that counts its views returns 3 for 2, under fullgraph=True
# too. One view is counted right, and so is any number by a forward with named arguments only.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch


class Count(torch.autograd.Function):
    @staticmethod
    def forward(factor, *views):
        return torch.full((), float(len(views)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.arguments = len(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return (None,) * ctx.arguments


for needs_gradient, views, seen in ((True, 2, 2), (True, 3, 3), (False, 1, 1), (False, 2, 3), (False, 3, 4)):
    z = [torch.ones(3, requires_grad=needs_gradient) for _ in range(views)]
    torch.compiler.reset()
    count = torch.compile(lambda *z: Count.apply(2.0, *z), backend="eager", fullgraph=True)
    assert Count.apply(2.0, *z) == views
    assert count(*z) == seen, (needs_gradient, views, float(count(*z)))
print("as described")
PYTHON
