#!/usr/bin/env bash
# torch 2.11.0: torch.compile of an autograd.Function whose forward ends with a .to() that has nothing to do, or an out=.
#
# Guess: the graph has the gradient that the function's own backward gives, as without compilation.
# Seen: the gradient is exactly 0, without a warning, with every backend, in one graph (fullgraph=True) and in the form
# with setup_context, too. With a .to() that changes the dtype, or copy=True, it is right. So a loss that is computed in
# float64 and returned in the dtype of its input trains in float32 and stands still in float64. torch 2.12.1, 2.13.0 and
# 2.14.1 are right.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch


def twice_to(x):
    return (x * 2).to(torch.float64)


def twice_copied(x):
    return (x * 2).to(torch.float64, copy=True)


def twice_out(x):
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    return y


def operation(body):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return body(x)

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class TwiceWithSetup(Twice):
        @staticmethod
        def forward(x):
            return body(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    return Twice, TwiceWithSetup


def gradient(function, dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    function(x).sum().backward()
    return x.grad.tolist()


for body, dtype, expected in (
    (twice_to, torch.float64, 0),
    (twice_out, torch.float64, 0),
    (twice_out, torch.float32, 0),
    (twice_copied, torch.float64, 2),
    (twice_to, torch.float32, 2),  # there .to() has an effect
):
    for function in operation(body):
        assert gradient(function.apply, dtype) == [2] * 3
        for backend in ("eager", "aot_eager"):
            torch.compiler.reset()
            compiled = torch.compile(function.apply, backend=backend, fullgraph=True)
            found = gradient(compiled, dtype)
            print(body.__name__, dtype, function.__name__, backend, found)
            assert found == [expected] * 3
PYTHON
