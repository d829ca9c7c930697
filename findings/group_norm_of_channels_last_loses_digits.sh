#!/usr/bin/env bash
# torch 2.14.1 on a CPU: group normalisation of the same float32 numbers, contiguous and in channels_last.
#
# Guess: a memory format changes the speed, and the result by no more than a rounding.
# Seen: of channels_last the variance is E[x²] − E[x]², in float32. Of numbers with standard deviation 1 and mean 100
# the result is off by 0.03 (contiguous: 2e-05). At a mean of 1,000 the difference is 0 or less in some groups, which
# are divided by √ε then: the result is off by 1,280 (contiguous: 1e-04). channels_last_3d is alike. F.instance_norm and
# F.layer_norm of the same tensors are right within 2e-04 in both formats, and so is group_norm in float64.
# So numbers with an offset (elevations, CT numbers, temperatures in kelvin) and channels_last, the advice for
# convolutions on a CPU, do not go together in front of a GroupNorm.
#
# Exit status 0 while that is so.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import group_norm, instance_norm, layer_norm

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def error(normalise, x, memory_format):
    found = normalise(x.float().contiguous(memory_format=memory_format))
    return float((found - normalise(x)).abs().max())


def of_groups(x):
    return group_norm(x, 8)


def of_positions(x):
    return layer_norm(x.movedim(1, -1), x.shape[1:2])


for shape, channels_last in (((32, 32, 28, 28), torch.channels_last), ((16, 32, 4, 14, 14), torch.channels_last_3d)):
    for mean, right, wrong in ((0, 5e-6, 0), (100, 5e-5, 5e-3), (1000, 5e-4, 1)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
        assert error(of_groups, x, torch.contiguous_format) < right, mean
        assert error(of_groups, x, channels_last) > wrong, mean
        for other in (instance_norm, of_positions):
            assert error(other, x, torch.contiguous_format) < right, (other, mean)
            assert error(other, x, channels_last) < right, (other, mean)
        in_float64 = of_groups(x.contiguous(memory_format=channels_last))
        assert float((in_float64 - of_groups(x)).abs().max()) < 1e-6, mean
print("as described")
PYTHON
