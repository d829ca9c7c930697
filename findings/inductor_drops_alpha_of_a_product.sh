#!/usr/bin/env bash
# torch 2.13.0 and 2.14.1, CPU: torch.add(x, a @ b, alpha=0.5) under torch.compile with its default backend.
#
# Guess: x + 0.5 · (a @ b), as without compilation.
# Seen: x + a @ b. The sum and the product become one addmm, and alpha is gone, without a word. So it is for x.add_(…),
# for a functional.linear without bias in place of a @ b (a layer beside another one, weighted, say), for
# torch.add(a @ b, x, alpha=0.5), in float64 as well. It is right where the product has another use too, for a bias, for
# torch.sub, for torch.addmm(x, a, b, alpha=0.5), for x + 0.5 * (a @ b), and with backend="aot_eager".
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import linear

torch.manual_seed(0)
x, a, b = (torch.randn(size, dtype=torch.float64) for size in ((8, 7), (8, 9), (9, 7)))
half = {
    "a product": (lambda x, a, b: torch.add(x, a @ b, alpha=0.5), x + a @ b),
    "in place": (lambda x, a, b: x.clone().add_(a @ b, alpha=0.5), x + a @ b),
    "a layer without bias": (lambda x, a, b: torch.add(x, linear(a, b.T), alpha=0.5), x + a @ b),
    "the other term": (lambda x, a, b: torch.add(a @ b, x, alpha=0.5), x + a @ b),
    "a layer with bias": (lambda x, a, b: torch.add(x, linear(a, b.T, x[0]), alpha=0.5), x + (a @ b + x[0]) / 2),
    "used twice": (lambda x, a, b: (lambda p: torch.add(x, p, alpha=0.5) + p)(a @ b), x + 1.5 * (a @ b)),
    "a difference": (lambda x, a, b: torch.sub(x, a @ b, alpha=0.5), x - (a @ b) / 2),
    "addmm": (lambda x, a, b: torch.addmm(x, a, b, alpha=0.5), x + (a @ b) / 2),
    "a factor": (lambda x, a, b: x + 0.5 * (a @ b), x + (a @ b) / 2),
}
for what, (formula, seen) in half.items():
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(formula)(x, a, b), seen, msg=what)
    if what in list(half)[:4]:
        torch.compiler.reset()
        right = torch.compile(formula, backend="aot_eager")(x, a, b)
        torch.testing.assert_close(right, formula(x, a, b), msg=what)
        assert not torch.allclose(right, seen)
print("as described")
PYTHON
