"""Forward and backward through every kernel on sizes that no tile divides, for compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that a read past its end is seen.

    compute-sanitizer --tool memcheck --error-exitcode 9 --report-api-errors no python tests/gpu/run_sanitizer.py
    compute-sanitizer --tool racecheck --error-exitcode 9 --report-api-errors no python tests/gpu/run_sanitizer.py
"""

import sys

import torch

from barlow_loss import barlow_twins_loss, reference

SIZES = ((33, 129), (65, 257), (7, 23))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def views(n, d, dtype, device):
    """Random, one of them at an odd element of its allocation and with an odd row pitch."""
    generator = torch.Generator(device).manual_seed(n + d)
    plain = torch.randn(n, d, generator=generator, device=device).to(dtype).requires_grad_()
    pitched = torch.randn(n * (d + 3) + 1, generator=generator, device=device).to(dtype)[1:].view(n, d + 3)[:, :d]
    return plain, pitched.detach().requires_grad_()


def main(backend="triton", device="cuda"):
    worst = 0.0
    for algorithm in ("dual", "primal"):
        for dtype in DTYPES:
            for n, d in SIZES:
                leaves = views(n, d, dtype, device)
                loss = barlow_twins_loss(*leaves, backend=backend, algorithm=algorithm)
                gradients = torch.autograd.grad(loss, leaves)
                right = float(reference.barlow_twins_loss(*(leaf.detach().double() for leaf in leaves)).loss)
                assert all(gradient.isfinite().all() for gradient in gradients)
                worst = max(worst, abs(float(loss.detach()) - right) / right)
    print(f"{len(SIZES) * len(DTYPES) * 2} steps, {backend} on {device}, largest error of the loss {worst:.1e}")
    if not worst <= 1e-3:
        sys.exit("the loss is wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
