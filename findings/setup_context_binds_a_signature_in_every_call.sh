#!/usr/bin/env bash
# torch 2.14.1: a torch.autograd.Function in the newer style, forward(x) with setup_context(ctx, inputs, output).
#
# Guess: the style, which torch.func wants, costs what forward(ctx, x) costs; a signature is looked at once, if at all.
# Seen: every call of apply() asks inspect.signature for that of forward and binds the arguments to it, 100 times in 100
# calls; the older style never does. forward.__signature__, set by hand, makes the question cheap: inspect then returns
# it as it is.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import inspect

import torch


class Newer(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    backward = Newer.backward


signature, asked = inspect.signature, []


def counted(function, **settings):
    asked.append(function)
    return signature(function, **settings)


counts = {}
inspect.signature = counted
for style in (Newer, Older):
    asked.clear()
    for _ in range(100):
        style.apply(torch.ones(3, requires_grad=True))
    counts[style.__name__] = len(asked)
inspect.signature = signature
print(counts)
assert counts == {"Newer": 100, "Older": 0}
PYTHON
